"""Words of two texts: what they have in common, where they differ, and kinds of words."""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Block = tuple[int, int, int]
"""a[i : i + size] equals b[j : j + size]: (i, j, size)."""

Opcode = tuple[str, int, int, int, int]
"""a[i:k] is replaced, deleted, inserted or equal: (what, i, k, j, m), as b[j:m]."""

_SMALL = 128 * 128
"""Items of `a` times items of `b` up to which difflib's own search is the faster one."""


def matching_blocks(a: Sequence[Hashable], b: Sequence[Hashable], least: int = 1) -> list[Block]:
    """Common stretches in order: the longest, then the longest on either side of it, and so on.

    Of several of one length that is taken which begins first in `a`, then in `b`. These are the
    blocks of difflib's `SequenceMatcher(None, a, b, autojunk=False)`, without its last, which is
    empty. difflib looks at all equal items of `b` for every item of `a`, once a block; here all
    stretches of one length are compared at once, by numbers that equal stretches share.

    Args:
        a: Items that a dictionary can hold.
        b: The same.
        least: Items of the shortest stretch that counts.

    Source: Ratcliff and Metzener 1988, Pattern Matching: the Gestalt Approach; numbers of stretches
        by doubling as in Karp, Miller and Rosenberg 1972.
    """
    least = max(least, 1)
    numbers: dict[Hashable, int] = {}
    items = [numbers.setdefault(item, len(numbers)) for side in (a, b) for item in side]
    stretches = _Stretches(items)
    found: list[Block] = []
    left = [(0, len(a), len(a), len(items), len(items))]  # ranges of items, and the longest length
    while left:
        i, i_end, j, j_end, most = left.pop()
        if min(i_end - i, j_end - j, most) < least:
            continue
        if (i_end - i) * (j_end - j) <= _SMALL:
            small = SequenceMatcher(None, items[i:i_end], items[j:j_end], autojunk=False)
            found += [(i + x, j + y, n) for x, y, n in small.get_matching_blocks() if n >= least]
            continue
        for x, y, size in stretches.longest(i, i_end, j, j_end, least, most):
            if size:
                found.append((x, y, size))
            most = size - 1 if size else most
            left.append((i, x, j, y, most))
            i, j = x + size, y + size
    return sorted((i, j - len(a), size) for i, j, size in found)


def opcodes(a: Sequence[Hashable], b: Sequence[Hashable]) -> Iterator[Opcode]:
    """What turns `a` into `b`, as difflib's `get_opcodes` says it."""
    i = j = 0
    for x, y, size in [*matching_blocks(a, b), (len(a), len(b), 0)]:
        if i < x or j < y:
            yield "replace" if i < x and j < y else "delete" if i < x else "insert", i, x, j, y
        i, j = x + size, y + size
        if size:
            yield "equal", x, i, y, j


