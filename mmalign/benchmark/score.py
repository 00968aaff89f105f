"""The numbers of one run on one benchmark, with intervals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmalign.benchmark.base import Benchmark
from mmalign.benchmark.records import Prediction, write_lines
from mmalign.benchmark.tally import NUM_RESAMPLES, interval


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
        summary.write_text(json.dumps(self.summary(), indent=2) + "\n", encoding="utf-8")
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
        intervals={name: interval(resampled[name]) for name in values},
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
