"""Labels that prefer `rejected`: the pair is turned round, whole, before anything reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data_rows import ANY, PAIR, UNPAIRED, Write, pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from picture_files import save

from mmalign.config import DataConfig
from mmalign.data import Example, load_examples, parse_record, to_record
from mmalign.data.example import in_order, prefers_rejected
from mmalign.data.records import convert_file, read_records
from mmalign.data.select import fit
from mmalign.data.validate import check_files
from mmalign.errors import DataError

AGAINST: list[tuple[dict[str, Any], str, float]] = [
    ({"votes_chosen": 0, "votes_rejected": 3}, "votes", 1.0),
    ({"votes_chosen": 1, "votes_rejected": 2, "votes_tie": 1}, "votes", 0.625),
    ({"votes_rejected": 2}, "votes", 1.0),
    ({"p_chosen": 0.25}, "p_chosen", 0.75),
    ({"p_chosen": 0}, "p_chosen", 1.0),
    ({"agreement": 0.125}, "agreement", 0.875),
    ({"p_chosen": 0.25, "votes_chosen": 1, "votes_rejected": 3}, "votes", 0.75),
]


def responses(row: Example) -> list[Any]:
    return [candidate.response for candidate in row.candidates]


@pytest.mark.parametrize(("labels", "which", "p"), AGAINST)
def test_a_pair_whose_labels_prefer_rejected_is_turned_round(
    labels: dict[str, Any], which: str, p: float
) -> None:
    record = pairs(1)[0] | labels
    assert prefers_rejected(record) == which
    row = parse_record(record, where="f:1")
    assert (responses(row), row.labels) == (["bad 0", "good 0"], (p, 1 - p))


@pytest.mark.parametrize(
    "labels",
    [
        {},
        {"votes_chosen": 2, "votes_rejected": 2},
        {"votes_chosen": 2, "votes_rejected": 1},
        {"p_chosen": 0.5},
        {"p_chosen": 0.75},
        {"tie": True, "votes_chosen": 0, "votes_rejected": 1, "votes_tie": 2},
        {"label_chosen": 2, "label_rejected": 1},
        {"score_chosen": 1, "score_rejected": 2},  # scores are compared, and not followed
    ],
)
def test_others_stay_as_they_are(labels: dict[str, Any]) -> None:
    record = pairs(1)[0] | labels
    assert in_order(record) is record
    assert responses(parse_record(record, where="f:1")) == ["good 0", "bad 0"]


def test_graded_labels_order_a_pair_too() -> None:
    record = pairs(1, label_chosen=0.2, label_rejected=0.7)[0]
    row = parse_record(record, where="f:1")
    assert (responses(row), row.labels) == (["bad 0", "good 0"], (0.7, 0.2))


def test_all_that_belongs_to_a_side_goes_with_it(tmp_path: Path) -> None:
    for i, name in enumerate(("row", "other", "noise")):
        save(tmp_path / f"{name}.png", i)
    record = {
        "prompt_chosen": "asked one",
        "prompt_rejected": "asked two",
        "chosen": "a first answer",
        "rejected": "a second answer",
        "spans_chosen": [[0, 1]],
        "spans_rejected": [[2, 8]],
        "steps_chosen": [[0, 7]],
        "rejected_masked": None,
        "chosen_cut": True,
        "image": "row.png",
        "image_rejected": "other.png",
        "image_corrupted": "noise.png",
        "rejected_irrelevant": "about something else",
        "score_chosen": 3,
        "score_rejected": 4,
        "p_chosen": 0.2,
    }
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record) + "\n")
    (found,) = read_records(path)
    row = found.example
    assert row is not None
    better, worse, *extra = row.candidates
    assert (better.response, better.prompt, better.spans, better.steps, better.complete) == (
        ("a second answer", "asked two", ((2, 8),), (), True)
    )
    assert (worse.response, worse.prompt, worse.spans, worse.steps, worse.complete) == (
        ("a first answer", "asked one", ((0, 1),), ((0, 7),), False)
    )
    assert better.media is not None
    assert [image.path.name for image in better.media.images] == ["other.png"]
    assert worse.media is None
    # A corrupted image is shown with the better response; a third response stays what it is.
    shown = {c.role: (c.response, c.media and c.media.images[0].path.name) for c in extra}
    assert shown == {
        "rejected_irrelevant": ("about something else", None),
        "corrupted": ("a second answer", "noise.png"),
    }
    assert row.labels[:2] == (0.8, pytest.approx(0.2))
    assert (found.value["score_chosen"], found.value["score_rejected"]) == (4, 3)
    assert found.turned == "p_chosen"


def test_every_objective_sees_the_turned_order(write: Write) -> None:
    config = DataConfig(train=write("a.jsonl", pairs(1, votes_chosen=0, votes_rejected=3)))
    (pair,), _ = load_examples(config, PAIR, seed=0)
    (plain,), _ = load_examples(config, ANY, seed=0)
    singles, _ = load_examples(config, UNPAIRED, seed=0)
    assert (responses(pair), responses(plain)) == (["bad 0", "good 0"], ["bad 0"])
    assert [(responses(row), row.labels) for row in singles] == [
        (["bad 0"], (1.0,)),
        (["good 0"], (0.0,)),
    ]


def test_swap_exchanges_what_was_turned(write: Write) -> None:
    config = DataConfig(train=write("a.jsonl", pairs(1, p_chosen=0)), swap=True)
    (row,), _ = load_examples(config, PAIR, seed=0)
    assert responses(row) == ["good 0", "bad 0"]


def test_turned_pairs_are_counted_for_each_file(
    write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    against = [
        p | {"id": f"x{p['id']}", "prompt": f"x {p['prompt']}"} for p in pairs(3, p_chosen=0)
    ]
    files = [
        write("a.jsonl", [*pairs(4), *against]),
        write("b.jsonl", pairs(2, votes_chosen=1, votes_rejected=2, prompt="other")),
        write("c.jsonl", pairs(2, prompt="third")),
    ]
    told = [
        f"3 of 7 pairs of {files[0]} were turned round: their p_chosen prefers `rejected`",
        f"2 of 2 pairs of {files[1]} were turned round: their votes prefer `rejected`",
    ]
    assert check_files(files).warnings.lines()[:2] == told
    load_examples(DataConfig(train=files), PAIR, seed=0)
    assert caplog.messages[:2] == told


@pytest.mark.parametrize("ends", ["ab", "01", "12"])
def test_votes_of_a_comparison_count_for_more_than_its_winner(write: Write, ends: str) -> None:
    one, other = (f"response_{end}" for end in ends)
    record = {"prompt": "Q", one: "x", other: "y", "winner": one}
    votes = {f"votes_{ends[0]}": 1, f"votes_{ends[1]}": 4}
    (found,) = read_records(write("a.jsonl", [record | votes]))
    assert found.example is not None
    assert (responses(found.example), found.turned) == (["y", "x"], "votes")
    (agreeing,) = read_records(write("b.jsonl", [record | votes | {"winner": other}]))
    assert agreeing.example is not None
    assert (responses(agreeing.example), agreeing.turned) == (["y", "x"], "")


def test_a_converted_file_is_in_order(write: Write, tmp_path: Path) -> None:
    source = write("a.jsonl", pairs(1, p_chosen=0.25, rejected_cut=True))
    target = tmp_path / "b.jsonl"
    convert_file(source, target)
    assert json.loads(target.read_text()) == {
        "id": "p0",
        "prompt": "question 0",
        "chosen": "bad 0",
        "rejected": "good 0",
        "p_chosen": 0.75,
        "chosen_cut": True,
    }
    before, after = (next(read_records(path)).example for path in (source, target))
    assert before == after


def test_a_problem_names_the_key_of_the_file(write: Write) -> None:
    record = pairs(1, p_chosen=0.1, rejected=" ", spans_chosen=[[0, 99]])[0]
    (found,) = read_records(write("a.jsonl", [record]))
    assert [problem.what for problem in found.problems] == [
        "spans_chosen must lie inside the response",
        "rejected is empty",
    ]


ODD = st.none() | st.booleans() | st.text(max_size=3) | st.floats() | st.integers(-3, 3)
KEYS = ("p_chosen", "agreement", "votes_chosen", "votes_rejected", "votes_tie", "tie")
GRADES = ("label_chosen", "label_rejected", "score_chosen", "score_rejected", "winner", "label_0")


@settings(deadline=None)
@given(labels=st.dictionaries(st.sampled_from([*KEYS, *GRADES]), ODD, max_size=5))
def test_odd_labels_are_problems_or_an_order(labels: dict[str, Any]) -> None:
    """Whatever the labels are: a problem, or the better response first."""
    record = pairs(1)[0] | labels
    ordered = in_order(record)
    assert in_order(ordered) is ordered
    try:
        row = parse_record(record, where="f:1")
    except DataError:
        return
    assert row.labels[0] >= row.labels[1]
    assert set(responses(row)) == {"good 0", "bad 0"}
    assert fit([row], PAIR, ties="soft")


@pytest.mark.parametrize(("winner", "chosen"), [("B", "b"), ("Model_A", "a"), ("Tie", "a")])
def test_capitals_of_a_winner(winner: str, chosen: str) -> None:
    record = to_record({"prompt": "p", "response_a": "a", "response_b": "b", "winner": winner})
    assert record["chosen"] == chosen
    assert record.get("tie") == (True if winner == "Tie" else None)


def test_a_rating_is_named_by_its_column() -> None:
    row = {"prompt": "p", "completion": "c"}
    with pytest.raises(DataError, match="label must be true or false, but is -1"):
        to_record(row | {"label": -1})
    with pytest.raises(DataError, match="kto_tag must be true or false, but is 'no'"):
        to_record({"instruction": "p", "output": "c", "kto_tag": "no"})