class _Stretches:
    """Numbers that stretches of the items share if they are equal."""

    def __init__(self, items: Sequence[int]) -> None:
        self._of_length_two_to_the = [np.asarray(items, dtype=np.int64)]
        self._num_items = len(items)

    def _numbers(self, start: int, end: int, size: int) -> Ints:
        """A number for each stretch of `size` items within [start, end)."""
        known, level = self._of_length_two_to_the, size.bit_length() - 1
        while len(known) <= level:
            last, half = known[-1], 1 << (len(known) - 1)
            pairs = last[:-half] * self._num_items + last[half:]
            known.append(np.unique(pairs, return_inverse=True)[1])
        rest, stop = size - (1 << level), end - size + 1
        front, back = known[level][start:stop], known[level][start + rest : stop + rest]
        return front * self._num_items + back

    def longest(self, i: int, i_end: int, j: int, j_end: int, least: int, most: int) -> list[Block]:
        """The longest stretches that two ranges share, each behind the last, then the ends.

        The list is empty where no shared stretch has `least` items.
        """

        def shared(size: int) -> Ints:
            ours, theirs = self._numbers(i, i_end, size), self._numbers(j, j_end, size)
            return np.intersect1d(ours, theirs)

        if not len(common := shared(least)):
            return []
        low, above = least, min(most, i_end - i, j_end - j) + 1
        step = 1
        while above - low > 1:  # what is shared is mostly short: steps double until one is too far
            size = min(low + step, (low + above) // 2) if step else (low + above) // 2
            if len(tried := shared(size)):
                low, common, step = size, tried, 2 * step
            else:
                above, step = size, 0
        return [*self._in_order(i, i_end, j, j_end, low, common), (i_end, j_end, 0)]

    def _in_order(
        self, i: int, i_end: int, j: int, j_end: int, size: int, common: Ints
    ) -> list[Block]:
        ours, theirs = self._numbers(i, i_end, size), self._numbers(j, j_end, size)
        places: dict[int, list[int]] = {}
        for at in np.flatnonzero(np.isin(theirs, common)).tolist():
            places.setdefault(int(theirs[at]), []).append(j + at)
        found: list[Block] = []
        free_i, free_j = i, j
        for at in np.flatnonzero(np.isin(ours, common)).tolist():
            if i + at < free_i:
                continue
            known = places[int(ours[at])]
            place = bisect_left(known, free_j)
            if place < len(known):
                found.append((i + at, known[place], size))
                free_i, free_j = i + at + size, known[place] + size
        return found


# What belongs to a closed kind (numbers, colours, sides and other opposites) can contradict; of all
# other words it is not known whether two of them mean the same, but for the few of `ALIKE`.

_LETTER = r"[^\W_][\u0300-\u036f]*"  # with the accents behind it
_WORD = re.compile(
    rf"\d+(?:[.,:]\d+)*(?:st|nd|rd|th)?(?![^\W_])|(?:{_LETTER})+(?:['\u2019-](?:{_LETTER})+)*"
)
_POLARITY = re.compile(
    r"\W*(?:(?:the )?answer(?: is|:)\W*)?(yes\b|no\b(?=\W*$|\s*[^\w\s'\u2019]))\W*", re.IGNORECASE
)


def listed(text: str) -> tuple[str, ...]:
    """Words of a line."""
    return tuple(text.split())


_DIGITS = listed(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen "
    "fourteen fifteen sixteen seventeen eighteen nineteen twenty"
)
_ORDINALS = listed("first second third fourth fifth sixth seventh eighth ninth tenth")
_NUMBERS = (
    {word: str(i) for i, word in enumerate(_DIGITS)}
    | {"once": "1", "twice": "2"}
    | {f"{i}{['st', 'nd', 'rd', 'th'][min(i, 4) - 1]}": w for i, w in enumerate(_ORDINALS, start=1)}
)

COLOURS = frozenset(
    listed(
        "red blue green yellow orange purple violet pink brown black white grey gold silver "
        "beige turquoise cyan magenta"
    )
)

# Within a line no two words are true of one thing at one time; "a b" stands for two ways to say it.
_OPPOSITES = """
left leftward leftwards | right rightward rightwards
up upward upwards | down downward downwards
above over | below under underneath beneath
before | after
forward forwards ahead | backward backwards
clockwise | counterclockwise anticlockwise counter-clockwise anti-clockwise
open opens opened opening | close closes closed closing shut shuts
inside indoor indoors | outside outdoor outdoors
first | last
fast faster quickly | slow slower slowly
day daytime | night nighttime
man men | woman women
boy boys | girl girls
male | female
his | her hers
he | she
enter enters entering entered | leave leaves leaving left exit exits exiting exited
push pushes pushing pushed | pull pulls pulling pulled
start starts starting started begin begins | stop stops stopping stopped end ends
sit sits sitting sat seated | stand stands standing stood
loud loudly louder | quiet quietly quieter silent
big large | small little tiny
young | old elderly
wet | dry
empty | full
same | different
increase increases increasing | decrease decreases decreasing
with | without
"""

ALIKE = (
    "man guy gentleman person someone somebody people adult individual",
    "woman lady person someone somebody people adult individual",
    "boy child kid toddler person someone somebody people",
    "girl child kid toddler person someone somebody people",
    "car vehicle automobile",
    "truck lorry vehicle",
    "couch sofa",
    "bike bicycle",
    "tv television screen",
    "phone cellphone smartphone mobile telephone",
    "throw toss",
    "talk speak say",
    "look watch see view",
    "cook prepare make",
    "dog puppy animal",
    "cat kitten animal",
    "street road",
    "video clip footage",
    "picture photo photograph image",
    "big large huge",
    "small little tiny",
    "begin start",
    "end stop finish",
    "pick grab take",
    "put place",
)
"""Words that are not held against each other, by line."""

STOP = frozenset(
    listed(
        "a an the this that these those there here it its itself is are was were be been "
        "being am do does did doing done has have had having will would can could shall "
        "should may might must of to in on at by for from with into onto as and or but so "
        "then than also very just while who which what when where how he she they them him "
        "his her hers their theirs i you we my your our me us video clip scene shows show "
        "showing shown see seen appears appear seems seem"
    )
)
"""Words without content of their own."""

BORDER = frozenset(
    listed(
        "a an the this that these those is are was were be been being am do does did has have "
        "had will would can could of to and or but so then than there it its as also who "
        "which"
    )
)
"""Words that a phrase neither begins nor ends with."""

NEGATIONS = frozenset(listed("not no never without none nothing nobody neither nor cannot"))

_KINDS: dict[str, list[tuple[str, str]]] = {}  # word to (kind, its side)
for _number, _text in enumerate(_OPPOSITES.strip().splitlines()):
    for _side in map(listed, _text.split("|")):
        for _word in _side:
            _KINDS.setdefault(_word, []).append((f"opposite {_number}", _side[0]))


@dataclass(frozen=True, slots=True)
class Word:
    """A word and its place in the text."""

    text: str  # in lower case; numbers in digits
    start: int
    end: int

    @property
    def is_negation(self) -> bool:
        """Whether it denies: not, never, isn't."""
        return self.text in NEGATIONS or self.text.endswith("n't")


def words(text: str) -> list[Word]:
    """The words of a text in order; case, forms of a character and number words do not matter."""
    found: list[Word] = []
    for match in _WORD.finditer(text):
        plain = unicodedata.normalize("NFKC", match[0]).casefold().replace("\u2019", "'")
        plain = "grey" if plain == "gray" else plain
        found.append(Word(_NUMBERS.get(plain, plain), match.start(), match.end()))
    return found


def stem(word: str) -> str:
    """A word without the endings of English plurals and verbs; for comparing, not for reading.

    "ride", "rides" and "riding" all give "rid". Where too little would be left, or no vowel, the
    ending stays: "red", "king", "bus".
    """
    for ending in ("ingly", "edly", "'s", "ing", "ies", "ied", "es", "ed", "s"):
        left = word.removesuffix(ending)
        if left == word or len(left) < 3 or not re.search(r"[aeiouy]", left):
            continue
        if ending == "s" and left.endswith(("s", "u", "i")):  # glass, bus
            continue
        if ending in ("ies", "ied"):
            return left + "i"
        word = left
        if ending not in ("s", "es", "'s") and len(word) > 3 and word[-1] == word[-2] not in "lsz":
            word = word[:-1]  # running, stopped
        break
    if len(word) > 3 and word[-1] == "y":
        return word[:-1] + "i"
    return word.removesuffix("e") if len(word) > 3 else word


def polarity(text: str) -> tuple[str, str]:
    """The yes or no that a text begins with, "" for none, and the rest of the text.

    A "no" without a mark after it denies the next word: "No man is there" is not a no.
    """
    found = _POLARITY.match(text)
    return (found[1].lower(), text[found.end() :]) if found else ("", text)


def content(text: str) -> list[str]:
    """What a text says: stems without words that say nothing; "not-" before what is denied.

    A yes or no at the beginning is left out.
    """
    found: list[str] = []
    denied = False
    for word in words(polarity(text)[1]):
        if word.is_negation:
            denied = True
        elif word.text not in STOP:
            found.append(("not-" if denied else "") + stem(word.text))
            denied = False
    return found


def alike_to(others: Iterable[str]) -> Callable[[str], bool]:
    """Tells of a stem whether one of `others` is not held against it.

    That is one which is equal, or stands in a line of `ALIKE` with it.
    """
    known = frozenset(others)
    groups = frozenset(group for word in known for group in _GROUPS.get(word, ()))
    return lambda word: word in known or not groups.isdisjoint(_GROUPS.get(word, ()))


_GROUPS: dict[str, list[int]] = {}  # stem to the lines of ALIKE that have it
for _number, _line in enumerate(ALIKE):
    for _word in set(map(stem, _line.split())):
        _GROUPS.setdefault(_word, []).append(_number)


def likeness(one: str, other: str) -> float:
    """How much of what two texts say is the same, 0 to 1: Dice's coefficient of their content.

    Two texts without content are as alike as their words.
    """
    left, right = set(content(one)), set(content(other))
    if not left or not right:
        return float([w.text for w in words(one)] == [w.text for w in words(other)])
    common = sum(map(alike_to(right), left)) + sum(map(alike_to(left), right))
    return common / (len(left) + len(right))


def kinds(word: str) -> list[tuple[str, str]]:
    """The closed kinds a word belongs to, each with what it says there: ("colour", "red")."""
    found = list(_KINDS.get(word, ()))
    if word in COLOURS:
        found.append(("colour", word))
    if word in _ORDINALS:
        found.append(("ordinal", word))
    if word[0].isdigit():
        found.append(("number", word))
    return found


Range = tuple[int, int]
Replaced = tuple[int, int, int, int]  # words [a, b) of the one text stand for [c, d) of the other
Side = tuple[str, Sequence[Word]]

_LINKS = frozenset(listed("a an the of to in on at by for with his her their its"))
_MOST_LINKS = 2


def differing_phrases(chosen: str, rejected: str) -> tuple[tuple[Range, ...], tuple[Range, ...]]:
    """What stands in each other's place in two answers, in whole words: spans without a model.

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


def _replaced(left: Sequence[Word], right: Sequence[Word]) -> list[Replaced]:
    """Stretches of words in each other's place, in order, which do not overlap."""
    found: list[Replaced] = []
    for what, a, b, c, d in opcodes([w.text for w in left], [w.text for w in right]):
        denies = any(word.is_negation for word in (*left[a:b], *right[c:d]))
        if what == "replace":
            block = (a, b, c, d)
        elif what != "equal" and denies and b < len(left) and d < len(right):
            block = (a, b + 1, c, d + 1)
        elif what != "equal" and denies and a > 0 and c > 0:
            block = (a - 1, b, c - 1, d)
        else:
            continue
        if found and (block[0] < found[-1][1] or block[2] < found[-1][3]):  # "not X" beside "Y"
            (a, b, c, d), last = block, found.pop()
            block = (min(last[0], a), max(last[1], b), min(last[2], c), max(last[3], d))
        found.append(block)
    return found


def _split(blocks: Sequence[Replaced], left: Side, right: Side) -> list[Replaced]:
    """Stretches of as many words on either side end where both sides have a mark."""
    parts: list[Replaced] = []
    for a, b, c, d in blocks:
        size = b - a
        if size != d - c:
            parts.append((a, b, c, d))
            continue
        marks = (i for i in range(1, size) if _ends(*left, a + i - 1) and _ends(*right, c + i - 1))
        parts += [(a + i, a + k, c + i, c + k) for i, k in pairwise((0, *marks, size))]
    return parts


def _merged(blocks: Sequence[Replaced], left: Side, right: Side) -> list[Replaced]:
    merged: list[Replaced] = []
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
