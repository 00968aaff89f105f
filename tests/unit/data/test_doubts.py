"""What `data check` and a run warn of: the same lines, each once, with a count and a place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from data_rows import LIST, PAIR, UNPAIRED, Needs, Write, pairs
from picture_files import save

from mmalign.config import DataConfig
from mmalign.data import load_examples
from mmalign.data.select import check_trainable
from mmalign.data.validate import check_files
from mmalign.errors import DataError

QUESTION = "Which colour does the sky have at noon?"


@pytest.fixture
def told(write: Write, caplog: pytest.LogCaptureFixture) -> Any:
    """The warnings of a file of records: those of a run, after a look that a check has the same."""

    def lines(records: list[Any], needs: Needs = PAIR, **data: Any) -> list[str]:
        path = write("a.jsonl", records)
        caplog.clear()
        load_examples(DataConfig(train=path, **data), needs, seed=0)
        messages = [text for text in caplog.messages if "soft labels" not in text]
        assert messages == check_files([path]).warnings.lines()
        return [text.replace(path, "F") for text in messages if "read by nothing" not in text]

    return lines


def test_a_clean_file_says_nothing(told: Any) -> None:
    assert told(pairs(20)) == []
    assert told(pairs(20, weight=5)) == []
    assert told(pairs(3, chosen="yes")) == []  # three may have one answer by chance


# Responses


def test_responses_that_differ_in_space_and_case_alone(told: Any) -> None:
    records = pairs(4)
    records[1]["rejected"] = " GOOD  1\n"
    records[3] |= {"id": "x", "rejected": "good 3 "}
    assert told(records) == [
        "chosen equal to rejected but for white space and case: 2 of 4 pairs; "
        "the first is F:2 (id 'p1')"
    ]
    other = {"prompt_chosen": "one", "prompt_rejected": "two", "chosen": "a", "rejected": "A"}
    assert told([other]) == []  # answers to different prompts


@pytest.mark.parametrize("messages", [False, True])
def test_answers_that_repeat_their_prompt(told: Any, messages: bool) -> None:
    records = [p | {"prompt": f"{QUESTION} {i}"} for i, p in enumerate(pairs(3))]
    records[2]["rejected"] = "which colour does the sky have  at noon? 2 It is blue."
    if messages:
        for record in records:
            record["prompt"] = [{"role": "user", "content": record["prompt"]}]
            for side in ("chosen", "rejected"):
                record[side] = [{"role": "assistant", "content": record[side]}]
    line = "answers that repeat their prompt: 1 of 3 rows; the first is F:3 (id 'p2'): rejected"
    assert told(records) == [line]
    assert told(pairs(1, prompt="Hello!", chosen="Hello! I am here.")) == []  # a short one may


@pytest.mark.parametrize(
    "mark",
    ["<|im_end|>", "</s>", "<|eot_id|>", "<end_of_turn>", "[/INST]", "<|end of text|>", "<|user|>"],
)
def test_special_tokens_written_in_answers(told: Any, mark: str) -> None:
    records = pairs(3)
    records[1]["chosen"] += mark
    line = "special tokens written in answers: 1 of 3 rows; the first is F:2 (id 'p1'): "
    assert told(records) == [f"{line}{mark} in chosen"]


@pytest.mark.parametrize(
    "text",
    ["a <s>wrong</s> word", "x[0] < y", "a | b |> c", "<p>text</p>", "if a <| b then c |> d"],
)
def test_marks_that_are_no_special_tokens(told: Any, text: str) -> None:
    assert told(pairs(1, chosen=text)) == []


def test_one_same_answer_in_every_row(told: Any) -> None:
    same = pairs(6, chosen="I cannot help with that.")
    assert told(same) == ["one same chosen in all 6 rows: 'I cannot help with that.'"]
    assert told([*same, pairs(7)[6]]) == []
    assert told(pairs(6, rejected="no")) == ["one same rejected in all 6 rows: 'no'"]
    one_prompt = [p | {"prompt": "Q", "chosen": "yes"} for p in pairs(6)]
    assert told(one_prompt) == []  # one good answer to one question beside several bad ones


# Rows beside each other


def test_rows_that_repeat_or_contradict_earlier_ones(told: Any) -> None:
    one, two, three = pairs(3)
    flipped = one | {"id": "f", "chosen": one["rejected"], "rejected": one["chosen"]}
    assert told([one, two, flipped, two | {"id": "a"}, two | {"id": "b"}, three]) == [
        "pairs that contradict an earlier one, which prefers the other response: 1 of 6 pairs; "
        "the first is F:3 (id 'f'): the other is F:1",
        "rows that repeat an earlier one: 2 of 6 rows; the first is F:4 (id 'a'): it repeats F:2",
    ]


def test_a_turned_pair_is_compared_as_it_is_trained(told: Any) -> None:
    one = pairs(1)[0]
    same = {"id": "s", "prompt": one["prompt"], "chosen": "bad 0", "rejected": "good 0"}
    assert told([one, same | {"p_chosen": 0}])[1:] == [
        "rows that repeat an earlier one: 1 of 2 rows; the first is F:2 (id 's'): it repeats F:1"
    ]


def test_a_response_rated_in_two_ways(told: Any) -> None:
    record = {"prompt": "Q", "response": "a", "desirable": True}
    assert told([record, record | {"desirable": False}, record], UNPAIRED) == [
        "responses rated otherwise than in an earlier row: 1 of 3 rows; "
        "the first is F:2: the other is F:1",
        "rows that repeat an earlier one: 1 of 3 rows; the first is F:3: it repeats F:1",
    ]


def test_rows_of_a_file_that_is_read_twice_are_no_repeats(
    write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    path = write("a.jsonl", [*pairs(3, split="train"), pairs(4, split="test")[3]])
    load_examples(DataConfig(train=path, eval=path), PAIR, seed=0)
    load_examples(DataConfig(train={"path": path, "weight": 3}), PAIR, seed=0)
    assert caplog.messages == []


# Labels and weights


ORDER = "the order of chosen and rejected, followed,"
BETTER = ", where chosen counts as the better one"


@pytest.mark.parametrize(
    ("extra", "line"),
    [
        (
            {"score_chosen": 3, "score_rejected": 4.5},
            f"score_chosen below score_rejected{BETTER}: 3 and 4.5",
        ),
        (
            {"chosen_score": 3, "rejected_score": 4},
            f"chosen_score below rejected_score{BETTER}: 3 and 4",
        ),
        (
            {"chosen-rating": 2, "rejected-rating": 5},
            f"chosen-rating below rejected-rating{BETTER}: 2 and 5",
        ),
        (
            {"rank_chosen": 2, "rank_rejected": 1},
            f"rank_chosen above rank_rejected{BETTER}: 2 and 1",
        ),
        (
            {"score_chosen": 3, "score_rejected": 3},
            f"score_chosen equal to score_rejected{BETTER}: 3 and 3",
        ),
        (
            {"p_chosen": 0.25, "score_chosen": 5, "score_rejected": 1},
            f"score_chosen below score_rejected{BETTER}: 1 and 5",
        ),
        ({"label_0": 0, "label_1": 1}, f"{ORDER} against label_0 and label_1"),
        ({"winner": "rejected"}, f"{ORDER} against winner"),
        ({"tie": True, "p_chosen": 0.9}, "tie beside another p_chosen: 0.9"),
        (
            {"tie": True, "votes_chosen": 3, "votes_tie": 1},
            "tie beside votes for one of the two: 3 to 0, and 1 for a tie",
        ),
    ],
)
def test_what_contradicts_the_order_of_a_pair(told: Any, extra: dict[str, Any], line: str) -> None:
    records = pairs(4)
    records[2] |= extra
    what, colon, found = line.partition(":")
    lines = [text for text in told(records, ties="soft") if "turned round" not in text]
    assert lines == [f"{what}: 1 of 4 rows; the first is F:3 (id 'p2'){colon}{found}"]


@pytest.mark.parametrize(
    "extra",
    [
        {"score_chosen": 4, "score_rejected": 3, "rank_chosen": 1, "rank_rejected": 2},
        {"score_chosen": "high", "score_rejected": None},
        {"score_chosen": True, "score_rejected": False},
        {"tie": True, "score_chosen": 1, "score_rejected": 2},
        {"label_0": 1, "label_1": 0, "winner": "chosen"},
        {"winner": "model_b"},  # of a comparison that the pair was made from
        {"p_chosen": 0.25, "score_chosen": 1, "score_rejected": 5},  # turned: they agree
    ],
)
def test_what_agrees_with_the_order_of_a_pair(told: Any, extra: dict[str, Any]) -> None:
    lines = told([*pairs(2), pairs(3, **extra)[2]], ties="soft")
    assert [line for line in lines if "turned round" not in line] == []


@pytest.mark.parametrize(
    ("extra", "what"),
    [
        ({"winner": "a", "better_response_id": 1}, "winner, followed, against better_response_id"),
        (
            {"winner": "a", "label_a": 0, "label_b": 1},
            "winner, followed, against label_a and label_b",
        ),
        ({"winner": "b", "tie": True}, "winner, followed, against tie"),
        ({"winner": "a", "score_a": 1, "score_b": 2}, f"score_chosen below score_rejected{BETTER}"),
    ],
)
def test_what_contradicts_the_winner_of_a_comparison(
    told: Any, extra: dict[str, Any], what: str
) -> None:
    record = {"prompt": "Q", "response_a": "x", "response_b": "y", "winner": "a"}
    (line,) = told([record, {**record, "prompt": "R", **extra}], ties="soft")
    assert line.startswith(f"{what}: 1 of 2 rows; the first is F:2")


def test_ranks_and_ratings_that_contradict_each_other(told: Any) -> None:
    ranked = {"prompt": "Q", "responses": ["a", "b", "c"], "scores": [3, 2, 1], "ranks": [1, 2, 3]}
    (line,) = told([ranked, ranked | {"prompt": "R", "ranks": [1, 3, 2]}], LIST)
    assert line == "ranks in another order than the scores: 1 of 2 rows; the first is F:2"
    rated = {"prompt": "Q", "completion": "a", "label": True, "kto_tag": False}
    other = {"prompt": "R", "completion": "a", "label": False, "kto_tag": False}
    (line,) = told([rated, other], UNPAIRED)
    assert line == "label and kto_tag that differ: 1 of 2 rows; the first is F:1: True and False"


def test_labels_of_picture_comparisons(tmp_path: Path, write: Write) -> None:
    for i, name in enumerate("ab"):
        save(tmp_path / f"{name}.png", i)
    record = {"caption": "q", "image_0": "a.png", "image_1": "b.png", "label_0": 1, "label_1": 0}
    path = write("a.jsonl", [record, record | {"caption": "r", "winner": "image_1"}])
    *_, line = check_files([path]).warnings.lines()
    assert line.startswith(
        "label_0 and label_1, followed, against winner: 1 of 2 rows; the first is"
    )


def test_one_weight_far_above_the_median(told: Any) -> None:
    records = pairs(5, weight=2)
    records[3]["weight"] = 201
    assert told(records) == [
        "weights above 100 times the median of 2: 1 of 5 rows; the highest is 201 at F:4"
    ]
    records[3]["weight"] = 200
    assert told(records) == []


def test_places_are_listed_where_they_are_asked_for(write: Write) -> None:
    records = [p | {"chosen": p["chosen"] + "</s>"} for p in pairs(6)]
    path = write("a.jsonl", records)
    line = f"special tokens written in answers: 6 of 6 rows; the first is {path}:1 (id 'p0'): "
    report = check_files([path])
    assert report.warnings.lines() == [f"{line}</s> in chosen"]
    assert f"  {line}</s> in chosen; then 2, 3, ...\n" in report.text(show=2) + "\n"


def test_soft_labels_that_an_objective_does_not_read(
    write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    records = [
        *pairs(3),
        *pairs(5, p_chosen=0.75)[3:],
        *pairs(7, votes_chosen=1, votes_rejected=2)[5:],
    ]
    config = DataConfig(train=write("a.jsonl", records))
    expected = "4 of 7 pairs carry soft labels"
    for needs in (PAIR, UNPAIRED, Needs("any", 1, labels=True)):
        caplog.clear()
        load_examples(config, needs, seed=0)
        assert sum(message.startswith(expected) for message in caplog.messages) == 1
    caplog.clear()
    load_examples(config, Needs(labels=True), seed=0)
    load_examples(DataConfig(train=write("b.jsonl", pairs(3))), PAIR, seed=0)
    assert "soft labels" not in caplog.text


# What nothing can be learned from


def test_rows_without_any_weight_are_refused(write: Write) -> None:
    path = write("a.jsonl", pairs(3, weight=0))
    rows, _ = load_examples(DataConfig(train=path), PAIR, seed=0)
    with pytest.raises(DataError, match=r"a\.jsonl: the weight of all 3 rows is 0"):
        check_trainable(rows, PAIR, "a.jsonl")
    report = check_files([path])
    assert report.exit_code == 1
    assert report.problems.lines() == [f"{path}: the weight of all rows is 0."]
    one = [*pairs(2, weight=0), pairs(3)[2]]
    rows, _ = load_examples(DataConfig(train=write("b.jsonl", one)), PAIR, seed=0)
    check_trainable(rows, PAIR, "a.jsonl")


@pytest.mark.parametrize("desirable", [True, False])
def test_responses_of_one_rating_are_refused(write: Write, desirable: bool) -> None:
    records = [{"prompt": f"Q{i}", "response": f"a{i}", "desirable": desirable} for i in range(3)]
    config = DataConfig(train=write("a.jsonl", records))
    rows, _ = load_examples(config, UNPAIRED, seed=0)
    with pytest.raises(DataError, match="learns from the difference to") as error:
        check_trainable(rows, UNPAIRED, "a.jsonl")
    assert ("or use sft" in str(error.value)) == desirable
    records[1]["desirable"] = not desirable
    rows, _ = load_examples(DataConfig(train=write("b.jsonl", records)), UNPAIRED, seed=0)
    check_trainable(rows, UNPAIRED, "a.jsonl")


def test_both_answers_of_a_row_are_one_row(told: Any) -> None:
    row = {"prompt": QUESTION, "chosen": f"{QUESTION} a</s>", "rejected": f"{QUESTION} b</s>"}
    lines = told([row, {"prompt": "p", "chosen": "c", "rejected": "r"}])
    assert [line.partition(";")[0] for line in lines] == [
        "answers that repeat their prompt: 1 of 2 rows",
        "special tokens written in answers: 1 of 2 rows",
    ]


def test_answers_with_prompts_of_their_own_have_no_one_prompt(told: Any) -> None:
    """DCPO's rows: the row's own prompt is empty, and each side has another one."""
    own = [
        {
            "prompt_chosen": f"a cat {i}",
            "prompt_rejected": f"a dog {i}",
            "chosen": f"yes, number {i}",
            "rejected": f"no {i}.",
        }
        for i in range(6)
    ]
    assert not [line for line in told(own) if "one same prompt" in line]
