"""How far a judge agrees with people: over pairs of responses that a human label orders."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from mmalign.data.fields import as_list, number
from mmalign.judging.base import Judged
from mmalign.stats import LEVEL, bootstrap_interval


@dataclass(frozen=True, slots=True)
class Agreement:
    """A judge beside human labels.

    Attributes:
        accuracy: Share of pairs with a human preference that the judge orders alike; a tie of the
            judge counts half.
        interval: 95 % of it, bootstrapped over rows: pairs of one prompt are drawn together.
        kappa: Cohen's kappa over three outcomes (first, tie, second) of all pairs: 0 by chance, 1
            where they always agree; nan where both know one outcome alone.
        num_pairs: Pairs that both have judged, human ties included.
        num_rows: Rows with such a pair.
        judge_ties: Share of pairs that the judge calls equal.
        human_ties: Share of pairs that people call equal.
    """

    accuracy: float
    interval: tuple[float, float]
    kappa: float
    num_pairs: int
    num_rows: int
    judge_ties: float
    human_ties: float

    def text(self) -> str:
        """In one line."""
        low, high = self.interval
        return (
            f"agreement with human labels: {self.accuracy:.1%} ({low:.1%} to {high:.1%}, "
            f"{LEVEL:.0%}), kappa {self.kappa:.2f}, {self.num_pairs} pairs of {self.num_rows} rows"
        )


def agreement(rows: Iterable[Judged], *, seed: int = 0) -> Agreement | None:
    """Compare a judge with the `human` labels of judged rows.

    Args:
        rows: Judged rows; those without `human` say nothing.
        seed: Of the bootstrap.

    Returns:
        None where no pair has both a human label and a verdict.
    """
    outcomes: list[tuple[int, int]] = []  # signs of (human, judge), a pair
    shares: list[tuple[float, int]] = []  # right, pairs with a human preference: a row
    for row in rows:
        own = _signs(row)
        outcomes += own
        told = [(human, judge) for human, judge in own if human]
        if told:
            right = sum(0.5 if not judge else float(human == judge) for human, judge in told)
            shares.append((right, len(told)))
    if not shares:
        return None
    signs = np.asarray(outcomes)
    right, count = np.asarray(shares, dtype=np.float64).T
    accuracy = float(right.sum() / count.sum())
    # A ratio of sums: its influence function is a mean of rows.
    interval = bootstrap_interval(accuracy + (right - accuracy * count) / count.mean(), seed=seed)
    return Agreement(
        accuracy,
        (max(0.0, interval[0]), min(1.0, interval[1])),
        cohens_kappa(signs[:, 0], signs[:, 1]),
        len(signs),
        len(shares),
        float((signs[:, 1] == 0).mean()),
        float((signs[:, 0] == 0).mean()),
    )


def cohens_kappa(first: np.ndarray, second: np.ndarray) -> float:
    """(p - e) / (1 - e): agreement p of two raters [N], [N] beyond e, that of chance.

    Source: Cohen 1960, "A coefficient of agreement for nominal scales".
    """
    observed = float((first == second).mean())
    kinds = np.union1d(first, second)
    chance = sum(float((first == k).mean() * (second == k).mean()) for k in kinds)
    return (observed - chance) / (1.0 - chance) if chance < 1.0 else math.nan


def _signs(row: Judged) -> list[tuple[int, int]]:
    """For each pair of different responses whom people and whom the judge prefers: 1, 0, -1."""
    labels = [number(one) for one in as_list(row.row.line.get("human")) or ()]
    drawn = row.row.drawn
    found: list[tuple[int, int]] = []
    for i, j in combinations(drawn.places if drawn and labels else (), 2):
        a, b = labels[i], labels[j]
        gap = row.scores[i] - row.scores[j] if row.wins is None else row.wins[i][j] - 0.5
        if a is not None and b is not None and not math.isnan(gap):
            found.append((_sign(a - b), _sign(gap)))
    return found


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
