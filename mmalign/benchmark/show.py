"""Scores and comparisons as tables for a terminal of 80 columns."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterable

from rich.console import Console
from rich.table import Table

from mmalign.benchmark.base import Benchmark
from mmalign.benchmark.compare import Comparison
from mmalign.benchmark.registry import BENCHMARKS
from mmalign.benchmark.score import Score

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
