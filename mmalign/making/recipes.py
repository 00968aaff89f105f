"""From a record and a model's answers to pairs: wrong against right, vague against specific."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mmalign.data.words import differing_phrases, words
from mmalign.errors import DataError
from mmalign.making.answers import Answer
from mmalign.making.rows import Row
from mmalign.making.scores import Scores
from mmalign.making.vague import Vague, consistency, most_agreed, vagueness
from mmalign.making.wrong import Verdict, judge

Pair = dict[str, Any]


class Recipe(Protocol):
    """How pairs are made of the answers to one question."""

    def check(self, rows: Sequence[Row]) -> None:
        """Refuse records that nothing can be made of, before any model is asked."""
        ...

    def __call__(self, row: Row, answers: Sequence[Answer], counts: Counter[str]) -> list[Pair]:
        """Records in mmalign's own layout; what became of the answers is counted."""
        ...


@dataclass(frozen=True, slots=True)
class Hallucinate:
    """The right answer against what the model said wrongly, with the phrases that differ as spans.

    Of several wrong answers those are kept that have spans and are most like the right one: the
    more alike two answers are, the more exactly their spans mark what is false.

    Attributes:
        keep: Pairs a record at most.
        least_likeness: Below it, an open answer that says something else is wrong.

    Source: Sarkar et al. 2025, arXiv:2504.12083: wrong answers of the base model to masked clips.
    Departs: there, an outside model lists what differs and writes the right sentence again with
        these differences, so that both have one structure. Here a rule tells what is wrong, and the
        rejected text is the model's own.
    """

    keep: int = 1
    least_likeness: float = 0.5

    def check(self, rows: Sequence[Row]) -> None:
        """Every record needs the right answer."""
        without = [row.id for row in rows if not row.truth]
        if without:
            raise DataError(
                f"{without[0]}: has no answer, and wrong ones are told by the right one; "
                f"{len(without)} of {len(rows)} records have none"
            )

    def __call__(self, row: Row, answers: Sequence[Answer], counts: Counter[str]) -> list[Pair]:
        """The pairs of one record."""
        found: dict[tuple[str, ...], tuple[Answer, Verdict]] = {}
        for answer in answers:
            verdict = self._verdict(row, answer)
            counts[verdict.outcome] += 1
            text = same_words(answer.text)
            if verdict.outcome == "wrong" and text in found:
                counts["said before"] += 1
            elif verdict.outcome == "wrong" and text != same_words(row.truth):
                found[text] = (answer, verdict)
        pairs = [self._pair(row, *item) for item in found.values()]
        pairs.sort(key=lambda pair: (not pair["spans_chosen"], -pair["meta"]["likeness"]))
        counts["wrong, not kept"] += len(pairs[self.keep :])
        counts["pairs without spans"] += sum(not p["spans_chosen"] for p in pairs[: self.keep])
        return _numbered(row, pairs[: self.keep])

    def _verdict(self, row: Row, answer: Answer) -> Verdict:
        told = judge(answer.text, row.truth, row.question, least_likeness=self.least_likeness)
        return Verdict("wrong", "given", told.likeness) if answer.wrong and answer.text else told

    def _pair(self, row: Row, answer: Answer, verdict: Verdict) -> Pair:
        chosen, rejected = differing_phrases(row.truth, answer.text)
        return {
            **row.columns,
            "chosen": row.truth,
            **_rejected(answer),
            "spans_chosen": [list(span) for span in chosen],
            "spans_rejected": [list(span) for span in rejected],
            "meta": {
                "recipe": "hallucinate",
                "source_id": row.id,
                "rule": verdict.rule,
                "likeness": round(verdict.likeness, 3),
                **({"change": dict(answer.change)} if answer.change else {}),
            },
        }


