"""Token-level losses: they read the KL at every position."""

from __future__ import annotations

from typing import Literal

from mmalign.core.links import Logistic
from mmalign.core.numerics import require
from mmalign.core.objective import Objective
from mmalign.core.regularisers import WeightL1
from mmalign.core.score import Score
from mmalign.core.terms import Preference, Term


def tdpo1(beta: float = 0.1) -> Objective:
    """Token-level DPO, first form.

    loss = -log sigmoid(beta * [m - (KL_rejected - KL_chosen)])

    m is the sequence log-ratio margin, KL_y the sum over response tokens of KL(reference, policy)
    over the full vocabulary.

    Args:
        beta: Inverse temperature of the implicit reward, in 1/nats. Usual range 0.05 to 0.5.

    Source: Zeng et al. 2024, arXiv:2404.11999.
    Departs: log_softmax instead of log(softmax), which is nan where a probability underflows.
    """
    return Objective(Preference(Score(beta, kl_coef=1.0), Logistic()))


def tdpo2(beta: float = 0.1, alpha: float = 0.5) -> Objective:
    """Token-level DPO, second form.

    loss = -log sigmoid(beta * [m - alpha * (KL_rejected - stopgrad(KL_chosen))])

    m is the sequence log-ratio margin, KL_y the sum over response tokens of KL(reference, policy).
    Logged rewards are beta * (log-ratio + KL), as released, whatever alpha.

    Args:
        beta: Inverse temperature of the implicit reward, in 1/nats. Usual range 0.05 to 0.5.
        alpha: Weight of the sequential KL, no unit. 0 gives DPO.

    Source: Zeng et al. 2024, arXiv:2404.11999.
    Departs: log_softmax instead of log(softmax), which is nan where a probability underflows.
    """
    require(alpha >= 0.0, "alpha", alpha, "at least 0")
    score = Score(beta, kl_coef=alpha, kl_detach_chosen=True, reward_kl=1.0)
    return Objective(Preference(score, Logistic()))


def sparse_po(
    beta: float = 0.1,
    l1_reward: float = 0.0,
    l1_kl: float = 0.0,
    compat: Literal["official"] | None = None,
) -> Objective:
    """SparsePO: learned masks on the log-ratio and the KL of each token.

    loss = -log sigmoid(beta * [(u_w - u_l) + (d_w - d_l)]) + l1_reward * |mr| + l1_kl * |mk|,
    u = sum of mr * log-ratio, d = sum of mk * KL(reference, policy), |.| summed over both responses

    The masks come from the adapter (text.masks): learned, or from the reference's activations
    (MaPO). A mask shared by both counts once when both coefficients are equal.

    Args:
        beta: Inverse temperature of the implicit reward, in 1/nats.
        l1_reward: Sparsity of the reward mask, per token.
        l1_kl: Sparsity of the KL mask, per token.
        compat: "official" logs rewards with the KL subtracted, against its own margin.

    Source: Christopoulou et al. 2024, arXiv:2410.05102.
    Departs: rewards are logged as they enter the margin.
    """
    reward_kl = None if compat is None else -1.0
    score = Score(beta, kl_coef=1.0, weighted=True, reward_kl=reward_kl)
    terms: list[Term] = [Preference(score, Logistic())]
    if l1_reward or l1_kl:
        terms.append(WeightL1(l1_reward, l1_kl))
    return Objective(*terms)
