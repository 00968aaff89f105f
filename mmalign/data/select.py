"""From K rewards of one prompt's responses to the pairs that are trained on.

A pair is (chosen, rejected), two indices into the K responses: equal texts stay apart. Responses
with equal rewards never form a pair.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mmalign.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

    Floats = NDArray[np.float64]

Pair = tuple[int, int]


def best_worst(rewards: Sequence[float]) -> Pair:
    """The first of the highest and the first of the lowest rewards; refuses equal rewards."""
    best, worst = max(rewards), min(rewards)
    if best == worst:
        raise DataError(f"{len(rewards)} responses all have the reward {best:g}; none is better")
    return rewards.index(best), rewards.index(worst)


def all_pairs(rewards: Sequence[float], margin: float = 0.0) -> list[Pair]:
    """Every pair whose rewards differ by more than `margin`, in reward units."""
    indices = range(len(rewards))
    return [(i, j) for i in indices for j in indices if rewards[i] - rewards[j] > margin]


def wider_than(pairs: Sequence[Pair], rewards: Sequence[float], margin: float) -> list[Pair]:
    """The pairs whose rewards differ by more than `margin`, in reward units."""
    return [(i, j) for i, j in pairs if rewards[i] - rewards[j] > margin]


def first_round(rewards: Sequence[float], order: Sequence[int] | None = None) -> list[Pair]:
    """Neighbours in `order` as disjoint pairs: at most K // 2 of them."""
    order = range(len(rewards)) if order is None else order
    matches = [_decide(rewards, i, j) for i, j in zip(order[::2], order[1::2], strict=False)]
    return wider_than(matches, rewards, 0.0)


def tournament(rewards: Sequence[float], order: Sequence[int] | None = None) -> list[Pair]:
    """A knock-out: neighbours in `order` meet, winners meet again; K - 1 pairs less the draws.

    Args:
        rewards: Length K, any unit.
        order: The first round's seating; the given order when left out. Shuffle it to draw lots.

    Source: Liu et al. 2023, arXiv:2309.06657 (RSO).
    """
    standing = list(range(len(rewards)) if order is None else order)
    pairs: list[Pair] = []
    while len(standing) > 1:
        matches = [
            _decide(rewards, i, j) for i, j in zip(standing[::2], standing[1::2], strict=False)
        ]
        pairs += matches
        standing = [winner for winner, _ in matches] + standing[2 * len(matches) :]
    return wider_than(pairs, rewards, 0.0)


def _decide(rewards: Sequence[float], i: int, j: int) -> Pair:
    return (i, j) if rewards[i] >= rewards[j] else (j, i)


def rejection_rounds(
    rewards: ArrayLike, uniforms: ArrayLike, *, beta: float = 0.5
) -> list[list[int]]:
    """Rounds of statistical rejection sampling: which responses each round accepts.

    accept i  if  u_i < exp((r_i - r_max) / beta),  r_max over the responses that are left

    Each round accepts at least the best response that is left, and accepted ones leave after it.

    Args:
        rewards: [K] any unit.
        uniforms: [rounds, K] draws from [0, 1).
        beta: Temperature, in units of the reward. Large keeps all, small keeps the best.

    Source: Liu et al. 2023, arXiv:2309.06657, algorithm 1 (RSO).
    """
    r, u = np.asarray(rewards, dtype=float), np.asarray(uniforms, dtype=float)
    if not beta > 0:
        raise DataError(f"beta is {beta}; it must be above 0, in units of the reward")
    if not np.isfinite(r).all():
        raise DataError("rejection sampling needs finite rewards")
    left = np.arange(len(r))
    rounds: list[list[int]] = []
    for draws in u:
        if not len(left):
            break
        accepted = draws[left] < np.exp((r[left] - r[left].max()) / beta)
        rounds.append(left[accepted].tolist())
        left = left[~accepted]
    return rounds


def rejection_sample(
    rewards: ArrayLike, size: int, rng: np.random.Generator, *, beta: float = 0.5
) -> list[int]:
    """The first `size` responses that `rejection_rounds` accepts.

    Departs: more responses than there are is an error; the published loop would not end.
    """
    r: NDArray[Any] = np.asarray(rewards, dtype=float)
    if not 0 < size <= len(r):
        raise DataError(f"cannot keep {size} of {len(r)} responses; size must be 1 to {len(r)}")
    rounds = rejection_rounds(r, rng.random((len(r), len(r))), beta=beta)
    return [index for accepted in rounds for index in accepted][:size]
