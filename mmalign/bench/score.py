"""The numbers of one run on one benchmark, and of two runs on the same questions, with
intervals.
"""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from mmalign.bench.base import (
    Benchmark,
    Prediction,
    distinct,
    named,
)
from mmalign.bench.registry import BENCHMARKS
from mmalign.data.jobs import write_lines
from mmalign.errors import DataError
from mmalign.safe import write_text
from mmalign.stats import NUM_RESAMPLES, percentile_interval

# The numbers of one run on one benchmark, with intervals.


@dataclass(frozen=True, slots=True)
class Score:
    """What `mmalign bench score` finds.

    Attributes:
        benchmark: Its name.
        legacy: Whether answers were read as the published code does.
        headline: The metric to report.
        metrics: All of them; shares are in [0, 1].
        intervals: 95 %, bootstrapped over units.
        sizes: How many questions or pairs a metric is over.
        counts: `questions`, `units`, `missing` (no answer at all), `unmatched` (an answer that is
            not understood), `left_out` (by the published code).
        notes: What a reader has to know.
        rows: One a question: id, task, answer, prediction, what was read, whether it is right.
        code: Whose published code was followed, where there are several.
    """

    benchmark: str
    legacy: bool
    headline: str
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    sizes: dict[str, int]
    counts: dict[str, int]
    notes: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    code: str = ""

    def summary(self) -> dict[str, Any]:
        """All but the rows, as JSON."""
        return {
            "benchmark": self.benchmark,
            "reading": "legacy" if self.legacy else "strict",
            **({"code": self.code} if self.code else {}),
            "headline": self.headline,
            "metrics": {
                name: {
                    "value": _json(value),
                    "interval": [_json(bound) for bound in self.intervals[name]],
                    "n": self.sizes.get(name),
                }
                for name, value in self.metrics.items()
            },
            "counts": self.counts,
            "notes": self.notes,
        }

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write `score.json`, and `rows.jsonl` with what was made of each answer."""
        folder.mkdir(parents=True, exist_ok=True)
        summary, rows = folder / "score.json", folder / "rows.jsonl"
        write_text(summary, json.dumps(self.summary(), indent=2) + "\n")
        write_lines(rows, self.rows)
        return summary, rows


def _json(value: float) -> float | None:
    return None if value != value else value  # nan is no JSON


def score(
    benchmark: Benchmark,
    rows: Sequence[Prediction],
    *,
    legacy: bool = False,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Score:
    """Judge answers and count.

    Args:
        benchmark: Whose rules and metrics.
        rows: Questions with answers, each id once.
        legacy: Read answers as the published code does.
        num_resamples: Of the bootstrap over units.
        seed: Of its draws.
    """
    sheet, verdicts = benchmark.tally(rows, legacy)
    total = sheet.total()
    values = benchmark.metrics(total)
    resampled = benchmark.metrics(sheet.resampled(num_resamples=num_resamples, seed=seed))
    judged = list(zip(rows, verdicts, strict=True))
    return Score(
        benchmark.name,
        legacy,
        benchmark.headline,
        metrics={name: float(value[0]) for name, value in values.items()},
        intervals={name: percentile_interval(resampled[name]) for name in values},
        sizes=benchmark.sizes(total),
        counts={
            "questions": len(rows),
            "units": len(sheet.units),
            "missing": sum(row.prediction is None for row in rows),
            "unmatched": sum(
                row.prediction is not None and verdict.read is None for row, verdict in judged
            ),
            "left_out": sum(not verdict.counted for verdict in verdicts),
        },
        notes=benchmark.notes(),
        rows=[
            {
                "id": row.id,
                "task": row.task,
                "answer": row.answer,
                "prediction": row.prediction,
                "read": verdict.read,
                "right": verdict.right,
                "counted": verdict.counted,
            }
            for row, verdict in judged
        ],
        code=followed(benchmark, legacy),
    )


def followed(benchmark: Benchmark, legacy: bool) -> str:
    """Whose code a legacy reading follows; "" where there is one alone, or none is followed."""
    return (benchmark.code or next(iter(benchmark.codes), "")) if legacy else ""


# Two runs on the same questions: how far apart, and how surely.


@dataclass(frozen=True, slots=True)
class Difference:
    """One metric of two runs.

    Attributes:
        a: Of the first run.
        b: Of the second.
        difference: b - a, so that more is better for the second.
        interval: 95 % of it; the same units are drawn for both runs.
        above: Share of resamples in which it is above 0; below: under 0.
    """

    a: float
    b: float
    difference: float
    interval: tuple[float, float]
    above: float
    below: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """What `mmalign bench compare` finds.

    Attributes:
        benchmark: Its name.
        legacy: How answers were read.
        headline: The metric to report.
        differences: By metric.
        num_units: How many pairs or videos were drawn from.
        changed: Questions that only the second run has right, and only the first.
        code: Whose published code was followed, where there are several.
    """

    benchmark: str
    legacy: bool
    headline: str
    differences: dict[str, Difference]
    num_units: int
    changed: tuple[int, int]
    code: str = ""

    def summary(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "benchmark": self.benchmark,
            "reading": "legacy" if self.legacy else "strict",
            **({"code": self.code} if self.code else {}),
            "headline": self.headline,
            "units": self.num_units,
            "only_b_right": self.changed[0],
            "only_a_right": self.changed[1],
            "metrics": {
                name: {
                    "a": found.a,
                    "b": found.b,
                    "difference": found.difference,
                    "interval": list(found.interval),
                    "above_0": found.above,
                    "below_0": found.below,
                }
                for name, found in self.differences.items()
                if found.difference == found.difference  # a metric without a value has no row
            },
        }


def compare(
    benchmark: Benchmark,
    a: Sequence[Prediction],
    b: Sequence[Prediction],
    *,
    legacy: bool = False,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """Paired bootstrap: units are drawn with replacement, the same ones for both runs.

    Raises:
        DataError: The runs differ in their questions, or in what is right.
    """
    _same(distinct(a, "A"), distinct(b, "B"))
    (sheet_a, verdicts_a), (sheet_b, verdicts_b) = (
        benchmark.tally(rows, legacy) for rows in (a, b)
    )
    if sheet_a.units != sheet_b.units:
        other = set(sheet_a.units) ^ set(sheet_b.units)
        raise DataError(f"A and B are grouped otherwise (pair_id, meta.video): {named(other)}")
    totals = [benchmark.metrics(sheet.total()) for sheet in (sheet_a, sheet_b)]
    drawn = [
        benchmark.metrics(sheet.resampled(num_resamples=num_resamples, seed=seed))
        for sheet in (sheet_a, sheet_b)
    ]
    differences: dict[str, Difference] = {}
    for name in totals[0].keys() & totals[1].keys():
        change = drawn[1][name] - drawn[0][name]  # [R]
        present = change[~np.isnan(change)]
        first, second = (float(total[name][0]) for total in totals)
        differences[name] = Difference(
            first,
            second,
            second - first,
            percentile_interval(change),
            above=float((present > 0).mean()) if len(present) else float("nan"),
            below=float((present < 0).mean()) if len(present) else float("nan"),
        )
    right_a = {row.id: v.right for row, v in zip(a, verdicts_a, strict=True)}
    right_b = {row.id: v.right for row, v in zip(b, verdicts_b, strict=True)}
    return Comparison(
        benchmark.name,
        legacy,
        benchmark.headline,
        {name: differences[name] for name in totals[0] if name in differences},
        len(sheet_a.units),
        (
            sum(right and not right_a[key] for key, right in right_b.items()),
            sum(right and not right_b[key] for key, right in right_a.items()),
        ),
        followed(benchmark, legacy),
    )


def _same(a: dict[str, Prediction], b: dict[str, Prediction]) -> None:
    missing, more = a.keys() - b.keys(), b.keys() - a.keys()
    if missing or more:
        parts = [
            f"{len(ids)} ids are only in {run}: {named(ids)}"
            for run, ids in (("A", missing), ("B", more))
            if ids
        ]
        raise DataError(
            f"the runs answer different questions; {'; '.join(parts)}. Give the question files "
            "with --questions, and what a run did not answer counts as missing"
        )
    other = [key for key in a if a[key].answer != b[key].answer]
    if other:
        raise DataError(f"A and B differ in what is right for {len(other)} ids: {named(other)}")


# Scores and comparisons as tables for a terminal of 80 columns.

WIDTH = 80


def score_text(found: Score) -> str:
    """A table with a row a metric, and what was not understood below it."""
    kind = BENCHMARKS[found.benchmark]
    table = _table(("", "left"), ("value", "right"), ("95 %", "left"), ("n", "right"))
    for name, label in _rows(found.metrics, table):
        low, high = found.intervals[name]
        between = f"{_number(kind, name, low)} to {_number(kind, name, high)}"
        value, size = _number(kind, name, found.metrics[name]), found.sizes.get(name, "")
        table.add_row(label, value, between, str(size))
    counts = found.counts
    lines = [
        _head(kind, found),
        _printed(table),
        f"{counts['questions']} questions; 95 % by resampling {counts['units']} "
        f"{'pairs' if kind.unit == 'pair' else 'videos'}",
    ]
    wrong = "left out" if found.legacy and kind.skips_missing else "counted as wrong"
    if counts["missing"]:
        lines.append(f"{counts['missing']} questions have no answer: {wrong}")
    if counts["unmatched"]:
        lines.append(f"{counts['unmatched']} answers were not understood: {_examples(found)}")
        rated = sum(row["read"] is None and row["right"] for row in found.rows)
        if not found.legacy:
            more = f", but for {rated} that a judge rated 1" if rated else ""
            lines.append(f"what is not understood counts as wrong{more}")
    if counts["left_out"] > (counts["missing"] if found.legacy else 0):
        lines.append(f"{counts['left_out']} questions are left out, as the published code does")
    return "\n".join([*lines, *found.notes])


def comparison_text(found: Comparison, names: tuple[str, str]) -> str:
    """A table with both runs and their difference."""
    kind = BENCHMARKS[found.benchmark]
    columns = (("A", "right"), ("B", "right"), ("B - A", "right"), ("95 %", "left"))
    table = _table(("", "left"), *columns, ("> 0", "right"))
    for name, label in _rows(found.differences, table):
        part = found.differences[name]
        low, high = (_number(kind, name, bound, sign=True) for bound in part.interval)
        values = (_number(kind, name, value) for value in (part.a, part.b))
        change = _number(kind, name, part.difference, sign=True)
        table.add_row(label, *values, change, f"{low} to {high}", f"{part.above:.1%}")
    gained, lost = found.changed
    return "\n".join(
        [
            _head(kind, found),
            f"A  {names[0]}",
            f"B  {names[1]}",
            _printed(table),
            f"{gained} questions only B has right, {lost} only A; the same {found.num_units} "
            f"{'pairs' if kind.unit == 'pair' else 'videos'} resampled in both",
            "> 0: share of resamples in which B - A is above 0",
        ]
    )


def listing() -> str:
    """All benchmarks, with their file, metric and readings."""
    blocks: list[str] = []
    for name, kind in BENCHMARKS.items():
        parts = {
            "file": kind.layout,
            "metric": kind.metric,
            "strict": kind.strict,
            "legacy": kind.legacy,
            "source": kind.source,
        }
        blocks.append("\n".join([f"{name}    {kind.title}", *_wrapped(parts)]))
    return "\n\n".join(blocks)


def _wrapped(parts: dict[str, str]) -> Iterable[str]:
    from textwrap import wrap

    for label, text in parts.items():
        first, *rest = wrap(text, WIDTH - 10)
        yield f"  {label:<8}{first}"
        yield from (f"{'':<10}{line}" for line in rest)


def _head(kind: type[Benchmark], found: Score | Comparison) -> str:
    whose = f"{found.code}'s" if found.code else "the published"
    reading = f"legacy: read as {whose} code does" if found.legacy else "strict"
    return f"{kind.title} ({reading}); to report: {found.headline}"


def _table(*columns: tuple[str, str]) -> Table:
    table = Table(box=None, pad_edge=False, show_edge=False)
    for title, justify in columns:
        side = "left" if justify == "left" else "right"
        table.add_column(title, justify=side, no_wrap=bool(title), overflow="fold")  # names wrap
    return table


def _rows(names: Collection[str], table: Table) -> Iterable[tuple[str, str]]:
    """Metrics with their labels; a heading comes before those of one table."""
    before = ""
    for name in names:
        part, _, rest = name.partition("/")
        if rest and part != before:
            table.add_row(f"{part} by category" if part in names else f"by {part}")
        before = part if rest else ""
        yield name, f"  {rest}" if rest else name


def _number(kind: type[Benchmark], name: str, value: float, *, sign: bool = False) -> str:
    if value != value:
        return "-"
    share = name not in kind.plain
    return f"{value:{'+' if sign else ''}{'.1%' if share else '.3f'}}"


def _printed(table: Table) -> str:
    stream = io.StringIO()
    Console(file=stream, width=WIDTH, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in stream.getvalue().rstrip("\n").split("\n"))


def _examples(found: Score, most: int = 2) -> str:
    texts = [
        r["prediction"] for r in found.rows if r["read"] is None and r["prediction"] is not None
    ]
    shown = [repr(text if len(text) <= 30 else f"{text[:27]}...") for text in texts[:most]]
    return ", ".join(shown) + (", ..." if len(texts) > most else "")
