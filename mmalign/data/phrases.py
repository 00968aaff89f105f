"""The phrases in which two answers differ, as character ranges: spans without an outside model."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from mmalign.data.blocks import opcodes
from mmalign.data.words import BORDER, listed, polarity, words

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmalign.data.words import Word

Range = tuple[int, int]
Block = tuple[int, int, int, int]  # words [a, b) of the one text stand for [c, d) of the other
Side = tuple[str, "Sequence[Word]"]

_LINKS = frozenset(listed("a an the of to in on at by for with his her their its"))
_MOST_LINKS = 2


def differing_phrases(chosen: str, rejected: str) -> tuple[tuple[Range, ...], tuple[Range, ...]]:
    """What stands in each other's place in two answers, in whole words.

    1. Where one begins with yes and the other with no, these words alone are the spans.
    2. Words are compared without case, punctuation and forms of numbers ("two" is "2"). Words that
       replace others are a span on both sides; words that only one side has are none, as nothing
       stands against them, unless they deny ("not", "never"): then the word after them, or the one
       before where none follows, is in the span on both sides.
    3. Spans with at most two articles or prepositions between them, and no punctuation, are one.
    4. Words such as "the", "is" and "of" at a span's ends are left out, unless there is no other.

    Args:
        chosen: The right answer.
        rejected: The wrong one.

    Returns:
        Ranges [start, end) of each; as many on either side, those of a place under one number.
    """
    said = polarity(chosen)[0], polarity(rejected)[0]
    left, right = words(chosen), words(rejected)
    if all(said) and said[0] != said[1]:
        first = [next(w for w in many if w.text in ("yes", "no")) for many in (left, right)]
        return ((first[0].start, first[0].end),), ((first[1].start, first[1].end),)
    sides = (chosen, left), (rejected, right)
    blocks = _merged(_split(_replaced(left, right), *sides), *sides)
    ours = tuple(_range(left[a:b]) for a, b, _, _ in blocks)
    theirs = tuple(_range(right[c:d]) for _, _, c, d in blocks)
    return ours, theirs


def _replaced(left: Sequence[Word], right: Sequence[Word]) -> list[Block]:
    """Stretches of words in each other's place, in order, which do not overlap."""
    found: list[Block] = []
    for what, a, b, c, d in opcodes([w.text for w in left], [w.text for w in right]):
        if what in ("insert", "delete") and any(w.is_negation for w in (*left[a:b], *right[c:d])):
            after = b < len(left) and d < len(right)
            before = a > 0 and c > 0
            if not after and not before:
                continue
            block = (a, b + 1, c, d + 1) if after else (a - 1, b, c - 1, d)
        elif what == "replace":
            block = (a, b, c, d)
        else:
            continue
        if found and (block[0] < found[-1][1] or block[2] < found[-1][3]):  # "not X" beside "Y"
            last = found.pop()
            block = (min(last[0], block[0]), max(last[1], block[1]),
                     min(last[2], block[2]), max(last[3], block[3]))  # fmt: skip
        found.append(block)
    return found


def _split(blocks: Sequence[Block], left: Side, right: Side) -> list[Block]:
    """Stretches of as many words on either side end where both sides have a mark."""
    parts: list[Block] = []
    for a, b, c, d in blocks:
        inner = range(1, b - a if b - a == d - c else 0)
        cuts = [i for i in inner if _ends(*left, a + i - 1) and _ends(*right, c + i - 1)]
        for start, end in pairwise([0, *cuts]):
            parts.append((a + start, a + end, c + start, c + end))
        last = cuts[-1] if cuts else 0
        parts.append((a + last, b, c + last, d))
    return parts


def _merged(blocks: Sequence[Block], left: Side, right: Side) -> list[Block]:
    merged: list[Block] = []
    for a, b, c, d in blocks:
        if merged:
            first, end, other, other_end = merged[-1]
            if _linked(*left, end, a) and _linked(*right, other_end, c):
                merged[-1] = (first, b, other, d)
                continue
        merged.append((a, b, c, d))
    return merged


def _linked(text: str, many: Sequence[Word], end: int, start: int) -> bool:
    """Whether words [end, start) join what stands before and after them to one phrase."""
    between = many[end:start]
    if len(between) > _MOST_LINKS or any(word.text not in _LINKS for word in between):
        return False
    return not any(_ends(text, many, i) for i in range(end - 1, start))


def _ends(text: str, many: Sequence[Word], number: int) -> bool:
    """Whether a mark stands between a word and the next one."""
    return bool(text[many[number].end : many[number + 1].start].strip())


def _range(many: Sequence[Word]) -> Range:
    kept = [i for i, word in enumerate(many) if word.text not in BORDER]
    first, last = (kept[0], kept[-1]) if kept else (0, -1)
    return many[first].start, many[last].end
