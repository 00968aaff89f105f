"""Sums per unit, from which every number of a benchmark follows, and the bootstrap over units.

A unit is what was drawn as one piece: a pair of questions, or a video with all of its questions.
Every metric is a function of sums over units, so that a resample of units is a product of counts
with one matrix, and two runs are resampled alike.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Sums = Mapping[str, Floats]

NUM_RESAMPLES = 1000
_CHUNK = 64


class Sheet:
    """Columns of numbers with a row a unit."""

    def __init__(self) -> None:
        self._cells: dict[str, dict[str, float]] = {}

    def add(self, unit: str, **values: float) -> None:
        """Add to the sums of a unit; without values it is only known to be there."""
        self.put(unit, values)

    def put(self, unit: str, values: Mapping[str, float]) -> None:
        """The same, for names that are no identifiers."""
        cells = self._cells.setdefault(unit, defaultdict(float))
        for name, value in values.items():
            cells[name] += float(value)

    @property
    def units(self) -> list[str]:
        """In the order of their names: the order of a file does not matter."""
        return sorted(self._cells)

    def columns(self) -> list[str]:
        """Names in the order in which they first came up."""
        return list(dict.fromkeys(name for cells in self._cells.values() for name in cells))

    def matrix(self, columns: list[str]) -> Floats:
        """The sums, [units, columns]."""
        rows = [[self._cells[unit].get(name, 0.0) for name in columns] for unit in self.units]
        return np.asarray(rows, dtype=np.float64).reshape(len(rows), len(columns))

    def total(self) -> dict[str, Floats]:
        """Sums over all units, [1] each."""
        columns = self.columns()
        return _named(columns, self.matrix(columns).sum(0, keepdims=True))

    def resampled(self, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> dict[str, Floats]:
        """Sums over units drawn with replacement, [resamples] each.

        The draws are those of `mmalign.evaluate.bootstrap_interval`, unit by unit.
        """
        columns = self.columns()
        matrix = self.matrix(columns)  # [U, C]
        size = len(matrix)
        sums = [counts @ matrix for counts in _draws(size, num_resamples, seed)]  # [chunk, C]
        return _named(columns, np.concatenate(sums))


def _draws(size: int, num_resamples: int, seed: int) -> Iterator[Floats]:
    """How often each unit is drawn, [chunk, units] at a time."""
    rng = np.random.default_rng(seed)
    for start in range(0, num_resamples, _CHUNK):
        count = min(_CHUNK, num_resamples - start)
        drawn = [np.bincount(rng.integers(0, size, size), minlength=size) for _ in range(count)]
        yield np.asarray(drawn, dtype=np.float64)


def _named(columns: list[str], sums: Floats) -> dict[str, Floats]:
    return {name: sums[:, i] for i, name in enumerate(columns)}


def share(part: Floats, whole: Floats) -> Floats:
    """part / whole; nan where there is nothing to divide by."""
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=whole != 0)


def mean(values: list[Floats]) -> Floats:
    """Unweighted mean of metrics, over those that have a value in a resample."""
    stacked = np.stack(values)  # [groups, R]
    present = ~np.isnan(stacked)
    return share(np.where(present, stacked, 0.0).sum(0), present.sum(0).astype(np.float64))


def interval(values: Floats, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval; resamples in which a metric has no value do not count."""
    present = values[~np.isnan(values)]
    if not len(present):
        return (float("nan"), float("nan"))
    low, high = np.quantile(present, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
