"""What a converter leaves in answers is told, and what people write is not."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest

from mmalign.data.doubts import bare, of_a_converter, role_before, same_words, special_mark
from mmalign.data.example import Candidate, Message
from mmalign.data.validate import check_files

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Write = Callable[[str, list[dict[str, Any]]], Path]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("It rains.", "it rains", True),
        ("**It** rains!", "It rains", True),
        ("\u201cIt rains\u201d\u200b", "It rains.", True),
        ("3.5", "35", False),
        ("-1", "1", False),
        ("a - b", "a + b", False),
        ("f(x)", "fx", False),
        ("2*3", "23", False),
        ("See it", "Sea it", False),
        ("...", "!", True),
        ("It rains. Snow", "it rains", False),
        ("caf\u00e9", "cafe\u200b\u0301.", True),
    ],
)
def test_words_without_the_marks_around_them(one: str, other: str, same: bool) -> None:
    assert (bare(one) == bare(other)) is same
    assert same_words(one, other) is same_words(other, one) is (same and bare(one) != "")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("nan", True),
        (" NULL ", True),
        ("None", False),  # which may well be the answer
        ("Well.\n\nHuman: And then?", True),
        ("Human: it is a word.", False),
        ("The human: a study", False),
    ],
)
def test_what_no_person_wrote(text: str, told: bool) -> None:
    assert bool(of_a_converter(Candidate(text))) is told
    turns = (Message("assistant", text),)
    assert bool(of_a_converter(Candidate(turns))) is told


def test_roles_and_special_tokens() -> None:
    assert role_before(Candidate("Assistant: yes")) == "Assistant:"
    assert role_before(Candidate("The assistant: yes")) == ""
    assert special_mark(Candidate("yes<|im_end|>")) == "<|im_end|>"
    assert special_mark(Candidate("This is <s>struck out</s>, as HTML has it")) == ""


def rows(**columns: Any) -> list[dict[str, Any]]:
    made = [
        {"prompt": f"Question {i}?", "chosen": f"Yes, {i}.", "rejected": f"No, {i + 1}."}
        for i in range(6)
    ]
    return [{**row, **{k: v(row) for k, v in columns.items()}} for row in made]


@pytest.mark.parametrize(
    ("made", "line"),
    [
        (rows(), ""),
        (rows(chosen=lambda r: f"Assistant: {r['chosen']}"), "answers that begin with a role"),
        (rows(rejected=lambda r: r["chosen"].rstrip(".")), "but for punctuation and marks"),
        (
            rows(rejected=lambda r: "nan"),
            "nothing but an empty cell of a table: 6 of",
        ),
        (rows(prompt=lambda r: "Hello"), "one same prompt in all 6 rows: 'Hello'"),
        (rows(weight=lambda r: float("3" in r["prompt"])), "rows of weight 0, .*: 5 of 6"),
    ],
)
def test_a_check_says_so_with_a_count(made: list[dict[str, Any]], line: str, write: Write) -> None:
    found = check_files([write("a.jsonl", made)]).warnings.lines()
    assert any(re.search(line, said) for said in found) if line else found == []
