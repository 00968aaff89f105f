"""What a model meant by its words, strictly: nothing is guessed, and None says so.

Thoughts, tokens of templates and layout are no answer; what stands in `<answer>` or a box is the
answer, whatever else is said. A letter counts where it stands as an answer: after "answer is" and
the like, in front, alone, or in brackets; never as a word of a sentence, and never where it is
denied. The surest place counts; two letters there are no answer. Where no letter is given, the one
option whose text is said counts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from mmalign.benchmark.letters import CHINESE, EXPLAINED, Given, Rank, given, listed
from mmalign.benchmark.options import bare, mentioned, plain
from mmalign.benchmark.spoken import spoken
from mmalign.benchmark.tokens import Token, tokens
from mmalign.benchmark.yes_no import yes_no

__all__ = ["LETTERS", "concluded", "letter", "letters", "mentioned", "plain", "yes_no"]

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_COMPACT = re.compile(  # AC, but not in "the AC adapter"
    r"(?:(?<![a-z] )|(?<= is )|(?<= are )|(?<=answer )|(?<=answers ))\b[A-Z]{2,26}\b(?! [a-z])"
)

_CUE = re.compile(
    r"\b(?:answer|response|option|choice)(?: is(?! not\b)| would be| ?:)", re.IGNORECASE
)


def letter(text: str, options: Sequence[str] = (), count: int | None = None) -> str | None:
    """The one letter an answer gives.

    Args:
        text: What the model said.
        options: Texts of the options; () where they are not known.
        count: How many options there are; by default as many as `options`, or 26.
    """
    marked, whole = spoken(text)
    read = {_letter(part, options, count) for part in marked or [whole]}
    return read.pop() if len(read) == 1 else None


def _letter(text: str, options: Sequence[str], count: int | None) -> str | None:
    found = tokens(text, CHINESE)
    said = given(found)
    if said:
        one = _surest(said, found)
        if one is not None:
            letter = one.letter
            allowed = LETTERS[: count or len(options) or 26]
            return letter if letter in allowed and _fits(one, found, options) else None
        if max(item.rank for item in said) > Rank.LOOSE:
            return None
    return _by_text(text, options)


def _surest(said: Sequence[Given], found: Sequence[Token]) -> Given | None:
    """The letter that stands surest, if it stands there alone."""
    rank = max(item.rank for item in said)
    top = [item for item in said if item.rank == rank]
    if rank == Rank.LOOSE or len({item.letter for item in top}) > 1:
        return None
    one = top[0]
    pairs = pairwise(said)
    if any(
        first.letter != second.letter and one.letter in (first.letter, second.letter)
        for first, second in pairs
        if (first.rank == rank or second.rank == rank) and listed(found, first, second)
    ):
        return None
    return None if rank == Rank.FRONT and _is_echo(one, said, found) else one


def _is_echo(one: Given, said: Sequence[Given], found: Sequence[Token]) -> bool:
    """Whether other options are listed with marks too, before any explanation."""
    stop = next((i for i, token in enumerate(found) if token.word in EXPLAINED), len(found))
    line = next((i for i, token in enumerate(found) if token.text == "\n"), len(found))
    return any(
        item.letter != one.letter and item.label and item.at < stop
        for item in said
        if item.starts or item.at < line
    )


def _fits(one: Given, found: Sequence[Token], options: Sequence[str]) -> bool:
    """Whether the letter's own option is named behind it, or no option at all.

    "C. dog" is no answer where the dog is B.
    """
    longest = max((plain(option).count(" ") + 2 for option in options), default=0)
    words: list[str] = []
    named: list[str] = []  # what stands behind the letter, up to each mark
    for token in found[one.at + 1 : one.at + 3 * longest + 4]:
        if token.text == "\n":
            break
        if token.word:
            words.append(token.text)
        elif words:
            named.append(bare(" ".join(words)))
    named.append(bare(" ".join(words)))
    texts = [bare(option) for option in options]
    own = LETTERS.find(one.letter)
    if not words or own >= len(texts) or texts[own] in named:
        return True
    return not any(text and text in named for text in texts)


def _by_text(text: str, options: Sequence[str]) -> str | None:
    """The letter of the one option that an answer says."""
    kinds = [plain(option) for option in options]
    if "yes" in kinds and "no" in kinds and plain(text) not in kinds:
        read = yes_no(text)
        return None if read is None else LETTERS[kinds.index(read)]
    for part in (*concluded(text), text.partition("\n")[0], text):
        said = mentioned(part, options)
        if len(said) == 1 and said[0] < len(LETTERS):
            return LETTERS[said[0]]
        if len(said) > 1:
            return None
    return None


def concluded(text: str) -> list[str]:
    """What stands behind the last "answer:" or "answer is", up to the line's end."""
    cues = [match.end() for match in _CUE.finditer(text)]
    return [text[cues[-1] :].lstrip().partition("\n")[0]] if cues else []


def letters(text: str, options: Sequence[str]) -> frozenset[str]:
    """All letters that an answer to a question with several right options gives; empty: none."""
    marked, whole = spoken(text)
    read = {_letters(part, options) for part in marked or [whole]}
    return read.pop() if len(read) == 1 else frozenset()


def _letters(text: str, options: Sequence[str]) -> frozenset[str]:
    allowed = LETTERS[: len(options)]

    def spaced(found: re.Match[str]) -> str:
        return ", ".join(found[0]) if set(found[0]) <= set(allowed) else found[0]

    text = _COMPACT.sub(spaced, text)
    found = tokens(text, CHINESE)
    said = given(found)
    chosen = _all_meant(said, found)
    if not chosen:
        return frozenset(LETTERS[i] for i in mentioned(text, options) if i < len(LETTERS))
    between = found[chosen[0].at : chosen[-1].at]
    unsure = any(token.word == "or" for token in between)
    fits = all(item.letter in allowed and _fits(item, found, options) for item in chosen)
    return frozenset(item.letter for item in chosen) if fits and not unsure else frozenset()


def _all_meant(said: Sequence[Given], found: Sequence[Token]) -> list[Given]:
    """The surest letters, those of one list with them, and other marks of options."""
    rank = max((item.rank for item in said), default=Rank.LOOSE)
    if rank == Rank.LOOSE:
        return []
    stop = next((i for i, token in enumerate(found) if token.word in EXPLAINED), len(found))
    chosen: list[Given] = []
    for place, item in enumerate(said):
        before = said[place - 1]
        in_list = bool(chosen) and before is chosen[-1] and listed(found, before, item)
        marked = item.at < stop and item.label and (item.starts or rank <= Rank.FRONT)
        if item.rank == rank or in_list or (marked and (chosen or rank < Rank.CONCLUDED)):
            chosen.append(item)
    return chosen
