"""How vague an answer is, by rule: hedges, words for anything, nothing that the clip's clues name.

Each rule that holds adds to a score of 0 to 1:

    refusal      0.6  says that it cannot tell
    generic      0.4  a word for anything, such as "something", that the true answer does not use;
                      0.2 for each further one
    hedge        0.3  "maybe", "it seems"; 0.1 for each further one
    short        0.3  less than half of the content words of the true answer
    no clue      0.3  names nothing of what a clue names beyond the question; for each of the clues

None says whether the answer is true: one that names another object than the clue has 0.3, which the
threshold of 0.5 does not take for vague.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from mmalign.data.words import alike_to, content, likeness, words

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
        named = _new(clue, question)
        if named and not any(map(alike_to(named), content(answer))):
            note([""], f"names nothing that the {kind} does", 0.3)
    return Vague(round(min(score, 1.0), 3), tuple(reasons))


def _new(clue: str, question: str) -> list[str]:
    """What a clue names and the question does not."""
    asked = set(content(question))
    return [word for word in content(clue) if word not in asked]


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
