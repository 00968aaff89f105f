"""From a data section to the rows of a run."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from data_rows import ANY, LIST, PAIR, UNPAIRED, Needs, Write, pairs

from mmalign.config import DataConfig
from mmalign.data import Example, load_examples
from mmalign.errors import DataError

RANKED = {"prompt": "Q", "responses": ["a", "b", "c"], "scores": [2, 3, 1]}


def load(needs: Needs = PAIR, seed: int = 0, **data: Any) -> tuple[list[Example], list[Example]]:
    return load_examples(DataConfig(**data), needs, seed=seed)


def responses(rows: list[Example]) -> list[list[Any]]:
    return [[c.response for c in row.candidates] for row in rows]


def ids(rows: list[Example]) -> list[str]:
    return [row.id for row in rows]


def test_pairs_stay_in_order(write: Write) -> None:
    train, evaluation = load(train=write("a.jsonl", pairs(3)))
    assert ids(train) == ["p0", "p1", "p2"]
    assert evaluation == []


# Held-out rows


def test_rows_marked_by_split_are_held_out(write: Write) -> None:
    marks = ["train", "eval", "test", "validation", "Dev", "other", None]
    records = [r | {"split": m} for r, m in zip(pairs(7), marks, strict=True)]
    train, evaluation = load(train=write("a.jsonl", records))
    assert (ids(train), ids(evaluation)) == (["p0", "p5", "p6"], ["p1", "p2", "p3", "p4"])


def test_a_source_may_choose_its_split(write: Write) -> None:
    path = write(
        "a.jsonl", pairs(2, split="x") + [p | {"id": "other"} for p in pairs(1, split="y")]
    )
    train, evaluation = load(train={"path": path, "split": "y"}, eval={"path": path, "split": "x"})
    assert (ids(train), ids(evaluation)) == (["other"], ["p0", "p1"])
    with pytest.raises(DataError, match="no row has the split 'z'; found: x, y"):
        load(train={"path": path, "split": "z"})
    with pytest.raises(DataError, match="it has no `split` column"):
        load(train={"path": write("b.jsonl", pairs(1)), "split": "z"})


def test_the_same_file_may_be_train_and_eval(write: Write) -> None:
    records = [r | {"split": s} for r, s in zip(pairs(2), ["train", "eval"], strict=True)]
    path = write("a.jsonl", records)
    train, evaluation = load(train=path, eval=path)
    assert (ids(train), ids(evaluation)) == (["p0"], ["p1"])


def test_a_fraction_of_the_prompts_is_held_out_whatever_the_order_and_seed(write: Write) -> None:
    records = [*pairs(200), *(p | {"id": p["id"] + "again", "chosen": "new"} for p in pairs(200))]
    train, evaluation = load(train=write("a.jsonl", records), eval_fraction=0.2)
    assert 50 < len(evaluation) < 110
    assert not {r.prompt for r in train} & {r.prompt for r in evaluation}
    again = load(train=write("b.jsonl", records[::-1]), eval_fraction=0.2, seed=1)
    assert set(ids(again[1])) == set(ids(evaluation))


def test_a_fraction_holds_out_at_least_one_prompt(write: Write) -> None:
    train, evaluation = load(train=write("a.jsonl", pairs(3)), eval_fraction=1e-9)
    assert (len(train), len(evaluation)) == (2, 1)
    with pytest.raises(DataError, match="no row is left to train on"):
        load(train=write("a.jsonl", pairs(1)), eval_fraction=0.5)


def test_a_split_column_that_holds_rows_out_wins_over_a_fraction(
    write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    marks = ["eval" if i % 10 == 0 else "train" for i in range(40)]
    records = [r | {"split": m} for r, m in zip(pairs(40), marks, strict=True)]
    train, evaluation = load(train=write("a.jsonl", records), eval_fraction=0.5)
    assert (len(train), ids(evaluation)) == (36, ["p0", "p10", "p20", "p30"])
    assert caplog.messages == [
        "data.eval_fraction 0.5 is not used: the `split` column already holds out 4 rows"
    ]
    caplog.clear()
    whole = [r | {"split": "train"} for r in pairs(40)]
    assert load(train=write("b.jsonl", whole), eval_fraction=0.5)[1]
    assert caplog.messages == []


def test_a_weight_of_evaluation_files_is_refused(write: Write) -> None:
    path = write("a.jsonl", pairs(2))
    with pytest.raises(DataError, match="only what is trained on can be weighted"):
        load(train=path, eval={"path": path, "weight": 2})


def test_held_out_rows_that_nothing_uses_are_counted(
    write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    path = write("a.jsonl", [*pairs(1), pairs(2, split="eval")[1]])
    _, evaluation = load(train=path, eval=write("b.jsonl", pairs(1, prompt="else")))
    assert len(evaluation) == 1
    assert "1 rows of" in caplog.text
    caplog.clear()
    load(train=path, eval=path)
    assert caplog.text == ""


def test_leakage_is_warned_of(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    shouted = [p | {"prompt": p["prompt"].upper() + "  "} for p in pairs(2)]
    shouted[0] |= {"chosen": "new", "rejected": "newer"}
    load(train=write("a.jsonl", pairs(3)), eval=write("b.jsonl", shouted))
    told = "1 of 2 evaluation rows have a prompt that is also trained on"
    assert caplog.messages == [
        f"{told}; the first is p0",
        f"{told}, with its responses; the first is p1",
    ]


# Amounts


def test_weights_say_how_often_a_row_is_used(write: Write) -> None:
    first = {"path": write("a.jsonl", pairs(10)), "weight": 2.5}
    other = [p | {"id": f"o{i}"} for i, p in enumerate(pairs(10))]
    second = {"path": write("b.jsonl", other), "weight": 0.3}
    train, _ = load(train=[first, second])
    counts = Counter(ids(train))
    assert sorted(counts[f"p{i}"] for i in range(10)) == [2] * 5 + [3] * 5
    assert sorted(counts[f"o{i}"] for i in range(10)) == [0] * 7 + [1] * 3
    assert load(train=[first, second]) == (train, [])
    assert ids(load(train=[first, second], seed=9)[0]) != ids(train)


def test_max_samples_are_the_first_rows(write: Write) -> None:
    path = write("a.jsonl", pairs(50))
    assert ids(load(train=path, max_samples=5)[0]) == [f"p{i}" for i in range(5)]
    assert ids(load(train=path, max_samples=5, seed=3)[0]) == [f"p{i}" for i in range(5)]
    assert load(train=path, max_samples=50) == load(train=path) == load(train=path, max_samples=99)
    held_out = write("b.jsonl", [p | {"id": f"e{p['id']}"} for p in pairs(9, prompt="else")])
    _, evaluation = load(train=path, eval=held_out, max_eval_samples=4)
    assert ids(evaluation) == ["ep0", "ep1", "ep2", "ep3"]


def test_reading_ends_where_there_are_enough_rows(write: Write) -> None:
    """What comes after cannot be read, so reading it would stop the run."""
    path = write("a.jsonl", [*pairs(30), "no record"])
    assert len(load(train=path, max_samples=30)[0]) == 30
    assert len(load(UNPAIRED, train=path, max_samples=30)[0]) == 30
    train, evaluation = load(train=path, max_samples=10, eval_fraction=0.2)
    assert (len(train), 1 <= len(evaluation) <= 8) == (10, True)
    good = write("b.jsonl", pairs(1, prompt="else"))
    assert len(load(train=good, eval=path, max_eval_samples=30)[1]) == 30
    for options in ({"max_samples": 31}, {"max_samples": 10, "max_eval_samples": 29}):
        with pytest.raises(DataError, match="not JSON"):
            load(train=path, eval_fraction=0.2, **options)


def test_rows_that_cannot_be_trained_on_do_not_count(write: Write) -> None:
    tie = {"tie": True}
    records = [*pairs(3, **tie), *(p | {"id": f"x{p['id']}"} for p in pairs(9, prompt="x"))]
    assert ids(load(train=write("a.jsonl", records), max_samples=2)[0]) == ["xp0", "xp1"]
    bad = [{"prompt": "Q", "response": f"r{i}", "desirable": i > 3} for i in range(9)]
    train, _ = load(ANY, train=write("b.jsonl", bad), max_samples=2)
    assert responses(train) == [["r4"], ["r5"]]


def test_rows_that_a_split_column_holds_out_are_looked_for_to_the_end(write: Write) -> None:
    records = [p | {"split": "eval" if i > 35 else "train"} for i, p in enumerate(pairs(40))]
    records.insert(20, {"id": "bad", "split": "train", "prompt": 5})  # passed over unread
    path = write("a.jsonl", records)
    train, evaluation = load(train=path, max_samples=3)
    assert (ids(train), ids(evaluation)) == (["p0", "p1", "p2"], ["p36", "p37", "p38", "p39"])
    _, evaluation = load(train=path, max_samples=3, max_eval_samples=2, eval_fraction=0.1)
    assert ids(evaluation) == ["p36", "p37"]
    _, evaluation = load(
        train=write("b.jsonl", pairs(3)), eval=path, max_eval_samples=2, bad_rows="drop"
    )
    assert ids(evaluation) == ["p36", "p37"]


def test_sources_take_turns_in_proportion_to_their_weights(write: Write) -> None:
    first = write("a.jsonl", [p | {"id": f"a{i}"} for i, p in enumerate(pairs(40))])
    other = write("b.jsonl", [p | {"id": f"b{i}"} for i, p in enumerate(pairs(4, prompt="x"))])
    assert ids(load(train=[first, other], max_samples=4)[0]) == ["a0", "b0", "a1", "b1"]
    train, _ = load(train=[first, other], max_samples=20)
    assert Counter(name[0] for name in ids(train)) == {"a": 16, "b": 4}
    train, _ = load(train=[{"path": first, "weight": 3}, other], max_samples=8)
    assert Counter(ids(train)) == {"a0": 3, "b0": 1, "a1": 3, "b1": 1}
    train, _ = load(train=[{"path": first, "weight": 0.5}], max_samples=8)
    assert len(set(ids(train))) == 8


# Kinds of rows


def test_pairs_become_two_unpaired_rows(write: Write) -> None:
    train, _ = load(UNPAIRED, train=write("a.jsonl", pairs(1, weight=3, p_chosen=0.2)))
    assert responses(train) == [["bad 0"], ["good 0"]]  # p_chosen 0.2: `rejected` is the better
    assert [(r.id, r.labels, r.kind, r.weight) for r in train] == [
        ("p0#0", (1.0,), "unpaired", 3.0),
        ("p0#1", (0.0,), "unpaired", 3.0),
    ]


def test_pairs_become_lists_of_two(write: Write) -> None:
    train, _ = load(Needs("list", 2), train=write("a.jsonl", pairs(1)))
    assert [(r.kind, r.labels) for r in train] == [("list", (1.0, 0.0))]
    with pytest.raises(DataError, match="needs at least 3 candidates a row, but the rows have 2"):
        load(LIST, train=write("a.jsonl", pairs(1)))


def test_lists_become_best_and_worst_or_all_pairs(write: Write) -> None:
    path = write("a.jsonl", [RANKED])
    assert responses(load(train=path)[0]) == [["b", "c"]]
    train, _ = load(train=path, list_pairs="all")
    assert sorted(responses(train)) == [["a", "c"], ["b", "a"], ["b", "c"]]
    assert {r.labels for r in train} == {(1.0, 0.0)}
    assert len(set(ids(train))) == 3


def test_lists_stay_lists(write: Write) -> None:
    train, _ = load(LIST, train=write("a.jsonl", [RANKED]))
    assert (responses(train), train[0].labels) == ([["a", "b", "c"]], (2.0, 3.0, 1.0))


def test_lists_of_several_lengths_are_refused(write: Write) -> None:
    short = {"prompt": "R", "responses": ["a", "b"], "scores": [2, 3]}
    path = write("a.jsonl", [RANKED, RANKED | {"prompt": "S"}, short])
    with pytest.raises(DataError, match="there are 1 rows with 2, 2 rows with 3"):
        load(Needs("list", 2), train=path)
    assert len(load(train=path)[0]) == 3


def test_one_response_is_enough_for_some_objectives(write: Write) -> None:
    unpaired = [{"prompt": "Q", "response": r, "desirable": r == "yes"} for r in ("yes", "no")]
    plain = {"prompt": "Q", "response": "text"}
    train, _ = load(ANY, train=write("a.jsonl", [*pairs(1), RANKED, *unpaired, plain]))
    assert responses(train) == [["good 0"], ["b"], ["yes"], ["text"]]
    assert {(r.kind, r.labels) for r in train} == {("plain", (1.0,))}


def test_evaluation_keeps_pairs_where_training_needs_one_response(write: Write) -> None:
    train, evaluation = load(ANY, train=write("a.jsonl", pairs(2)), eval=write("b.jsonl", pairs(1)))
    assert (len(train[0].candidates), len(evaluation[0].candidates)) == (1, 2)


def test_any_rows_of_at_least_two_keep_lists_or_become_pairs(write: Write) -> None:
    two = Needs("any", 2)
    assert load(two, train=write("a.jsonl", [RANKED]))[0][0].kind == "list"
    train, _ = load(two, train=write("a.jsonl", [RANKED, *pairs(1)]))
    assert [row.kind for row in train] == ["pair", "pair"]


@pytest.mark.parametrize(
    ("record", "needs", "reason"),
    [
        (
            {"prompt": "Q", "response": "a", "desirable": True},
            PAIR,
            "single responses, such as kto",
        ),
        ({"prompt": "Q", "response": "a"}, PAIR, "plain text, such as sft"),
        ({"prompt": "Q", "response": "a"}, UNPAIRED, "not rated; add desirable: true or false"),
        ({"prompt": "Q", "response": "a", "desirable": True}, LIST, "give responses and scores"),
    ],
)
def test_rows_that_cannot_be_what_is_needed(
    write: Write, record: dict[str, Any], needs: Needs, reason: str
) -> None:
    with pytest.raises(DataError, match=reason):
        load(needs, train=write("a.jsonl", [record]))


# Ties and swaps

TIE = {"id": "t", "prompt": "Q", "tie": True, "response_a": "x", "response_b": "y", "weight": 3}


def test_ties_are_dropped_and_counted(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    train, _ = load(train=write("a.jsonl", [*pairs(1), TIE]))
    assert ids(train) == ["p0"]
    assert "1 of 2 rows are ties and are left out" in caplog.text


def test_half_a_tie_is_both_orders_with_half_the_weight(write: Write) -> None:
    train, _ = load(train=write("a.jsonl", [TIE]), ties="half")
    assert responses(train) == [["x", "y"], ["y", "x"]]
    assert [(r.id, r.labels, r.weight) for r in train] == [
        ("t#0", (1.0, 0.0), 1.5),
        ("t#1", (1.0, 0.0), 1.5),
    ]


def test_a_soft_tie_is_one_row(write: Write) -> None:
    path = write("a.jsonl", [TIE])
    train, _ = load(train=path, ties="soft")
    assert [(r.labels, r.weight) for r in train] == [((0.5, 0.5), 3.0)]
    with pytest.raises(DataError, match="which unpaired rows cannot carry"):
        load(UNPAIRED, train=path, ties="soft")


def test_a_list_of_equal_scores_says_nothing(write: Write) -> None:
    path = write("a.jsonl", [RANKED, RANKED | {"prompt": "R", "scores": [1, 1, 1]}])
    assert [len(load(LIST, train=path, ties=t)[0]) for t in ("drop", "half", "soft")] == [1, 1, 1]


def test_swap_exchanges_better_and_worse(write: Write) -> None:
    train, _ = load(train=write("a.jsonl", pairs(1, rejected_cut=True)), swap=True)
    assert responses(train) == [["bad 0", "good 0"]]
    assert (train[0].labels, train[0].candidates[0].complete) == ((1.0, 0.0), False)
    assert responses(load(train=write("a.jsonl", [RANKED]), swap=True)[0]) == [["c", "b"]]
    record = {"prompt": "Q", "response": "a", "desirable": True}
    assert load(UNPAIRED, train=write("a.jsonl", [record]), swap=True)[0][0].labels == (0.0,)
    with pytest.raises(DataError, match=r"data\.swap has nothing to swap"):
        load(ANY, train=write("a.jsonl", [{"prompt": "Q", "response": "a"}]), swap=True)


# Roles


def test_needed_roles_come_in_order_and_others_are_left_out(write: Write) -> None:
    extra = {"calibration": "mid", "online": ["x", "y", "z"]}
    path = write("a.jsonl", pairs(1, **extra))
    assert responses(load(train=path)[0]) == [["good 0", "bad 0"]]
    train, _ = load(Needs("pair", 4, ("online", "online")), train=path)
    assert responses(train) == [["good 0", "bad 0", "x", "y"]]
    assert train[0].labels == (1.0, 0.0, 0.0, 0.0)


def test_a_missing_role_names_the_field(write: Write) -> None:
    path = write("a.jsonl", pairs(1, online=["x"]))
    with pytest.raises(DataError, match=r"needs 1 calibration .* in the field 'calibration'"):
        load(Needs("pair", 3, ("calibration",)), train=path)
    with pytest.raises(DataError, match=r"needs 2 online .* this row has 1"):
        load(Needs("pair", 4, ("online", "online")), train=path)


# Bad input


def test_bad_rows_stop_the_run_with_counts(write: Write) -> None:
    records = pairs(6)
    for i in (1, 3, 4):
        records[i]["rejected"] = ""
    records[5]["p_chosen"] = 2
    path = write("a.jsonl", records)
    with pytest.raises(DataError) as error:
        load(train=path)
    assert str(error.value) == (
        f"{path}:2 (id 'p1'): rejected is empty. 2 more have the same problem: 4, 5. "
        f"{path}:6 (id 'p5'): p_chosen must be a finite number between 0 and 1, but is 2. "
        f"4 records of {path} cannot be used; `mmalign data check {path}` lists them all, and "
        "data.bad_rows: drop leaves them out"
    )


def test_bad_rows_may_be_left_out(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    records: list[Any] = [*pairs(2), '{"prompt": ', {"prompt": "Q"}]
    train, _ = load(train=write("a.jsonl", records), bad_rows="drop")
    assert ids(train) == ["p0", "p1"]
    assert "2 of 4 records have problems and are left out" in caplog.text


def test_ids_are_unique_within_a_source(write: Write) -> None:
    records = [*pairs(1), pairs(2)[1] | {"id": "p0"}]
    path = write("a.jsonl", records)
    with pytest.raises(DataError, match=r"the id is not unique, but is also at .*a\.jsonl:1"):
        load(train=path)


def test_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n")
    with pytest.raises(DataError, match="holds no records"):
        load(train=str(path))


def test_messages_go_to_the_package_logger(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    load(train=write("a.jsonl", [*pairs(1), TIE]))
    assert [(r.name, r.levelno) for r in caplog.records] == [("mmalign.data", logging.WARNING)]


# The real files beside the checkout


@pytest.mark.parametrize(
    ("name", "options", "sizes"),
    [
        ("hh_harmless_pairs", {}, (1495, 363)),
        ("pandalm_human_pairs", {}, (688, 147)),
        ("pandalm_human_ties", {"ties": "soft"}, (91, 12)),
        ("pandalm_human_ties", {"ties": "half"}, (182, 24)),
        ("direct_answers", {}, (84, 24)),
    ],
)
def test_real_files(
    shared_data: Path, name: str, options: dict[str, Any], sizes: tuple[int, int]
) -> None:
    path = shared_data / "text" / f"{name}.jsonl"
    train, evaluation = load(train=str(path), **options)
    assert (len(train), len(evaluation)) == sizes
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if name == "hh_harmless_pairs":
        assert not any(isinstance(r.prompt, str) for r in train + evaluation)
        assert sum(len(r.prompt) for r in train + evaluation) == sum(
            ("\n\n" + r["prompt"]).count("\n\nHuman:") * 2 - 1 for r in records
        )
    if name == "pandalm_human_pairs":
        assert Counter(round(r.labels[0], 3) for r in train + evaluation) == {
            1.0: 737,
            0.667: 68,
            0.833: 30,
        }
    if name == "direct_answers":
        cut = sum(not r.candidates[1].complete for r in train + evaluation)
        assert cut == sum(r["rejected_cut"] for r in records) > 50
        assert all(r.candidates[0].complete for r in train)
