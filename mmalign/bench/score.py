"""The numbers of one run on one benchmark, and of two runs on the same questions, with
intervals; as JSON, and as tables for a terminal of 80 columns.
"""

from __future__ import annotations

import io
import json
import textwrap
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from mmalign.bench.base import Benchmark, Prediction, distinct, named
from mmalign.data.jobs import write_lines
from mmalign.errors import DataError
from mmalign.safe import write_text
from mmalign.stats import NUM_RESAMPLES, percentile_interval


@dataclass(frozen=True, slots=True)
class Reading:
    """How answers were read.

    Attributes:
        kind: The benchmark.
        legacy: Whether answers were read as the published code does.
        code: Whose published code was followed, where there are several.
    """

    kind: type[Benchmark]
    legacy: bool
    code: str

    @property
    def headline(self) -> str:
        """The metric to report."""
        return self.kind.headline

    def summary(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "benchmark": self.kind.name,
            "reading": "legacy" if self.legacy else "strict",
            **({"code": self.code} if self.code else {}),
            "headline": self.headline,
        }


def _reading(benchmark: Benchmark, legacy: bool) -> tuple[type[Benchmark], bool, str]:
    """The fields of `Reading`; a legacy one follows the first of several codes by default."""
    code = (benchmark.code or next(iter(benchmark.codes), "")) if legacy else ""
    return type(benchmark), legacy, code


@dataclass(frozen=True, slots=True)
class Score(Reading):
    """What `mmalign bench score` finds.

    Attributes:
        metrics: All of them; shares are in [0, 1].
        intervals: 95 %, bootstrapped over units.
        sizes: How many questions or pairs a metric is over.
        counts: `questions`, `units`, `missing` (no answer at all), `unmatched` (an answer that is
            not understood), `left_out` (by the published code).
        notes: What a reader has to know.
        rows: One a question: id, task, answer, prediction, what was read, whether it is right.
    """

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    sizes: dict[str, int]
    counts: dict[str, int]
    notes: list[str]
    rows: list[dict[str, Any]]

    def summary(self) -> dict[str, Any]:
        """All but the rows, as JSON."""
        metrics = {
            name: {
                "value": _json(value),
                "interval": [_json(bound) for bound in self.intervals[name]],
                "n": self.sizes.get(name),
            }
            for name, value in self.metrics.items()
        }
        rest = {"metrics": metrics, "counts": self.counts, "notes": self.notes}
        return Reading.summary(self) | rest

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
    found = benchmark.metrics(sheet.total())
    resampled = benchmark.metrics(sheet.resampled(num_resamples=num_resamples, seed=seed))
    told = ("id", "task", "answer", "prediction")
    judged = [
        {name: getattr(row, name) for name in told} | asdict(verdict)
        for row, verdict in zip(rows, verdicts, strict=True)
    ]
    missing = sum(row.prediction is None for row in rows)
    return Score(
        *_reading(benchmark, legacy),
        metrics={name: float(metric.value[0]) for name, metric in found.items()},
        intervals={name: percentile_interval(resampled[name].value) for name in found},
        sizes={name: int(metric.size[0]) for name, metric in found.items()},
        counts={
            "questions": len(rows),
            "units": len(sheet.units),
            "missing": missing,
            "unmatched": len(_unmatched(judged)),
            "left_out": sum(not verdict.counted for verdict in verdicts),
        },
        notes=benchmark.notes(),
        rows=judged,
    )


def _unmatched(rows: list[dict[str, Any]]) -> list[str]:
    """Answers that are not understood."""
    return [r["prediction"] for r in rows if r["read"] is None and r["prediction"] is not None]


@dataclass(frozen=True, slots=True)
class Difference:
    """One metric of two runs.

    Attributes:
        a: Of the first run.
        b: Of the second.
        difference: b - a, so that more is better for the second.
        interval: 95 % of it; the same units are drawn for both runs.
        above_0: Share of resamples in which it is above 0; below_0: under 0.
    """

    a: float
    b: float
    difference: float
    interval: tuple[float, float]
    above_0: float
    below_0: float


@dataclass(frozen=True, slots=True)
class Comparison(Reading):
    """What `mmalign bench compare` finds.

    Attributes:
        differences: By metric.
        num_units: How many pairs or videos were drawn from.
        changed: Questions that only the second run has right, and only the first.
    """

    differences: dict[str, Difference]
    num_units: int
    changed: tuple[int, int]

    def summary(self) -> dict[str, Any]:
        """As JSON; a metric without a value has no row."""
        metrics = {
            name: asdict(found)
            for name, found in self.differences.items()
            if found.difference == found.difference
        }
        only_b, only_a = self.changed
        counts = {"units": self.num_units, "only_b_right": only_b, "only_a_right": only_a}
        return Reading.summary(self) | counts | {"metrics": metrics}


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
    tallies = [benchmark.tally(rows, legacy) for rows in (a, b)]
    sheets = [sheet for sheet, _ in tallies]
    if sheets[0].units != sheets[1].units:
        other = set(sheets[0].units) ^ set(sheets[1].units)
        raise DataError(f"A and B are grouped otherwise (pair_id, meta.video): {named(other)}")
    totals = [benchmark.metrics(sheet.total()) for sheet in sheets]
    drawn = [
        benchmark.metrics(sheet.resampled(num_resamples=num_resamples, seed=seed))
        for sheet in sheets
    ]
    differences: dict[str, Difference] = {}
    for name in (name for name in totals[0] if name in totals[1]):
        change = drawn[1][name].value - drawn[0][name].value  # [R]
        present = change[~np.isnan(change)]
        first, second = (float(total[name].value[0]) for total in totals)
        differences[name] = Difference(
            first,
            second,
            second - first,
            percentile_interval(change),
            above_0=float((present > 0).mean()) if len(present) else float("nan"),
            below_0=float((present < 0).mean()) if len(present) else float("nan"),
        )
    right_a, right_b = (
        {row.id for row, verdict in zip(rows, verdicts, strict=True) if verdict.right}
        for rows, (_, verdicts) in zip((a, b), tallies, strict=True)
    )
    return Comparison(
        *_reading(benchmark, legacy),
        differences,
        len(sheets[0].units),
        (len(right_b - right_a), len(right_a - right_b)),
    )


