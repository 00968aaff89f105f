"""What the text demonstration measures about an answer, and over all answers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

SHORT = 40  # tokens, end token included, within which an answer should have ended


@dataclass(frozen=True, slots=True)
class Answer:
    """One greedy answer to a held-out prompt."""

    prompt: str
    text: str
    words: int
    ended: bool  # by its own end token, within SHORT tokens
    one_sentence: bool  # at most one
    keyword: bool  # the record's pattern occurs: a crude check of content, not of truth


def measure(prompt: str, text: str, num_tokens: int, keyword: str) -> Answer:
    """Judge an answer of `num_tokens` tokens (without the end token)."""
    return Answer(
        prompt=prompt,
        text=text,
        words=len(text.split()),
        ended=num_tokens < SHORT,
        one_sentence=len(re.findall(r"(?<![.!?])[.!?]++(?=\s|$)", text)) <= 1,
        keyword=re.search(keyword, text.lower()) is not None,
    )


def summary(answers: Sequence[Answer]) -> dict[str, float]:
    """Means over answers; shares are between 0 and 1."""
    count = len(answers)
    return {
        "words": sum(a.words for a in answers) / count,
        "ended_within_40_tokens": sum(a.ended for a in answers) / count,
        "one_sentence": sum(a.one_sentence for a in answers) / count,
        "keyword": sum(a.keyword for a in answers) / count,
    }
