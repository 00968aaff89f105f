"""How sure a mean, a difference of two models or a win rate is: bootstrap over rows.

Rows, pairs or prompts are drawn with replacement. Two models are resampled alike, so that what
makes a row easy for both does not widen the interval of their difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmalign.errors import DataError

Floats = NDArray[np.float64]

LEVEL = 0.95
NUM_RESAMPLES = 1000
_CHUNK = 64  # resamples counted at one time


def percentile_interval(resampled: ArrayLike, level: float = LEVEL) -> tuple[float, float]:
    """Where the middle `level` of resampled values lies; those that are nan do not count."""
    values = np.asarray(resampled, dtype=np.float64)
    present = values[~np.isnan(values)]
    if not len(present):
        return (float("nan"), float("nan"))
    low, high = np.quantile(present, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_interval(
    values: Floats, *, level: float = LEVEL, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values` [N], rows drawn with replacement.

    For a difference of two models give the differences row by row.
    """
    rng = np.random.default_rng(seed)
    size = len(values)
    resampled: list[float] = []
    while len(resampled) < num_resamples:  # many at once, in a small buffer
        count = min(num_resamples - len(resampled), max(1, 2**14 // size))
        resampled += values[rng.integers(0, size, (count, size))].mean(1).tolist()
    return percentile_interval(resampled, level)


def share_interval(hits: int, count: int) -> tuple[float, float]:
    """95 % interval of a share by Wilson's score, which has a width at 0 and 1 too."""
    z = 1.96
    middle = (hits + z**2 / 2) / (count + z**2)
    half = z / (count + z**2) * (hits * (count - hits) / count + z**2 / 4) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def resample_counts(size: int, num_resamples: int, seed: int) -> Iterator[Floats]:
    """How often each of `size` rows is drawn, [chunk, size] at a time.

    The draws are those of `bootstrap_interval`. A metric that is a function of sums over rows is
    resampled by a product of these counts with the rows' columns.
    """
    rng = np.random.default_rng(seed)
    for start in range(0, num_resamples, _CHUNK):
        count = min(_CHUNK, num_resamples - start)
        drawn = [np.bincount(rng.integers(0, size, size), minlength=size) for _ in range(count)]
        yield np.asarray(drawn, dtype=np.float64)


@dataclass(frozen=True, slots=True)
class WinRate:
    """Scores of two models, compared prompt by prompt.

    The greater score wins strictly; ties count for nobody.

    Attributes:
        a: Share of prompts at which the first model has the greater score.
        b: The same for the second.
        ties: Share with equal scores; the three add to 1.
        interval: 95 % of `a`, bootstrapped over prompts.
        mean_a: Mean score of the first model.
        mean_b: Mean score of the second.
        mean_difference: mean_a - mean_b.
        difference_interval: 95 % of it, bootstrapped over prompts.
        num_prompts: How many were compared.
    """

    a: float
    b: float
    ties: float
    interval: tuple[float, float]
    mean_a: float
    mean_b: float
    mean_difference: float
    difference_interval: tuple[float, float]
    num_prompts: int


def win_rate(scores_a: ArrayLike, scores_b: ArrayLike, *, seed: int = 0) -> WinRate:
    """Compare scores of the same prompts.

    Args:
        scores_a: [N] under any scorer, more is better.
        scores_b: [N] of the same prompts in the same order.
        seed: Of the bootstrap's draws.

    Raises:
        DataError: The two differ in shape, are empty, or hold what is not a finite number.
    """
    a, b = (np.asarray(scores, dtype=np.float64) for scores in (scores_a, scores_b))
    if a.ndim != 1 or a.shape != b.shape or not len(a):
        raise DataError(
            f"scores of shapes {list(a.shape)} and {list(b.shape)} cannot be compared; give one "
            "score a prompt, of the same prompts"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise DataError("scores to compare must be finite numbers; some are nan or infinite")
    wins, difference = (a > b).astype(np.float64), a - b
    return WinRate(
        a=float(wins.mean()),
        b=float((a < b).mean()),
        ties=float((a == b).mean()),
        interval=bootstrap_interval(wins, seed=seed),
        mean_a=float(a.mean()),
        mean_b=float(b.mean()),
        mean_difference=float(difference.mean()),
        difference_interval=bootstrap_interval(difference, seed=seed),
        num_prompts=len(a),
    )
