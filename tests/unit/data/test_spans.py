"""Spans by <MASK> tags against the ids that RRPO's released code reads from them.

The golden cases are token ids: 100 opens a span, 101 closes one, 150 is a lone space that the
released parser drops beside a tag. Written with one character for each other id they are tagged
texts, and the spans of characters must hold exactly the ids of the spans of tokens.
"""

from __future__ import annotations

from typing import Any

import pytest
from goldens import load

from mmalign.data.parse import untag

CASES = load("video")["mask_tags"]["cases"]
MARKS = {100: "<MASK>", 101: "</MASK>", 150: " "}


def written(ids: list[int]) -> str:
    return "".join(MARKS.get(number, chr(0x4E00 + number)) for number in ids)


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_characters_are_in_the_span_that_their_token_is_in(case: dict[str, Any]) -> None:
    plain = written(case["ids"])
    text, spans = untag(written(case["ids_with_tags"]), plain)
    assert text == plain
    ids = [0] * len(plain)
    for number, (start, end) in enumerate(spans, start=1):
        ids[start:end] = [number] * (end - start)
    assert ids == case["span_ids"]


def test_a_text_that_is_one_span_keeps_it() -> None:
    """Not reproduced: the released loss takes its smallest id, here 1, for "no span"."""
    assert untag("<MASK> a red disc </MASK>", "a red disc") == ("a red disc", ((0, 10),))


def test_other_words_are_not_the_plain_text() -> None:
    """Not reproduced: the released code keeps such a pair where the words differ in one span."""
    text, _ = untag("A <MASK> green </MASK> disc.", "A red disc.")
    assert text == "A green disc."