def _same(a: dict[str, Prediction], b: dict[str, Prediction]) -> None:
    only = {"A": a.keys() - b.keys(), "B": b.keys() - a.keys()}
    if any(only.values()):
        parts = [
            f"{len(ids)} ids are only in {run}: {named(ids)}" for run, ids in only.items() if ids
        ]
        raise DataError(
            f"the runs answer different questions; {'; '.join(parts)}. Give the question files "
            "with --questions, and what a run did not answer counts as missing"
        )
    other = [key for key in a if a[key].answer != b[key].answer]
    if other:
        raise DataError(f"A and B differ in what is right for {len(other)} ids: {named(other)}")


WIDTH = 80


def score_text(found: Score) -> str:
    """A table with a row a metric, and what was not understood below it."""
    kind = found.kind
    table = _table({"value": "right", "95 %": "left", "n": "right"})
    for name, label in _rows(found.metrics, table):
        between = " to ".join(_number(kind, name, bound) for bound in found.intervals[name])
        value, size = _number(kind, name, found.metrics[name]), found.sizes.get(name, "")
        table.add_row(label, value, between, str(size))
    counts = found.counts
    lines = [
        _head(found),
        _printed(table),
        f"{counts['questions']} questions; 95 % by resampling {counts['units']} {kind.unit}s",
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
    kind = found.kind
    table = _table({"A": "right", "B": "right", "B - A": "right", "95 %": "left", "> 0": "right"})
    for name, label in _rows(found.differences, table):
        part = found.differences[name]
        values = [_number(kind, name, value) for value in (part.a, part.b)]
        change, *ends = (
            _number(kind, name, value, sign="+") for value in (part.difference, *part.interval)
        )
        table.add_row(label, *values, change, " to ".join(ends), f"{part.above_0:.1%}")
    gained, lost = found.changed
    lines = [
        _head(found),
        f"A  {names[0]}",
        f"B  {names[1]}",
        _printed(table),
        f"{gained} questions only B has right, {lost} only A; the same {found.num_units} "
        f"{kind.unit}s resampled in both",
        "> 0: share of resamples in which B - A is above 0",
    ]
    return "\n".join(lines)


def listing(kinds: Iterable[type[Benchmark]]) -> str:
    """Benchmarks with their file, metric and readings."""
    blocks: list[str] = []
    for kind in kinds:
        parts = {
            "file": kind.layout,
            "metric": kind.metric,
            "strict": kind.strict,
            "legacy": kind.legacy,
            "source": kind.source,
        }
        lines = [
            textwrap.fill(text, WIDTH, initial_indent=f"  {label:<8}", subsequent_indent=" " * 10)
            for label, text in parts.items()
        ]
        blocks.append("\n".join([f"{kind.name}    {kind.title}", *lines]))
    return "\n\n".join(blocks)


def _head(found: Reading) -> str:
    whose = f"{found.code}'s" if found.code else "the published"
    reading = f"legacy: read as {whose} code does" if found.legacy else "strict"
    return f"{found.kind.title} ({reading}); to report: {found.headline}"


def _table(columns: dict[str, Literal["left", "right"]]) -> Table:
    """A table whose first column, with the names of metrics, wraps."""
    table = Table("", box=None, pad_edge=False, show_edge=False)
    table.columns[0].overflow = "fold"
    for title, justify in columns.items():
        table.add_column(title, justify=justify, no_wrap=True, overflow="fold")
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


def _number(kind: type[Benchmark], name: str, value: float, sign: Literal["", "+"] = "") -> str:
    if value != value:
        return "-"
    return f"{value:{sign}.3f}" if name in kind.plain else f"{value:{sign}.1%}"


def _printed(table: Table) -> str:
    stream = io.StringIO()
    Console(file=stream, width=WIDTH, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in stream.getvalue().rstrip("\n").split("\n"))


def _examples(found: Score, most: int = 2) -> str:
    texts = _unmatched(found.rows)
    shown = [repr(text if len(text) <= 30 else f"{text[:27]}...") for text in texts[:most]]
    return ", ".join(shown) + (", ..." if len(texts) > most else "")
