"""What nothing reads is named once for each file, the same before a run and in a check."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from data_rows import PAIR, Write, pairs

from mmalign.config import DataConfig
from mmalign.data import check_files, load_examples, to_record
from mmalign.data.convert import meant
from mmalign.data.layouts import is_bookkeeping
from mmalign.data.records import read_records
from mmalign.errors import DataError


def told(path: str, caplog: pytest.LogCaptureFixture) -> tuple[list[str], list[str], str]:
    """Warnings and information before a run, and the report of a check."""
    with caplog.at_level(logging.INFO, "mmalign.data"):
        load_examples(DataConfig.model_validate({"train": path}), PAIR, seed=0)
    lines = {
        level: [r.getMessage() for r in caplog.records if r.levelno == level]
        for level in (logging.WARNING, logging.INFO)
    }
    return lines[logging.WARNING], lines[logging.INFO], check_files([path]).text()


def test_a_slip_is_a_warning_with_what_was_meant(
    write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [row | {"vidoe": "a.mp4"} for row in pairs(3)] + [
        {"prompt": "p", "chosen": "c", "rejected": "r", "my_column": 1, "sytem": "S", "source": "s"}
    ]
    path = write("a.jsonl", rows)
    warnings, notes, report = told(path, caplog)
    line = (
        f"{path}: read by nothing: vidoe (3 rows; did you mean video?), my_column (1 row), "
        "sytem (1 row; did you mean system?)"
    )
    note = f"{path}: kept and not read: source (1 row)"
    assert warnings == [line]
    assert note in notes
    assert line in report
    assert note in report


def test_bookkeeping_alone_is_no_warning(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    extra = {"source": "web", "prompt_id": "x", "chosen_model": "m", "score_chosen": 2.0}
    warnings, notes, report = told(write("a.jsonl", pairs(2, **extra)), caplog)
    assert warnings == []
    assert sum("kept and not read" in note for note in notes) == 1
    assert "no warnings" in report


def test_a_file_without_more_is_not_named(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    extra = {"tools": [], "system": "S", "weight": 1.0, "meta": {"mine": 1}}
    warnings, notes, report = told(write("a.jsonl", pairs(2, **extra)), caplog)
    assert warnings == []
    assert not any("read" in note for note in notes)
    assert "read by nothing" not in report


def unread(write: Write, row: dict[str, Any]) -> set[str]:
    (record,) = read_records(write("a.jsonl", [row]))
    assert record.example is not None, record.problems
    return set(record.unread)


USER, BOT = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "a"}
ANSWERS = {"chosen": [USER, BOT], "rejected": [USER, BOT | {"content": "b"}]}


def test_keys_of_messages_and_of_listed_answers(write: Write) -> None:
    asked = USER | {"timestamp": 1, "loss": False, "name": "Ann"}
    row = {"prompt": [asked], "chosen": [BOT | {"reasoning_contnet": "r"}], "rejected": "b"}
    expected = {"timestamp of messages", "loss of messages", "reasoning_contnet of messages"}
    assert unread(write, row) == expected
    assert meant("reasoning_contnet of messages") == "reasoning_content"
    listed = [{"response": t, "score": i, "critique": "c"} for i, t in enumerate("ab")]
    row = {"prompt": "Q", "responses": listed}
    assert unread(write, row) == {"critique of responses"}


def test_what_the_conversation_says_already_is_not_named(write: Write) -> None:
    assert unread(write, {**ANSWERS, "question": "Q", "messages": [USER, BOT]}) == set()
    assert unread(write, {**ANSWERS, "question": "another"}) == {"question"}


def test_a_column_that_steps_aside_is_named(write: Write) -> None:
    assert unread(write, {**ANSWERS, "response": "c"}) == {"response"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vidoe", "video"), ("choosen", "chosen"), ("promt", "prompt"), ("rejectd", "rejected"),
        ("sytem", "system"), ("tols", "tools"), ("rejected_respons", "rejected_response"),
        ("source", ""), ("foo", ""), ("prompt_id", ""), ("question", ""),
    ],
)  # fmt: skip
def test_names_that_are_nearly_a_key(name: str, expected: str) -> None:
    assert meant(name) == expected


@pytest.mark.parametrize(
    "name", ["id", "prompt_id", "modelA", "score_chosen", "chosen-rating", "num_turns", "", "__x__"]
)
def test_bookkeeping(name: str) -> None:
    assert is_bookkeeping(name)


@pytest.mark.parametrize("name", ["question", "source_text", "foo", "model_answer", "note"])
def test_no_bookkeeping(name: str) -> None:
    assert not is_bookkeeping(name)


def test_a_slip_of_what_a_row_needs_is_told_in_its_error() -> None:
    with pytest.raises(DataError, match="Did you mean chosen by choosen"):
        to_record({"prompt": "Q", "choosen": "a", "reject": "b"})


def test_control_characters_do_not_reach_the_terminal(write: Write) -> None:
    name = "\x1b]0;title\x07"
    good = check_files([write("a.jsonl", pairs(2, **{name: 1}))]).text()
    bad = check_files([write("b.jsonl", [{name: 1}, {"prompt": "Q", name: 2}])]).text()
    for text in (good, bad):
        assert r"\x1b]0;title\x07" in text
        assert text.replace("\n", "").isprintable()


def test_half_of_a_surrogate_pair_is_a_problem_of_its_line(write: Write) -> None:
    line = r'{"id": "\ud8000", "prompt": "Q", "chosen": "a", "rejected": "b"}'
    good, bad = read_records(write("a.jsonl", [line.replace("\\ud8000", "\\ud83d\\ude00"), line]))
    assert good.id == "\U0001f600"
    assert "half of a surrogate pair" in str(bad.problems[0])


def test_what_is_there_and_empty_is_not_named(
    write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [row | {"context": " ", "steps_of": [], "other": {}} for row in pairs(3)]
    assert told(write("a.jsonl", rows), caplog)[:2] == ([], [])


@pytest.mark.parametrize(
    "name", ["score_ratio", "seconds_difference", "created_at_utc_A", "response_0_sha256", "level"]
)
def test_measures_of_public_files_are_bookkeeping(name: str) -> None:
    assert is_bookkeeping(name)
