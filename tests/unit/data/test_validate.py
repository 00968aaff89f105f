"""`mmalign data check` and `convert`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data_rows import Write, pairs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmalign.data.parse import KIND_KEYS, OPTIONAL, read_record
from mmalign.data.records import convert_file, read_records
from mmalign.data.validate import Report, check_files
from mmalign.errors import DataError


def found(report: Report) -> list[str]:
    return report.problems.lines() + report.warnings.lines()


def test_a_good_file(write: Write) -> None:
    report = check_files([write("a.jsonl", pairs(3))])
    assert (report.exit_code, found(report), report.num_records) == (0, [], 3)


def test_every_problem_in_one_pass(write: Write) -> None:
    records: list[Any] = [
        *pairs(2),
        {"id": "p0", "prompt": "Q", "chosen": "a", "rejected": "a"},
        "{oops",
        {"text": "what?"},
        {"prompt": "Q", "chosen": "b", "rejected": "c", "spans_chosen": [[0, 9]], "weight": -1},
        {"prompt": "Q", "responses": ["d", "e"], "scores": [1, 2]},
        {"prompt": "R", "responses": ["d", "e"], "scores": [1, 2]},
        {"prompt": "Q", "responses": ["d", "e", "f"], "scores": [1, 2, 3]},
    ]
    path = write("a.jsonl", records)
    report = check_files([path])
    lines = report.problems.lines()
    for line, part in (
        (3, "chosen equals rejected"),
        (3, "the id is not unique"),
        (4, "not JSON"),
        (5, "no layout has the columns text"),
        (6, "spans_chosen must lie inside the response"),
        (6, "weight must be"),
        (9, "all lists must have the same length, which is mostly 2 here"),
    ):
        assert [x for x in lines if x.startswith(f"{path}:{line}") and part in x], (line, part)
    assert len(lines) == 7
    assert (report.exit_code, report.problems.num_records) == (1, 5)


def test_similar_problems_are_counted(write: Write) -> None:
    path = write("a.jsonl", [r | {"chosen": ""} for r in pairs(30)])
    assert check_files([path]).problems.lines(show=3) == [
        f"{path}:1 (id 'p0'): chosen is empty. 29 more have the same problem: 2, 3, 4, ..."
    ]


def test_repeats_and_contradictions_are_warnings(write: Write) -> None:
    one, two = pairs(2)
    flipped = one | {"id": "f", "chosen": one["rejected"], "rejected": one["chosen"]}
    again = two | {"id": "a", "prompt": f" {two['prompt'].title()} "}
    path = write("a.jsonl", [one, two, flipped, again])
    report = check_files([path])
    assert report.exit_code == 0
    assert report.warnings.lines() == [
        "pairs that contradict an earlier one, which prefers the other response: 1 of 4 pairs; "
        f"the first is {path}:3 (id 'f'): the other is {path}:1",
        "rows that repeat an earlier one: 1 of 4 rows; "
        f"the first is {path}:4 (id 'a'): it repeats {path}:2",
    ]


def test_leakage_from_train_to_eval(write: Write) -> None:
    rows = pairs(3)
    same_prompt = rows[0] | {"id": "x", "chosen": "fresh", "rejected": "other"}
    report = check_files(
        [write("a.jsonl", rows)], eval_paths=[write("b.jsonl", [same_prompt, rows[1]])]
    )
    assert [line.partition(";")[0] for line in report.warnings.lines()] == [
        "1 of 2 evaluation rows have a prompt that is also trained on",
        "1 of 2 evaluation rows have a prompt that is also trained on, with its responses",
    ]
    assert report.splits == {"train": 3, "eval": 2}


def test_statistics(write: Write) -> None:
    tie = {"prompt": "T", "chosen": "x y", "rejected": "z", "tie": True}
    kto = [{"prompt": "K", "response": f"r{i}", "desirable": i == 0} for i in range(3)]
    ranked = {"prompt": "L", "responses": ["d", "e"], "scores": [1, 2]}
    plain = {"prompt": "P", "response": "one two three"}
    soft = pairs(1, p_chosen=0.6)[0] | {"id": "s", "prompt": "soft"}
    report = check_files([write("a.jsonl", [*pairs(2), soft, tie, *kto, ranked, plain])])
    assert report.kinds == {"pair": 4, "unpaired": 3, "list": 1, "plain": 1}
    assert report.labels == {
        "hard": 2,
        "soft": 1,
        "ties": 1,
        "desirable": 1,
        "undesirable": 2,
        "lists of 2": 1,
        "unrated": 1,
    }
    assert report.lengths["chosen"] == [(6, 2), (6, 2), (6, 2), (3, 2)]
    assert report.lengths["response"][-1] == (13, 3)
    text = report.text()
    assert "9 records" in text
    assert "chosen is the longer one in 100% of the pairs" in text
    assert text.endswith("no problems\nno warnings")


def test_a_missing_file_is_a_problem_among_others(write: Write, tmp_path: Path) -> None:
    good = write("a.jsonl", pairs(1))
    report = check_files([str(tmp_path / "none.jsonl"), good])
    assert (report.exit_code, report.num_records) == (1, 1)
    assert "there is no such file" in report.text()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
LAYOUT_COLUMNS = """
completions completion label votes_a votes_b response_a response_b response_0 response_1 winner
ranks messages conversations instruction input output history system query rejected_response
rejected_messages kto_tag better_response_id other
"""
KEYS = st.sampled_from([*KIND_KEYS, *OPTIONAL, *LAYOUT_COLUMNS.split()])
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {}, optional={"role": JSON, "content": JSON, "from": st.just("gpt"), "value": JSON}
    ),
    max_size=3,
)
TRANSCRIPT = st.lists(st.sampled_from(["\n\nHuman:", "\n\nAssistant:", " hi", "\n"])).map("".join)
RECORD = st.dictionaries(KEYS, JSON | MESSAGES | TRANSCRIPT | st.text(), max_size=6)


@pytest.mark.parametrize("count", [60, pytest.param(400, marks=pytest.mark.slow)])
def test_checking_never_raises_whatever_the_records(count: int, tmp_path: Path) -> None:
    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))
    @given(records=st.lists(RECORD, min_size=1, max_size=3))
    def each(records: list[dict[str, Any]]) -> None:
        checked(tmp_path / "a.jsonl", records)

    each()


def checked(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("\n".join(json.dumps(r) for r in records), encoding="utf-8")
    report = check_files([path])
    assert report.num_records == len(records)
    if report.exit_code == 0:
        assert report.kinds.total() == len(records)
    assert report.text(show=1)


@pytest.mark.parametrize("count", [60, pytest.param(300, marks=pytest.mark.slow)])
def test_parsing_raw_records_never_raises(count: int) -> None:
    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))
    @given(record=RECORD)
    def each(record: dict[str, Any]) -> None:
        example, problems = read_record(record, where="f:1")
        assert (example is None) == bool(problems)

    each()


def test_convert_writes_the_canonical_layout(write: Write, tmp_path: Path) -> None:
    raw = {"instruction": "Q", "input": "", "chosen": "a", "rejected": "b", "source": "x"}
    target = tmp_path / "out" / "c.jsonl"
    assert convert_file(write("a.jsonl", [raw]), target) == (1, 0)
    assert json.loads(target.read_text()) == {
        "source": "x",
        "prompt": "Q",
        "chosen": "a",
        "rejected": "b",
    }
    once = [r.example for r in read_records(target)]
    assert convert_file(target, tmp_path / "out" / "c.jsonl") == (1, 0)
    assert [r.example for r in read_records(target)] == once
    assert [p.name for p in target.parent.iterdir()] == ["c.jsonl"]


def test_convert_writes_nothing_when_there_are_problems(write: Write, tmp_path: Path) -> None:
    path = write("a.jsonl", [*pairs(2), {"prompt": "Q"}])
    target = tmp_path / "c.jsonl"
    with pytest.raises(DataError, match="no layout has the columns prompt"):
        convert_file(path, target)
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]
    assert convert_file(path, target, drop_bad=True) == (2, 1)
    with pytest.raises(DataError, match="holds no records that can be used"):
        convert_file(write("b.jsonl", [{"prompt": "Q"}]), target, drop_bad=True)
    assert len(target.read_text().splitlines()) == 2


@pytest.mark.parametrize("name", ["hh_harmless_pairs", "pandalm_human_pairs", "direct_answers"])
def test_real_files_have_no_problems(shared_data: Path, name: str) -> None:
    report = check_files([shared_data / "text" / f"{name}.jsonl"])
    assert report.exit_code == 0
    assert not any("evaluation" in line for line in report.warnings.lines())


def test_a_file_that_cannot_be_read_is_named_once(tmp_path: Path) -> None:
    (tmp_path / "random.parquet").write_bytes(b"\x00\x01" * 50)
    for name in ("random.parquet", "absent.jsonl"):
        told = check_files([tmp_path / name]).text()
        assert told.count(f"{tmp_path / name}: ") == 2, "its heading and its problem"
        assert "\nproblems:\n" in told
        assert ".." not in told


def test_a_file_without_records_is_a_problem(write: Write) -> None:
    path = write("a.jsonl", [])
    assert check_files([path]).problems.lines() == [f"{path}: holds no records."]
