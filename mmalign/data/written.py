"""What stands in answers that no person wrote: the marks of a converter gone wrong."""

from __future__ import annotations

import re
import unicodedata
from operator import eq
from typing import TYPE_CHECKING

from mmalign.data.example import as_text, normalised

if TYPE_CHECKING:
    from pathlib import Path

    from mmalign.data.example import Candidate, Message, Picture

    Response = str | Path | Picture | tuple[Message, ...]

_MARK = re.compile(
    r"<\|[A-Za-z][\w ]{0,40}\|>|<｜[^<>｜]{1,40}｜>|</s>|<(?:start|end)_of_turn>|<(?:bos|eos|pad)>"
    r"|\[/?INST\]|<<SYS>>"
)
"""Special tokens of well-known tokenizers and templates, as text."""
_ROLE = re.compile(r"\s*(?:assistant|human|user|gpt|chatgpt|bot|ai)\s*:", re.IGNORECASE)
_NEXT_TURN = re.compile(r"\n\n(?:Human|User): ")
_NOTHING = frozenset({"nan", "null", "<na>", "undefined", "[object object]"})
_AT_AN_END = re.compile(r"(?<!\w)[*_#`]+|(?<!_)[*_#`]+(?!\w)|[\"'“”‘’«»]|[.,;:!?…]+(?!\w)")


def special_mark(candidate: Candidate) -> str:
    """The first special token that is written in a response; "" where there is none."""
    for text in _words(candidate.response):
        if found := special_mark_of(text):
            return found
    return ""


def special_mark_of(text: str) -> str:
    """The first special token that is written in a text; "" where there is none."""
    found = _MARK.search(text) if "<" in text or "[" in text else None
    # Beside its opening tag it is HTML's way to strike text out.
    return found[0] if found and not (found[0] == "</s>" and "<s>" in text[1:]) else ""


def of_a_converter(candidate: Candidate) -> dict[str, str]:
    """What a response says that its writer did not: a phrase for each kind, and what was found."""
    found: dict[str, str] = {}
    for text in _words(candidate.response):
        if text.strip().casefold() in _NOTHING:
            found["answers that say nothing but an empty cell of a table"] = text.strip()
        if turn := _NEXT_TURN.search(text):
            found["answers in which the user speaks again"] = turn[0].strip()
    return found


def role_before(candidate: Candidate) -> str:
    """The role that a response begins with, as a transcript would: `Assistant:`; "" for none."""
    first = next(iter(_words(candidate.response)), "")
    found = _ROLE.match(first)
    return found[0].strip() if found else ""


def bare(response: Response) -> str:
    """The normalised words without marks of punctuation or markup at a word's end, or unseen ones.

    Marks between two letters or digits stay, and signs that calculate or call: `3.5` is not `35`.
    """
    return _words_of(_seen(response))


def same_words(one: Response, other: Response) -> bool:
    """Whether two responses have the same `bare` words, and any.

    Letters are compared first: they tell nearly all pairs apart at once, and marks take far longer.
    """
    left, right = _seen(one), _seen(other)
    if not all(map(eq, filter(str.isalnum, left), filter(str.isalnum, right))):
        return False
    words = _words_of(left)
    return bool(words) and words == _words_of(right)


def _seen(response: Response) -> str:
    """The normalised text without characters that are not seen."""
    text = as_text(response)
    for character in set(text):  # far fewer than there are characters
        if unicodedata.category(character) == "Cf":
            text = text.replace(character, "")
    return normalised(text)


def _words_of(text: str) -> str:
    return " ".join(_AT_AN_END.sub(" ", text).split())


def _words(response: Response) -> list[str]:
    if isinstance(response, str):
        return [response]
    return [turn.content for turn in response] if isinstance(response, tuple) else []
