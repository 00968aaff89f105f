"""English words of an answer as rules compare them: place, form without endings, kind.

What belongs to a closed kind (numbers, colours, sides and other opposites) can contradict; of all
other words it is not known whether two of them mean the same, but for the few of `ALIKE`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass

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
