"""What a model meant by its words, strictly: nothing is guessed, and None says so.

The first yes or no counts, and no other. A letter counts where it stands as an answer: at the
beginning with a mark after it, after "answer is", or alone in brackets; never as a word of a
sentence. Where no letter is given, the one option whose text is said counts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_YES_NO = re.compile(r"\b(yes|no)\b", re.IGNORECASE)
_ALONE = re.compile(r"[\W_]*([A-Za-z])[\W_]*")
_FRONT = re.compile(
    r"[\s\"'*]*(?:[(\[]?([A-Za-z])\)|\[([A-Za-z])\]|([A-Z])\s*(?:[.:,;\]]|\*\*|\n))"
)
_SAID = re.compile(
    r"\b(?:answer|option|choice)s?\b\s*(?:is|are|would be|should be)?\s*:?\s*"
    r"(?:option\s+|choice\s+)?[(\[\"'*]*([A-Z])"
    r"(?=[\s\"'*]*$|[)\].,:;\"'*\n]|\s+(?:is|because|since|as)\b)",
    re.IGNORECASE,
)
_BRACKETS = re.compile(r"[(\[]([A-Z])[)\]]")
_LEAD = re.compile(
    r"^\W*(?:the\s+)?(?:best\s+|correct\s+)?(?:answer|option|choice)s?(?:\s+(?:is|are))?\s*:?\s*",
    re.IGNORECASE,
)
_LIST = re.compile(
    r"[(\[]?([A-Z])[)\].]?(?:\s*(?:,|and|or|&|/|;|\s)?\s*(?:(?:and|or)\s+)?[(\[]?[A-Z][)\].]?)*"
)
_LINE = re.compile(r"^\W*([A-Z])\s*[).:\]]", re.MULTILINE)


def yes_no(text: str) -> str | None:
    """The first yes or no of an answer."""
    found = _YES_NO.search(text)
    return found[1].lower() if found else None


def letter(text: str, options: Sequence[str] = (), count: int | None = None) -> str | None:
    """The one letter an answer gives.

    Args:
        text: What the model said.
        options: Texts of the options; () where they are not known.
        count: How many options there are; by default as many as `options`, or 26.
    """
    allowed = LETTERS[: count or len(options) or 26]
    if _several(text, set(allowed)):
        return None
    found = _ALONE.fullmatch(text) or _FRONT.match(text)
    if found:
        given = next(filter(None, found.groups())).upper()
        return given if given in allowed else None
    for pattern in (_SAID, _BRACKETS):
        # Two letters in one answer are no answer.
        given = {match.upper() for match in pattern.findall(text)} & set(allowed)
        if given:
            return given.pop() if len(given) == 1 else None
    said = mentioned(text, options)
    return LETTERS[said[0]] if len(said) == 1 else None


def letters(text: str, options: Sequence[str]) -> frozenset[str]:
    """All letters that an answer to a question with several right options gives; empty: none."""
    allowed = set(LETTERS[: len(options)])
    if several := _several(_LEAD.sub("", text), allowed):
        return several
    for pattern in (_LINE, _BRACKETS):
        given = frozenset(pattern.findall(text)) & allowed
        if len(given) > 1:
            return given
    one = letter(text, options)
    return frozenset(one or (LETTERS[i] for i in mentioned(text, options)))


def _several(text: str, allowed: set[str]) -> frozenset[str]:
    """The letters of an answer that is a list of at least two and nothing else."""
    rest = text.strip().rstrip(".")
    given = frozenset(re.findall(r"[A-Z]", rest))
    return given if len(given) > 1 and given <= allowed and _LIST.fullmatch(rest) else frozenset()


def plain(text: str) -> str:
    """Lower case, words and numbers only, single spaces: for comparing texts."""
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


def mentioned(text: str, options: Sequence[str]) -> list[int]:
    """Numbers of the options that an answer says in whole words.

    An option whose text is part of a longer option that is said counts only where it is the whole
    answer.
    """
    said, texts = plain(text), [plain(option) for option in options]
    equal = [i for i, option in enumerate(texts) if option and option == said]
    if equal:
        return equal
    found = [i for i, option in enumerate(texts) if option and f" {option} " in f" {said} "]
    return [
        i
        for i in found
        if not any(texts[i] != texts[j] and f" {texts[i]} " in f" {texts[j]} " for j in found)
    ]
