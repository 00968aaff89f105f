"""Whether an answer is wrong, by rule and without an outside model.

A rule that cannot tell says so: the answer is undecided, and no pair is made from it. The rules:

    option    the question has options: the letters are compared
    yes-no    the right answer begins with yes or no: so must the answer; the same word goes on
    number    the right answer is a number: the answer must say exactly one
    contradiction  in each other's place stand two words of one closed kind: numbers, colours,
              sides and other opposites, or a word and its denial
    content   the answer says something that the right one does not, leaves out something that it
              says, and less than `least_likeness` is common to both

It is right where it says all that the right answer says. Two sentences of which both are true of a
clip are wrong by `content` where they say different things; and an unknown synonym is another word.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from mmalign.benchmark import parsers
from mmalign.data.words import (
    alike_to,
    content,
    differing_phrases,
    kinds,
    likeness,
    polarity,
    stem,
    words,
)

_LINE = re.compile(r"^[^\w\n]*+([A-Z])[).:]\s*+(\S.*)$", re.MULTILINE)
# Up to the next letter in brackets; what only parts the options belongs to none.
_IN_LINE = re.compile(r"\(([A-Z])\)\s*+(\S(?:(?:[^\S\n]|[,;])*+(?!\([A-Z]\))[^\s,;])*+)")

Outcome = Literal["right", "wrong", "undecided"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of an answer, and the rule that told."""

    outcome: Outcome
    rule: str
    likeness: float  # to the right answer, 0 to 1


def judge(answer: str, truth: str, question: str = "", *, least_likeness: float = 0.5) -> Verdict:
    """Compare an answer with the right one.

    Args:
        answer: What a model said.
        truth: The right answer.
        question: Its text; options are looked for in it.
        least_likeness: Below it, an answer that says something else is wrong.
    """
    alikeness = likeness(answer, truth)

    def found(outcome: Outcome, rule: str) -> Verdict:
        return Verdict(outcome, rule, alikeness)

    if not words(answer):
        return found("undecided", "empty")
    options = options_of(question)
    right = parsers.letter(truth, options) if options else None
    if right is not None:
        given = parsers.letter(answer, options)
        if given is None:
            return found("undecided", "option")
        return found("right" if given == right else "wrong", "option")
    (said, rest), (true, true_rest) = polarity(answer), polarity(truth)
    if true:
        if said != true:
            return found("wrong" if said else "undecided", "yes-no")
        if not content(rest) or not content(true_rest):
            return found("right", "yes-no")
        answer, truth = rest, true_rest
    number = _one_number(truth)
    if number and len(words(truth)) == 1:
        given = _one_number(answer)
        if not given:
            return found("undecided", "number")
        return found("right" if given == number else "wrong", "number")
    return found(*_open(answer, truth, least_likeness))


def options_of(question: str) -> list[str]:
    """Texts of options A, B, C..., each on a line, or each behind its letter in brackets."""
    for pattern in (_LINE, _IN_LINE):
        found = pattern.findall(question)
        letters = "".join(letter for letter, _ in found)
        if len(found) > 1 and parsers.LETTERS.startswith(letters):
            return [text.strip() for _, text in found]
    return []


def _open(answer: str, truth: str, least_likeness: float) -> tuple[Outcome, str]:
    if contradicts(answer, truth):
        return "wrong", "contradiction"
    said, true = content(answer), content(truth)
    is_said, is_true = alike_to(said), alike_to(true)
    missing = [word for word in true if not is_said(word)]
    extra = [word for word in said if not is_true(word)]
    if not missing and true:
        return "right", "content"
    if extra and missing and likeness(answer, truth) < least_likeness:
        return "wrong", "content"
    return "undecided", "content"


def contradicts(answer: str, truth: str) -> bool:
    """Whether words of one closed kind, or a word and its denial, stand in each other's place."""
    said, true = set(content(answer)), set(content(truth))
    if any(f"not-{a}" in true for a in said) or any(f"not-{a}" in said for a in true):
        return True
    for (a, b), (c, d) in zip(*differing_phrases(truth, answer), strict=True):
        ours, theirs = _kinds(truth[a:b]), _kinds(answer[c:d])
        if any(not ours[kind] & theirs[kind] for kind in ours.keys() & theirs.keys()):
            return True
    return False


def _kinds(text: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for word in words(text):
        for kind, side in kinds(word.text):
            found.setdefault(kind, set()).add(side)
    return found


def _one_number(text: str) -> str:
    numbers = {word.text for word in words(text) if word.text[0].isdigit()}
    return stem(numbers.pop()) if len(numbers) == 1 else ""
