"""Two runs on the same questions: how far apart, and how surely."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmalign.benchmark.base import Benchmark
from mmalign.benchmark.records import Prediction, distinct, named
from mmalign.benchmark.score import followed
from mmalign.benchmark.tally import NUM_RESAMPLES, interval
from mmalign.errors import DataError


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
            interval(change),
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
