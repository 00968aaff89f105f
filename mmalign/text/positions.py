"""Character ranges of a response to token positions."""

from __future__ import annotations

import re
from bisect import bisect_right
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    Range = tuple[int, int]

_LINE = re.compile(r"(?:\A\n*+)?[^\n]++\n*+")


def mark_spans(offsets: Sequence[Range], spans: Sequence[Range]) -> list[bool]:
    """Which tokens overlap a span.

    Args:
        offsets: Character range [start, end) of each token in the response; negative before it.
        spans: Character ranges [start, end) in the same response.
    """
    if not spans:
        return [False] * len(offsets)
    return [any(start < last and first < end for first, last in spans) for start, end in offsets]


def mark_ranges(offsets: Sequence[Range], ranges: Sequence[Range]) -> list[bool]:
    """Which tokens lie in one of some ranges, by their last character.

    A token that is no text (an end token put after it) belongs to the range that ends there.

    Args:
        offsets: Character range [start, end) of each token.
        ranges: Character ranges [start, end), in order.
    """
    return [
        any(first < end <= last or (start == end == last) for first, last in ranges)
        for start, end in offsets
    ]


def mark_steps(offsets: Sequence[Range], steps: Sequence[Range], text: str) -> list[int]:
    """The reasoning step of each token, from 1.

    A token belongs to the step that holds its last character, and one after the text (the end
    token) to the last step. What lies between two given steps belongs to the one before; 0 is
    before all of them.

    Args:
        offsets: Character range of each token in the response.
        steps: Character ranges of the steps, in order; empty means one step for each line of text,
            with the line breaks that follow it.
        text: The response.
    """
    starts = sorted(start for start, _ in steps) or [m.start() for m in _LINE.finditer(text)]
    return [bisect_right(starts, max(end - 1, start)) for start, end in offsets]
