"""Options of a question by their texts: which of them an answer says."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from mmalign.benchmark.tokens import Token, tokens, word_set
from mmalign.data.words import stem

ARTICLES = word_set("a an the")
NEGATORS = word_set(
    "not no never without neither nor rather instead except unlike cannot none nothing"
)
COPULAS = word_set(
    "is are was were be been being seems appears looks would could should must can will do does "
    "did has have had"
)
ADVERBS = word_set("clearly definitely also both all actually simply obviously")
WRONG = word_set(
    "wrong incorrect false impossible unlikely excluded eliminated ruled out absent irrelevant "
    "inaccurate rejected missing"
)
_TURNS = word_set("but only however so therefore thus hence then because")
_LINKS = word_set("and or nor one option choice")


def plain(text: str) -> str:
    """Lower case, words and numbers only, single spaces: for comparing texts."""
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


def bare(text: str) -> str:
    """`plain` without an article in front."""
    first, _, rest = plain(text).partition(" ")
    return rest if first in ARTICLES and rest else f"{first} {rest}".strip()


def is_negation(word: str) -> bool:
    """Whether a word denies: not, never, isn't."""
    return word in NEGATORS or word.endswith("n't")


def denied_before(found: Sequence[Token]) -> list[bool]:
    """For each token, whether a negation earlier in its clause reaches it."""
    denied = False
    reached: list[bool] = []
    for i, token in enumerate(found):
        reached.append(denied)
        if not token.word:
            denied = denied and token.text not in "\n.,;:!?"
        elif is_negation(token.word):
            after = found[i + 1].word if i + 1 < len(found) else ""
            denied = after not in ("only", "just", "merely", "doubt")
        elif token.word in _TURNS:
            denied = False
    return reached


def denied_after(found: Sequence[Token]) -> list[bool]:
    """For each token, whether what follows denies it: "A is wrong", "the dog is not there"."""
    denied = pending = False
    reached = [False] * len(found)
    for i in range(len(found) - 1, -1, -1):
        token = found[i]
        reached[i] = denied
        if token.word == "not":
            pending, denied = not denied, False
        elif token.word in WRONG or token.word == "cannot" or token.word.endswith("n't"):
            denied, pending = True, False
        elif pending:
            denied, pending = token.word in COPULAS, False
        elif len(token.text) == 1 and token.word.isalpha():
            pass  # the letters of "A and C are wrong"
        elif token.word:
            denied = denied and (
                token.word in COPULAS or token.word in ADVERBS or token.word in _LINKS
            )
        else:
            denied = denied and token.text in ")]\":-'"
    return reached


def mentioned(text: str, options: Sequence[str]) -> list[int]:
    """Numbers of the options that an answer says in whole words and does not deny.

    An option whose text is part of a longer option that is said counts only where it is the whole
    answer. Articles in front do not matter where options do not differ by them, and neither do
    endings ("dogs", "running") where no option is said as it is written.
    """
    whole, texts = plain(text), [plain(option) for option in options]
    equal = [i for i, option in enumerate(texts) if option and option == whole]
    if equal:
        return equal
    heads = [bare(option) for option in options]
    if len(set(heads)) == len(heads):
        texts = heads
        equal = [i for i, option in enumerate(texts) if option and option == bare(text)]
    return equal or _said(text, texts, str) or _said(text, texts, _stems)


def _stems(text: str) -> str:
    return " ".join(map(stem, text.split()))


def _said(text: str, texts: Sequence[str], form: Callable[[str], str]) -> list[int]:
    texts = [form(option) for option in texts]
    if len(set(texts)) < len(texts) and form is not str:
        return []  # endings tell them apart
    found = tokens(text)
    ahead, behind = denied_before(found), denied_after(found)
    words: list[str] = []
    places: list[int] = []  # token of each word; one token holds several: "two-piece"
    for i, token in enumerate(found):
        parts = [form(part) for part in re.findall(r"[^\W_]+", token.text.lower())]
        words += parts
        places += [i] * len(parts)
    line = f" {' '.join(words)} "
    starts = _starts(words)

    def is_said(option: str) -> bool:
        size = option.count(" ") + 1
        for at in _all(line, f" {option} "):
            first = starts[at]
            if not ahead[places[first]] and not behind[places[first + size - 1]]:
                return True
        return False

    said = [i for i, option in enumerate(texts) if option and is_said(option)]
    return [
        i
        for i in said
        if not any(texts[i] != texts[j] and f" {texts[i]} " in f" {texts[j]} " for j in said)
    ]


def _starts(words: Sequence[str]) -> dict[int, int]:
    """Number of the word behind each blank of the joined line."""
    found: dict[int, int] = {}
    at = 0
    for i, word in enumerate(words):
        found[at] = i
        at += len(word) + 1
    return found


def _all(line: str, part: str) -> Iterator[int]:
    at = line.find(part)
    while at >= 0:
        yield at
        at = line.find(part, at + 1)
