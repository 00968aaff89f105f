"""Variants of DPO: another clip, weight, reference or temperature."""

from __future__ import annotations

from typing import Literal

from mmalign.core.divergence import ChiSquaredKL
from mmalign.core.links import ClippedLogistic, Link, Logistic
from mmalign.core.objective import Objective
from mmalign.core.presets.pairwise import dpo
from mmalign.core.reweight import Wpo, reweight
from mmalign.core.score import Score
from mmalign.core.terms import Preference


def chi_po(beta: float = 0.1, r_max: float | None = None) -> Objective:
    """Chi-squared preference optimisation.

    loss = -log sigmoid(clip(beta * [phi(u_chosen) - phi(u_rejected)], -2 r_max, 2 r_max)),
    phi(u) = u + log u

    Args:
        beta: Scale of the implicit reward.
        r_max: Bound of the reward; None for no clipping. Clipped pairs have no gradient.

    Source: Huang et al. 2024, arXiv:2407.13399.
    Departs: the exponential u follows its tangent line beyond exp(30).
    """
    link: Link = Logistic() if r_max is None else ClippedLogistic(2.0 * r_max)
    return Objective(Preference(Score(beta, ChiSquaredKL()), link))


def wpo(
    beta: float = 0.1,
    clamp_max: float | None = 1.0,
    compat: Literal["trl-1.16"] | None = None,
) -> Objective:
    """Weighted preference optimisation: pairs the current policy might give count more.

    loss = -w log sigmoid(beta * m), w = min(clamp_max, w_chosen * w_rejected) without gradient,
    w_side = exp(mean over tokens of [log pi - log sum_v pi(v)^2])

    The same weight goes on any pair loss with the keyword `wpo: true`.

    Args:
        beta: Inverse temperature of the implicit reward, in 1/nats.
        clamp_max: Largest weight of a pair; None for no bound.
        compat: "trl-1.16" does not clamp.

    Source: Zhou et al. 2024, arXiv:2406.11827, eq. 2 and released code.
    Departs: nothing.
    """
    if compat is not None:
        clamp_max = None
    return reweight(dpo(beta), wpo=Wpo(clamp_max))


def dpo_gamma(beta: float = 0.1, gamma: float = 1.0) -> Objective:
    """DPO with a scaled reference.

    loss = -log sigmoid(beta * [log pi(chosen)/pi(rejected) - gamma log ref(chosen)/ref(rejected)])

    Args:
        beta: Inverse temperature of the implicit reward, in 1/nats.
        gamma: Weight of the reference: 1 is dpo, 0 is reference-free.

    Source: Chen et al. 2024, arXiv:2405.19534, preference ranking accuracy.
    Departs: nothing.
    """
    return Objective(Preference(Score(beta, reference_weight=gamma), Logistic()))


def flex_dpo(beta_chosen: float = 0.1, beta_rejected: float = 0.05) -> Objective:
    """DPO with one temperature per side.

    loss = -log sigmoid(beta_chosen * r_chosen - beta_rejected * r_rejected), r the log-ratios

    Args:
        beta_chosen: Scale of the chosen response's log-ratio, in 1/nats.
        beta_rejected: Scale of the rejected one's; smaller slows the fall of rejected likelihoods.

    Source: 3D-Properties, arXiv:2406.07327 (Flex-DPO).
    Departs: the default values are ours.
    """
    return Objective(Preference(Score((beta_chosen, beta_rejected)), Logistic()))
