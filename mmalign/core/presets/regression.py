"""Squared losses: log-ratios, or their margin, regressed to a target."""

from __future__ import annotations

import math
from typing import Literal

from mmalign.core.links import Squared, SquaredEach, SquaredToLabels
from mmalign.core.numerics import require
from mmalign.core.objective import Objective
from mmalign.core.score import Score
from mmalign.core.terms import Preference


def sppo(beta: float = 1e-3, compat: Literal["trl-1.16"] | None = None) -> Objective:
    """Self-play preference optimisation: log-ratios regressed to win probabilities.

    loss = [(r_w / beta - (P_w - 1/2) / beta)^2 + (r_l / beta - (P_l - 1/2) / beta)^2] / 2,
    r = beta * log-ratio, P = labels: (1, 0) is the hard form, (p, 1 - p) the soft one

    Args:
        beta: The paper's 1/eta, in 1/nats; targets are at most 1/(2 beta) nats.
        compat: "trl-1.16" sums the two squares instead of halving.

    Source: Wu et al. 2024, arXiv:2405.00675, eq. 4.7, and released code.
    Departs: nothing.
    """
    share = 0.5 if compat is None else 1.0
    return Objective(Preference(Score(beta), SquaredEach(scale=beta, share=share)))


def gpo(beta: float = 2e-3) -> Objective:
    """General preference optimisation: log-ratios regressed to average preference scores.

    loss = [(r_w - s_w)^2 + (r_l - s_l)^2] / (2 beta^2), r = beta * log-ratio,
    s = labels: each response's average score against samples of the reference

    Args:
        beta: In 1/nats; the targets are s / beta nats. 0.001 to 0.002 in the released recipe.

    Source: Zhang et al. 2024, arXiv:2410.02197; loss body reconstructed.
    Departs: scores come with the data, as labels.
    """
    return Objective(Preference(Score(beta), SquaredEach(scale=beta, offset=0.0)))


def inpo_nash(eta: float = 7.5e-3) -> Objective:
    """Iterative Nash policy optimisation: a squared loss against two references.

    loss = (m - 1 / (2 eta))^2,
    m = margin of log pi - (tau/eta) log ref - (1 - tau/eta) log previous

    The reference is the mixture: set reference.kind to mixture with weights tau/eta (the base
    model) and 1 - tau/eta (the round's start). With the base alone it is ipo with reduce sum.

    Args:
        eta: Step size, in 1/nats; the published tau is eta / 3.

    Source: Zhang et al. 2024, arXiv:2407.00617.
    Departs: tau lives in the reference's weights.
    """
    require(0.0 < eta < math.inf, "eta", eta, "above 0 and finite")
    return Objective(Preference(Score(eta), Squared(0.5, scale=eta)))


def online_ipo(beta: float = 0.1) -> Objective:
    """Online IPO on length-normalised log-ratios, the inner loss of EGPO.

    loss = (m - (p_0 - p_1) / beta)^2, m of per-token mean log-ratios, p = labels: win rates

    Args:
        beta: Regularisation, in 1/nats per token.

    Source: Zhou et al. 2025, arXiv:2503.08942 (EGPO), released code.
    Departs: win rates come with the data, as labels; the extragradient lives in the loop.
    """
    return Objective(Preference(Score(beta, reduce="mean"), SquaredToLabels(scale=beta)))
