"""Whether an answer is wrong and how vague it is, by rule or as an outside judge says in a file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal

from mmalign.bench import parsers
from mmalign.data.example import normalised
from mmalign.data.fields import Fields
from mmalign.data.files import read_rows
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
from mmalign.errors import DataError

# A rule that cannot tell says so: the answer is undecided, and no pair is made from it. The rules:
#
#     option    the question has options: the letters are compared
#     yes-no    the right answer begins with yes or no: so must the answer; the same word goes on
#     number    the right answer is a number: the answer must say exactly one
#     contradiction  in each other's place stand two words of one closed kind: numbers, colours,
#               sides and other opposites, or a word and its denial
#     content   the answer says something that the right one does not, leaves out something that it
#               says, and less than `least_likeness` is common to both
#
# It is right where it says all that the right answer says. Two sentences of which both are true of
# a clip are wrong by `content` where they say different things; and an unknown synonym is another
# word.

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


# Each rule that holds adds to a score of 0 to 1:
#
#     refusal      0.6  says that it cannot tell
#     generic      0.4  a word for anything, such as "something", that the true answer does not use;
#                       0.2 for each further one
#     hedge        0.3  "maybe", "it seems"; 0.1 for each further one
#     short        0.3  less than half of the content words of the true answer
#     no clue      0.3  names nothing of what a clue names beyond the question; for each of the
#       clues
#
# None says whether the answer is true: one that names another object than the clue has 0.3, which
# the threshold of 0.5 does not take for vague.

_REFUSAL = re.compile(
    r"\b(?:(?:can ?not|can't|cannot|unable to|impossible to|hard to|difficult to|not possible to)"
    r" (?:\w+ )?(?:tell|say|determine|identify|see|know|answer|make out)"
    r"|(?:not|un)\s?(?:sure|clear|certain)|don't know|do not know|no information|as an ai\b)",
    re.IGNORECASE,
)
_HEDGE = re.compile(
    r"\b(?:maybe|perhaps|possibly|probably|presumably|apparently|might|may|could be|likely"
    r"|seems?|appears? (?:to|that|like)|looks? like|i (?:think|guess|believe)|or so|some ?how"
    r"|more or less|or something)\b",
    re.IGNORECASE,
)
_GENERIC = re.compile(
    r"\b(?:some(?:thing|one|body|where|times?)|any(?:thing|one|body)"
    r"|(?:some|a|any) (?:kind|sort|type)s? of"
    r"|(?:various|several|some|different|certain|many|other) (?:things?|objects?|items?|people"
    r"|sounds?|actions?|activit(?:y|ies)|events?|noises?|places?|elements?)|things|stuff|etc"
    r"|an? (?:certain |general |particular |specific )?(?:thing|object|item|activity|action|event"
    r"|sound|noise|place|scene|situation)|and so on|in general)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Vague:
    """How vague an answer is and why; `score` from 0, exact, to 1."""

    score: float
    reasons: tuple[str, ...] = ()

    @property
    def reason(self) -> str:
        """In one line."""
        return "; ".join(self.reasons)


def vagueness(
    answer: str, truth: str = "", question: str = "", clues: Mapping[str, str] | None = None
) -> Vague:
    """Look for signs that an answer stays general.

    Args:
        answer: What a model said.
        truth: The true answer, "" where it is not known.
        question: What was asked; its own words are no clue.
        clues: What is seen and heard, by kind ("video clue", "audio clue"); None: the true answer.
    """
    if not words(answer):
        return Vague(1.0, ("says nothing",))
    score, reasons = 0.0, list[str]()

    def note(found: Sequence[str], reason: str, first: float, more: float = 0.0) -> None:
        nonlocal score
        if found:
            score += first + more * (len(found) - 1)
            reasons.append(f"{reason}: {', '.join(found)}" if all(found) else reason)

    def hits(pattern: re.Pattern[str]) -> list[str]:
        known = {hit.lower() for hit in pattern.findall(truth)}
        return [
            h for h in dict.fromkeys(h.lower() for h in pattern.findall(answer)) if h not in known
        ]

    note(hits(_REFUSAL), "cannot tell", 0.6)
    note(hits(_GENERIC), "words for anything", 0.4, 0.2)
    note(hits(_HEDGE), "hedges", 0.3, 0.1)
    if 2 * len(content(answer)) < len(content(truth)):
        note([""], "says little", 0.3)
    for kind, clue in (clues or ({"true answer": truth} if truth else {})).items():
        asked = set(content(question))
        named = [word for word in content(clue) if word not in asked]
        if named and not any(map(alike_to(named), content(answer))):
            note([""], f"names nothing that the {kind} does", 0.3)
    return Vague(round(min(score, 1.0), 3), tuple(reasons))


def consistency(answers: Sequence[str]) -> float:
    """Mean likeness of all pairs of answers to one question, 0 to 1; 1 for a single one."""
    pairs = [likeness(a, b) for a, b in combinations(answers, 2)]
    return sum(pairs) / len(pairs) if pairs else 1.0


def most_agreed(answers: Sequence[str], vague: Iterable[Vague]) -> int:
    """The number of the answer that is most like the others and least vague.

    That of the largest product of its mean likeness to the others and one less its vagueness.
    """

    def value(number: int, found: Vague) -> float:
        others = [likeness(answers[number], o) for i, o in enumerate(answers) if i != number]
        return (1 - found.score) * (sum(others) / len(others) if others else 1.0)

    values = [value(i, found) for i, found in enumerate(vague)]
    return values.index(max(values))


class Scores:
    """Scores of a JSONL file, 0 for exact to 1 for vague, with reasons where the judge gives any.

    A line has the row's `id` and `scores`, one an answer in the order of the file of answers; or
    `score` and `answer`, the text that is meant; or `score` alone, for all answers of the row.
    """

    def __init__(self, path: Path) -> None:
        """Read the file.

        Raises:
            DataError: A line without an id or a score in [0, 1].
        """
        self.path = path
        self._lists: dict[str, list[Vague]] = {}
        self._texts: dict[tuple[str, str], Vague] = {}
        self._rows: dict[str, Vague] = {}
        for row in read_rows(path):
            fields = Fields(row.value or {})
            name, answer = fields.get("id"), fields.get("answer")
            why = (str(fields.get("reason")),) if "reason" in fields else ()
            if name is None:
                raise DataError(f"{row.place}: {row.problem or 'has no `id`'}")
            if "scores" in fields:
                numbers = fields.numbers("scores")
                self._lists[str(name)] = [Vague(number, why) for number in numbers]
            else:
                score = fields.number("score", 0, 1)
                numbers = () if score is None else (score,)
                if isinstance(answer, str):
                    self._texts[str(name), normalised(answer)] = Vague(score or 0.0, why)
                else:
                    self._rows[str(name)] = Vague(score or 0.0, why)
            if fields.problems or not numbers or not all(0 <= n <= 1 for n in numbers):
                problem = fields.problems[0] if fields.problems else "needs scores between 0 and 1"
                raise DataError(f"{row.place}: {problem}")

    def of(self, row: str, answers: Sequence[str]) -> list[Vague] | None:
        """The scores of a row's answers; None where the file has none of it.

        Raises:
            DataError: It scores another number of answers, or only some of them.
        """
        listed = self._lists.get(row)
        if listed is None and row in self._rows:
            listed = [self._rows[row]] * len(answers)
        if listed is None:
            found = [self._texts.get((row, normalised(answer))) for answer in answers]
            listed = [score for score in found if score is not None]
            if not listed:
                return None
        if len(listed) != len(answers):
            raise DataError(
                f"{self.path}: scores {len(listed)} of the {len(answers)} answers of {row!r}; an "
                "answer needs one score"
            )
        return listed
