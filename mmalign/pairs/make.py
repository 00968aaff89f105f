"""A file of records to a file of pairs: wrong against right, vague against specific."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmalign.data import jobs
from mmalign.data.words import differing_phrases, words
from mmalign.errors import DataError
from mmalign.pairs.answers import Answer, Answers, Row, Sampled, answers_record, rows_of
from mmalign.pairs.judge import Scores, Vague, Verdict, consistency, judge, most_agreed, vagueness

Pair = dict[str, Any]


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
    Departs: there an outside model judges, and writes the specific answer again; rules and numbers
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


Recipe = Hallucinate | Ambiguous
"""How pairs are made of the answers to one question; what became of these is counted."""


def same_words(text: str) -> tuple[str, ...]:
    """Equal for texts that differ in case, marks and spaces alone."""
    return tuple(word.text for word in words(text))


def _rejected(answer: Answer) -> Pair:
    return {"rejected": answer.text} | ({"rejected_cut": True} if answer.cut else {})


def _numbered(row: Row, pairs: Sequence[Pair]) -> list[Pair]:
    """Pairs with ids: that of the record, and a number where there are several."""
    ids = [row.id] if len(pairs) == 1 else [f"{row.id}-{i}" for i in range(1, len(pairs) + 1)]
    return [{"id": name, **pair} for name, pair in zip(ids, pairs, strict=True)]


@dataclass(slots=True)
class Made:
    """What `make` did.

    Attributes:
        out: The file of pairs.
        num_rows: Records that were asked about.
        num_pairs: Pairs written.
        counts: What became of the answers.
        broken: What is wrong with media that cannot be used, each once, and how many records that
            costs.
        left_out: Records with problems.
        answers: The file of all sampled answers; None where they came from a file.
    """

    out: Path
    num_rows: int = 0
    num_pairs: int = 0
    counts: Counter[str] = field(default_factory=Counter[str])
    broken: Counter[str] = field(default_factory=Counter[str])
    left_out: int = 0
    answers: Path | None = None

    def text(self) -> str:
        """For a terminal."""
        lines = [f"{self.out}: {self.num_pairs} pairs of {self.num_rows} records"]
        told = [f"{number} {what}" for what, number in self.counts.items() if number]
        lines += [f"answers: {', '.join(told)}"] if told else []
        if self.left_out:
            lines.append(f"{self.left_out} records with problems left out")
        if self.broken:
            lines.append(f"{self.broken.total()} records left out, which cannot be asked:")
            lines += [f"  {text}" for text in jobs.first_few(list(self.broken))]
        if self.answers is not None:
            lines.append(f"all answers: {self.answers}")
        return "\n".join(lines)


def make(
    source: jobs.Source,
    out: Path,
    answers: Answers,
    recipe: Recipe,
    *,
    progress: jobs.OnProgress = jobs.no_progress,
) -> Made:
    """Write pairs of records and a model's answers to them, in mmalign's own layout.

    Sampled answers go to OUT.partial as they come, so that the same call after an interruption
    goes on; pairs are made from all of them at the end. They stay in NAME.answers.jsonl, for a
    judge or for other rules.

    Args:
        source: The records.
        out: The JSONL file to write; it appears whole or not at all.
        answers: Sampled, or of a file.
        recipe: What pairs are made of them.
        progress: Told after every record that one more is done, and how many there are in all.

    Raises:
        DataError: The file is there, records have problems, or none can be asked about.
    """
    if out.suffix != ".jsonl":
        raise DataError(f"--out {out}: must end in .jsonl")
    kept = out.with_name(f"{out.stem}.answers.jsonl") if isinstance(answers, Sampled) else None
    jobs.require_new(out, *([kept] if kept else []))
    rows, left_out = rows_of(source, out)
    recipe.check(rows)
    result = Made(out, len(rows), left_out=left_out, answers=kept)
    if not isinstance(answers, Sampled):
        out.parent.mkdir(parents=True, exist_ok=True)
        _write(rows, [answers(row) for row in rows], recipe, result)
        return result
    with jobs.resumable(out, {**source.facts(), **answers.facts()}) as journal:
        done = journal.finished
        progress(len(done), len(rows))
        for row in rows:
            if row.id in done:
                continue
            said = answers(row)
            if isinstance(said, DataError):
                journal.add_broken(row.id, said)
            else:
                journal.add({row.id: {"answers": [answer.record() for answer in said]}})
            progress(1, len(rows))
        _write(rows, [_read(journal.done[row.id]) for row in rows], recipe, result)
    return result


def _read(line: Mapping[str, Any]) -> list[Answer] | DataError:
    if "broken" in line:
        return DataError(line["broken"])
    return [Answer(**answer) for answer in line["answers"]]


def _write(
    rows: Sequence[Row], said: Sequence[list[Answer] | DataError], recipe: Recipe, result: Made
) -> None:
    """Pairs, and the answers they were made of; neither file is there before it is whole."""
    told = list(zip(rows, said, strict=True))
    result.broken = Counter(str(answers) for _, answers in told if isinstance(answers, DataError))
    asked = [(row, answers) for row, answers in told if not isinstance(answers, DataError)]
    if not asked:
        first = next(iter(result.broken))
        raise DataError(f"none of {len(rows)} records can be asked about; the first: {first}")
    pairs = [pair for row, answers in asked for pair in recipe(row, answers, result.counts)]
    result.num_pairs = len(pairs)
    jobs.write_lines(result.out, pairs)
    if result.answers is not None:
        jobs.write_lines(result.answers, (answers_record(row, answers) for row, answers in asked))