@dataclass(frozen=True, slots=True)
class Ambiguous:
    """A specific answer against a vague one that the model gave.

    Vague is what the rules say is vague (`vagueness`), or a judge's file; without a judge also
    answers of a model that says something else each time. Specific is the record's own answer, or
    where there is none that of the model's which is least vague and most like the others.

    Attributes:
        keep: Pairs a record at most.
        threshold: The score from which on an answer is vague.
        least_consistency: Mean likeness of the answers below which all of them are vague.
        scores: A judge's; rows it does not score are left out.
        own: Take the specific answer from the model's, also where the record has one.
        weigh: Give pairs the score as weight.

    Source: Ye et al. 2024, arXiv:2403.04640 (CAT's ADPO).
    Departs: there an outside model judges, and writes the specific answer anew; rules and numbers
        are ours.
    """

    keep: int = 1
    threshold: float = 0.5
    least_consistency: float = 0.2
    scores: Scores | None = None
    own: bool = False
    weigh: bool = False

    def check(self, rows: Sequence[Row]) -> None:
        """Any record will do."""

    def __call__(self, row: Row, answers: Sequence[Answer], counts: Counter[str]) -> list[Pair]:
        """The pairs of one record."""
        said = [answer.text for answer in answers]
        found = self._vague(row, said)
        if found is None:
            counts["without a score"] += len(said)
            return []
        counts["vague"] += (many := sum(vague.score >= self.threshold for vague in found))
        counts["specific"] += len(said) - many
        chosen = self._specific(row, said, found)
        if chosen is None:
            counts["records without a specific answer"] += 1
            return []
        kept: dict[tuple[str, ...], Pair] = {}
        for number in sorted(range(len(said)), key=lambda i: -found[i].score):
            text = same_words(said[number])
            if found[number].score >= self.threshold and text not in ((), same_words(chosen)):
                kept.setdefault(text, self._pair(row, chosen, answers[number], found[number]))
        return _numbered(row, list(kept.values())[: self.keep])

    def _vague(self, row: Row, said: Sequence[str]) -> list[Vague] | None:
        if self.scores is not None:
            return self.scores.of(row.id, said)
        found = [vagueness(text, row.truth, row.question, row.clues) for text in said]
        alike = consistency(said)
        if alike >= self.least_consistency:
            return found
        reason = f"the answers disagree (mean likeness {alike:.2f})"
        return [Vague(max(v.score, round(1 - alike, 3)), (*v.reasons, reason)) for v in found]

    def _specific(self, row: Row, said: Sequence[str], found: Sequence[Vague]) -> str | None:
        if row.truth and not self.own:
            reference = vagueness(row.truth, clues=row.clues, question=row.question)
            return row.truth if reference.score < self.threshold else None
        best = most_agreed(said, found)
        return said[best] if found[best].score < self.threshold else None

    def _pair(self, row: Row, chosen: str, answer: Answer, vague: Vague) -> Pair:
        judged = "rules" if self.scores is None else self.scores.path.name
        return {
            **row.columns,
            "chosen": chosen,
            **_rejected(answer),
            "ambiguity": {"judge": judged, "score": vague.score, "reason": vague.reason},
            **({"weight": vague.score} if self.weigh else {}),
            "meta": {"recipe": "ambiguous", "source_id": row.id},
        }


def same_words(text: str) -> tuple[str, ...]:
    """Equal for texts that differ in case, marks and spaces alone."""
    return tuple(word.text for word in words(text))


def _rejected(answer: Answer) -> Mapping[str, Any]:
    cut = {"rejected_cut": True} if answer.cut else {}
    return {"rejected": answer.text, **cut}


def _numbered(row: Row, pairs: Sequence[Pair]) -> list[Pair]:
    """Pairs with ids: that of the record, and a number where there are several."""
    ids = [row.id] if len(pairs) == 1 else [f"{row.id}-{i}" for i in range(1, len(pairs) + 1)]
    return [{"id": name, **pair} for name, pair in zip(ids, pairs, strict=True)]
