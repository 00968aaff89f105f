"""Losses on K ranked responses of one prompt."""

from __future__ import annotations

from mmalign.core.links import Link
from mmalign.core.listwise import LambdaRank, PlackettLuce
from mmalign.core.objective import Objective
from mmalign.core.score import Score
from mmalign.core.terms import Preference


def plackett_luce(beta: float = 0.1) -> Objective:
    """Likelihood of a whole ranking.

    loss = sum over ranks k of [log sum of exp(r_j) over j not ranked above k] - r_k, r = beta *
    log-ratio

    Args:
        beta: Inverse temperature of the implicit reward, in 1/nats.

    Source: Rafailov et al. 2023, arXiv:2305.18290, appendix (Plackett-Luce form).
    Departs: tied responses share their denominator.
    """
    return Objective(Preference(Score(beta), PlackettLuce()))


def tpo_tree(beta: float = 0.1, weighted: bool = True) -> Objective:
    """Tree preference optimisation: LambdaRank over the responses, steps weighted.

    loss = sum over pairs v_i > v_j of lambda_ij * (-log sigmoid(r_i - r_j)),
    lambda_ij = |2^v_i - 2^v_j| * |1/log(1 + rank_i) - 1/log(1 + rank_j)|,
    r = beta * weighted log-ratio, v = labels

    Args:
        beta: Inverse temperature of the implicit reward, in 1/nats.
        weighted: Needs the adapter's step weights (text.masks kind steps); false for plain
            log-ratios.

    Source: Liao et al. 2024, arXiv:2410.12854, in the LiPO-lambda form that the paper names.
    Departs: the released code wraps the list loss in another -log sigmoid, so that descent raises
        the ranking loss; it also counts the diagonal and only the sign of label differences.
    """
    link: Link = LambdaRank()
    return Objective(Preference(Score(beta, weighted=weighted), link))
