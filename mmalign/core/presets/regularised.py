"""Preference losses with a further term: likelihood, value, rationale, KL at every position."""

from __future__ import annotations

import math
from typing import Literal

from mmalign.core.batchwide import Bco, RunningMean
from mmalign.core.links import Anchor, Logistic
from mmalign.core.numerics import require
from mmalign.core.objective import Objective
from mmalign.core.score import Score
from mmalign.core.terms import LogRatio, Nll, NllReduce, OnlineKl, Preference, Term, WeightL1
from mmalign.core.types import Needs

__all__ = [  # noqa: RUF022
    "rpo", "mpo", "vpo", "hypo", "rationale", "tdpo1", "tdpo2", "sparse_po",
]  # fmt: skip


def rpo(beta: float = 0.05, eta: float = 0.005, nll_reduce: NllReduce = "sum") -> Objective:
    """Regularised preference optimisation: SFT loss as an adversarial regularizer.

    loss = -log sigmoid(beta * m) + eta * beta * (-log pi(chosen)), the summed form as released;
    with nll_reduce mean or batch_token: -log sigmoid(beta * m) + eta * NLL(chosen)

    Args:
        beta: Inverse temperature of the implicit reward, in 1/nats.
        eta: Weight of the likelihood term; 0.005 for "sum", where beta multiplies it too; 0.2 to 1
            for the means, where it does not.
        nll_reduce: "sum" over tokens; "mean" over each response, then rows; "batch_token" over all
            chosen tokens of the step (TRL's sigmoid + sft).

    Source: Liu et al. 2024, arXiv:2405.16436, released alignment-handbook and OpenRLHF code.
    Departs: nothing.
    """
    require(0.0 <= eta < math.inf, "eta", eta, "at least 0")
    coef = eta * beta if nll_reduce == "sum" else eta
    return Objective(Preference(Score(beta), Logistic()), Nll(coef, nll_reduce))


def mpo(
    beta: float = 0.1,
    preference: float = 0.8,
    quality: float = 0.2,
    generation: float = 1.0,
    compat: Literal["trl-1.16"] | None = None,
) -> Objective:
    """Mixed preference optimisation (InternVL): DPO, BCO and SFT together.

    loss = preference * dpo + quality * bco + generation * sft

    Args:
        beta: Inverse temperature of the implicit reward, in 1/nats.
        preference: Weight of the DPO loss.
        quality: Weight of the BCO loss.
        generation: Weight of the chosen responses' negative log-likelihood per batch token.
        compat: "trl-1.16" has no running shift in its BCO loss.

    Source: Wang et al. 2024, arXiv:2411.10442.
    Departs: nothing.
    """
    shift = RunningMean() if compat is None else None
    return Objective(
        Preference(Score(beta), Logistic(), coef=preference),
        Bco(Score(beta), shift=shift, coef=quality),
        Nll(generation, "batch_token"),
    )


def vpo(
    beta: float = 0.1,
    alpha: float = 0.1,
    mode: Literal["offline", "online"] = "offline",
) -> Objective:
    """Value-incentivised preference optimisation.

    loss = -log sigmoid(beta * m) +- alpha * beta * (log pi - log ref)(calibration response)

    Args:
        beta: Inverse temperature of the implicit reward, in 1/nats.
        alpha: Weight of the value term, no unit.
        mode: "offline" (minus: pessimism) pulls the calibration response up; "online" (plus:
            optimism) pushes it down. The calibration response is each row's candidate of that role.

    Source: Cen et al. 2024, arXiv:2405.19320; sign checked against TRL's XPO.
    Departs: reconstructed from the paper.
    """
    require(0.0 <= alpha < math.inf, "alpha", alpha, "at least 0")
    sign = -1.0 if mode == "offline" else 1.0
    return Objective(
        Preference(Score(beta), Logistic()),
        LogRatio(sign * alpha * beta, candidate=2),
        needs=Needs(roles=("calibration",)),
    )


def hypo(beta: float = 0.1, lam: float = 1e-4, samples: int = 2) -> Objective:
    """Hybrid preference optimisation: DPO on the data, KL to the reference on fresh samples.

    loss = -log sigmoid(beta * m) + lam * KL(policy, reference), the KL estimated on online samples
    with the leave-one-out policy gradient

    Args:
        beta: Inverse temperature of the implicit reward, in 1/nats.
        lam: Weight of the online KL, no unit.
        samples: Fresh responses of the policy in each row (role "online"), at least 2.

    Source: Song et al. 2024, arXiv:2406.01462; estimator from its description, constants ours.
    Departs: the loss shows the KL estimate, not the surrogate that carries its gradient.
    """
    require(0.0 <= lam < math.inf, "lam", lam, "at least 0")
    return Objective(Preference(Score(beta), Logistic()), OnlineKl(lam, samples=samples))


def rationale(beta: float = 0.1, gamma: float = 0.01) -> Objective:
    """Preference learning with rationales.

    loss = -log sigmoid(beta * m) - log sigmoid(gamma * log pi(rationale | its own prompt))

    Args:
        beta: Inverse temperature of the implicit reward, in 1/nats.
        gamma: Scale of the rationale's summed log-probability, in 1/nats; 0.001 to 0.1 in the
            release.

    Source: Just et al. 2024, arXiv:2407.14477, released code.
    Departs: nothing.
    """
    return Objective(
        Preference(Score(beta), Logistic()),
        Preference(Score(gamma, reference_weight=0.0), Anchor(), candidates=(2,)),
        needs=Needs(roles=("rationale",)),
    )


# Token-level losses: they read the KL at every position.


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
