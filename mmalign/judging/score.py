"""`mmalign data score --by`: a file of candidates to the same with rewards; resumable."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmalign.data import jobs
from mmalign.errors import DataError
from mmalign.judging.agreement import agreement
from mmalign.judging.base import (
    FAILURES,
    NAN,
    Drawn,
    Judge,
    Row,
    Settles,
    Verdict,
    judged_line,
    read_candidates,
    read_judged,
)
from mmalign.judging.endpoint import order_bias

BATCH = 16
"""Rows that a judge is given at one time."""


@dataclass(slots=True)
class Scored:
    """What `score_file` did.

    Attributes:
        out: The judged file.
        num_rows: Of the file.
        num_judged: Rows of which at least one response has a reward.
        resumed: Rows that had been judged before.
        lost: Why a row has no reward, by id.
        counts: What the judge counted, e.g. comparisons that flip with the order.
        num_candidates: Responses of all rows.
        unjudged: Responses without a reward in rows that have some.
        alone: Rows of one response, or equal ones, of which a judge that compares says nothing.
        empty: Responses that say nothing.
        same: Responses identical to an earlier one of their row.
        failures: Rows with verdicts that were asked for and cannot be had, by what is wrong.
        notes: Sentences about the judge and, where the file has human labels, its agreement.
    """

    out: Path
    num_rows: int = 0
    num_judged: int = 0
    resumed: int = 0
    lost: dict[str, str] = field(default_factory=dict[str, str])
    counts: Counter[str] = field(default_factory=Counter[str])
    num_candidates: int = 0
    unjudged: int = 0
    alone: int = 0
    empty: int = 0
    same: int = 0
    failures: dict[str, list[str]] = field(default_factory=dict[str, "list[str]"])
    notes: list[str] = field(default_factory=list[str])

    def text(self) -> str:
        """For a terminal."""
        before = f", of which {self.resumed} had been before" if self.resumed else ""
        lines = [f"{self.out}: {self.num_judged} of {self.num_rows} rows judged{before}"]
        found = {"without a reward": self.unjudged, "empty": self.empty, "identical": self.same}
        told = [f"{count} {what}" for what, count in found.items() if count]
        if told:
            lines.append(f"of {self.num_candidates} responses {', '.join(told)}")
        if self.alone:
            lines.append(f"rows of one response, which is compared with none: {self.alone}")
        if self.lost:
            lines.append(f"rows lost: {len(self.lost)}: {'; '.join(self.reasons())}")
        for what, count in sorted(self.counts.items()):
            rows = ", ".join(jobs.first_few(self.failures.get(what, [])))
            lines.append(f"{what}: {count}" + (f" (rows {rows})" if rows else ""))
        return "\n".join([*lines, *self.notes])

    def reasons(self) -> list[str]:
        """Why rows are lost: each reason with how many there are and the first rows."""
        rows: dict[str, list[str]] = {}
        for key, why in self.lost.items():
            rows.setdefault(why, []).append(key)
        return [
            f"{why} ({len(keys)}: {', '.join(jobs.first_few(keys, 3))})"
            for why, keys in rows.items()
        ]


def judge_rows(judge: Judge, rows: Sequence[Drawn]) -> list[Verdict]:
    """The verdicts of some rows that belong together, settled over all of them.

    Raises:
        DataError: The judge gave a number that is none, or too few.
    """
    said = [one for part in _parts(rows) for one in _checked(judge, part)]
    return judge.settle(said) if isinstance(judge, Settles) else said


def _parts(rows: Sequence[Any]) -> list[Sequence[Any]]:
    return [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]


def _checked(judge: Judge, rows: Sequence[Drawn]) -> list[Verdict]:
    said = judge(rows)
    for row, verdict in zip(rows, said, strict=True):
        for name, own in {judge.name: verdict.rewards, **verdict.by}.items():
            if len(own) != len(row.candidates) or any(map(math.isinf, own)):
                raise DataError(
                    f"judge {name} gave {list(own)} for the {len(row.candidates)} responses of "
                    f"row {row.id!r}; it must give a finite number for each, or nan"
                )
    return said


def score_file(
    source: Path,
    out: Path,
    judge: Judge,
    *,
    most_lost: float | None = None,
    pictures: Path | None = None,
    progress: jobs.OnProgress = jobs.no_progress,
) -> Scored:
    """Judge the candidates of a file; what is judged goes to OUT.partial as it comes.

    Args:
        source: Rows of candidates, or pairs and ranked lists in any known layout.
        out: The JSONL file to write; it appears whole or not at all. Paths of images start from
            its folder, so where there are some it lies beside `source`.
        judge: Who says which response is better.
        most_lost: Largest share of rows without a verdict; None for any but all.
        pictures: Where paths of what prompts show start; None: the folder of `source`.
        progress: Told how many rows are newly judged, and how many there are in all.

    Raises:
        DataError: The file is there, rows cannot be read, too many or all are lost. What has been
            judged is kept: the same call goes on, and asks lost rows again.
    """
    jobs.require_new(out)
    rows = read_candidates(source, pictures)
    shown = any(row.drawn is not None and row.drawn.images is not None for row in rows)
    if shown and source.resolve().parent != out.resolve().parent:
        raise DataError(
            f"{out}: must lie in {source.resolve().parent}, as the rows of {source.name} name "
            "images by their way from there"
        )
    asked = {**jobs.Source(str(source), pictures=pictures).facts(), "judge": judge.facts()}
    with jobs.resumable(out, asked) as journal:
        done = journal.finished
        result = Scored(out, len(rows), resumed=len(done))
        progress(len(done), len(rows))
        for part in _parts(rows):  # those of one pass: a judge's rounding may follow from a batch
            if left := [row for row in part if row.id not in done]:
                _judge(judge, left, journal)
                progress(len(left), len(rows))
        verdicts = [_read(journal.done[row.id], row) for row in rows]
        if isinstance(judge, Settles):
            verdicts = judge.settle(verdicts)
            result.notes.append(f"{judge.name}: {judge.chosen(verdicts)}")
        _count(rows, verdicts, result)
        _refuse_lost(result, source, most_lost)
        lines = (
            judged_line(row, row.unfolded(one), judge.name)
            for row, one in zip(rows, verdicts, strict=True)
        )
        jobs.write_lines(out, lines)
    if bias := order_bias(result.counts):
        result.notes.append(bias)
    if found := agreement(read_judged(out)):
        result.notes.append(found.text())
    return result


def _judge(judge: Judge, part: Sequence[Row], journal: jobs.Journal) -> None:
    """Ask about some rows, and write down what is said; a row that is lost may be asked again."""
    drawn = [row.drawn for row in part if row.drawn is not None]
    said = (
        dict(zip([one.id for one in drawn], _checked(judge, drawn), strict=True)) if drawn else {}
    )
    lines: dict[str, dict[str, Any]] = {}
    for row in part:
        verdict = said.get(row.id, Verdict([], note="all responses are empty"))
        lines[row.id] = _line(verdict)
    journal.add(lines)


def _line(verdict: Verdict) -> dict[str, Any]:
    """A verdict as the journal holds it; JSON knows no nan, so null stands for it."""

    def plain(values: Sequence[float]) -> list[float | None]:
        return [None if math.isnan(value) else float(value) for value in values]

    line: dict[str, Any] = {"rewards": plain(verdict.rewards)}
    if verdict.wins is not None:
        line["wins"] = [plain(own) for own in verdict.wins]
    if verdict.by:
        line["by"] = {name: plain(own) for name, own in verdict.by.items()}
    if verdict.counts:
        line["counts"] = dict(verdict.counts)
    if all(map(math.isnan, verdict.rewards)):
        line["broken"] = verdict.note or "not judged"
    return line


def _read(line: Mapping[str, Any], row: Row) -> Verdict:
    def back(values: Sequence[float | None]) -> list[float]:
        return [NAN if value is None else value for value in values]

    wins = line.get("wins")
    return Verdict(
        back(line["rewards"]),
        None if wins is None else [back(own) for own in wins],
        line.get("broken", ""),
        {name: back(own) for name, own in line.get("by", {}).items()},
        line.get("counts", {}),
    )


def _count(rows: Sequence[Row], verdicts: Sequence[Verdict], result: Scored) -> None:
    for row, verdict in zip(rows, verdicts, strict=True):
        result.counts.update(verdict.counts)
        for what in FAILURES:
            if verdict.counts.get(what):
                result.failures.setdefault(what, []).append(row.id)
        result.num_candidates += row.size
        result.empty += row.same.count(None)
        result.same += row.size - row.same.count(None) - len(set(row.same) - {None})
        missing = sum(map(math.isnan, verdict.rewards))
        if verdict.wins is not None and len(verdict.rewards) == 1:
            result.alone += 1
        elif missing == len(verdict.rewards):
            result.lost[row.id] = verdict.note or "not judged"
        else:
            result.num_judged += 1
            result.unjudged += missing


def _refuse_lost(result: Scored, source: Path, most: float | None) -> None:
    """Too many rows without a verdict: the journal stays, and the same call asks them again."""
    lost = len(result.lost)
    if result.num_judged + result.alone and (most is None or lost <= most * result.num_rows):
        return
    limit = "" if most is None else f", more than {most:.0%}"
    raise DataError(
        f"{source}: {lost} of {result.num_rows} rows have no verdict{limit}: "
        f"{'; '.join(result.reasons())}. The verdicts are in {result.out}.partial; run it again "
        "to ask about these rows again"
    )
