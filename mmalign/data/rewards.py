"""Rewards that methods compute from judgements, before `select.py` makes pairs of them.

Letters: K responses of a prompt, M objectives, N rows or samples, U users, G groups.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mmalign.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Floats = NDArray[np.float64]


def _floats(values: ArrayLike) -> Floats:
    return np.asarray(values, dtype=np.float64)


def win_rate(preference: ArrayLike) -> Floats:
    """Self-play reward: how often a response beats the others, mean over j != i of P(i beats j).

    Args:
        preference: [K, K], entry (i, j) the probability that i is preferred to j. The diagonal is
            not read. Cycles are allowed.

    Returns:
        [K], in [0, 1].

    Source: Swamy et al. 2024, arXiv:2401.04056 (minimaximalist self-play).
    """
    p = _floats(preference)
    if p.ndim != 2 or p.shape[0] != p.shape[1] or len(p) < 2:
        raise DataError(f"preference has shape {list(p.shape)}; it must be [K, K] with K >= 2")
    return (p.sum(1) - p.diagonal()) / (len(p) - 1)


def leave_one_out(rewards: ArrayLike) -> Floats:
    """Each reward less the mean of the others; [K] -> [K]."""
    r = _floats(rewards)
    return r - (r.sum() - r) / (len(r) - 1)


def direction(degrees: ArrayLike) -> Floats:
    """Unit vectors in a plane of two objectives: [...] degrees from the first axis -> [..., 2].

    A condition in a prompt carries them as whole numbers, round(100 * v).

    Source: Wang et al. 2024, arXiv:2402.18571 (directional preference alignment).
    """
    radians = np.deg2rad(_floats(degrees))
    return np.stack([np.cos(radians), np.sin(radians)], axis=-1)


def project(rewards: ArrayLike, towards: ArrayLike) -> Floats:
    """Rewards of several objectives along a direction: [K, M], [M] -> [K]."""
    return _floats(rewards) @ _floats(towards)


def tool_reward(calls: ArrayLike, fewest: ArrayLike | None = None, budget: float = 4.0) -> Floats:
    """How sparingly tools were called, 0 to 1; times correctness, it is the reward.

    With the fewest calls n of a correct answer in the group: 1 if m = n = 0, cos(m pi / (2 m + c))
    if only n = 0, else sin(f pi / (2 n)) with f = 2 n m / (m + n). Without: cos(m pi / (2 m + c)).

    Args:
        calls: [K] calls m used.
        fewest: [K] n; None where there is no group to compare with.
        budget: Smoothing constant c, in calls.

    Source: Wang et al. 2025 (OTC, optimal tool calls), as quoted in public notes.
    """
    m = _floats(calls)
    alone = np.cos(m * np.pi / (2.0 * m + budget))
    if fewest is None:
        return alone
    n = _floats(fewest)
    grouped = np.sin(m / np.maximum(m + n, 1.0) * np.pi)
    return np.where(n == 0, alone, grouped)


def assign_users(margins: ArrayLike) -> tuple[NDArray[np.intp], Floats]:
    """The E step of MaxMin: each user goes to the reward model that explains their choices best.

    Args:
        margins: [U, G, N] reward of chosen less rejected under each group's model.

    Returns:
        [U] group of each user, and [U, G] log-likelihoods sum over n of log sigmoid(margin).

    Source: Chakraborty et al. 2024, arXiv:2402.08925 (MaxMin-RLHF).
    """
    loglik = -np.logaddexp(0.0, -_floats(margins)).sum(-1)
    return loglik.argmax(1), loglik


def worst_group(rewards: ArrayLike) -> int:
    """The group whose mean reward on the current samples is lowest; [G, N]. Source: MaxMin-RLHF."""
    return int(_floats(rewards).mean(1).argmin())


def precision_reward(quality: ArrayLike, low: float = 0.5, high: float = 0.75) -> Floats:
    """Matched boxes' quality squashed: 0 below `low`, 1 above `high`, itself between. [N] -> [N].

    Source: Zhan et al. 2025, arXiv:2503.18013 (Vision-R1), released code; (0.5, 0.75) in stage 1,
        (0.75, 0.9) in stage 2.
    """
    q = _floats(quality)
    return np.where(q < low, 0.0, np.where(q > high, 1.0, q))


def recall_hits(quality: ArrayLike, threshold: float = 0.5) -> Floats:
    """1 for a box matched well enough, else 0; [N] -> [N]. Source: as `precision_reward`."""
    hits: NDArray[Any] = _floats(quality) >= threshold
    return hits.astype(np.float64)
