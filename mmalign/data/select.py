"""From K rewards to the pairs that are trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

Pair = tuple[int, int]
"""Indices (chosen, rejected) into the K candidates."""


def best_worst(rewards: Sequence[float]) -> Pair:
    """The first of the highest and the first of the lowest rewards."""
    return rewards.index(max(rewards)), rewards.index(min(rewards))


def all_pairs(rewards: Sequence[float], margin: float = 0.0) -> list[Pair]:
    """Every pair whose rewards differ by more than `margin`, in reward units."""
    indices = range(len(rewards))
    return [(i, j) for i in indices for j in indices if rewards[i] - rewards[j] > margin]
