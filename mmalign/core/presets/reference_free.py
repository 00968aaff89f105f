"""Losses without a reference model: no second forward, no second copy."""

from __future__ import annotations

import math
from typing import Literal

from mmalign.core.divergence import LogOdds, PowerScore, ReverseKL, Transform
from mmalign.core.links import Bernoulli, Conservative, Hinge, Link, Logistic, Squared
from mmalign.core.numerics import Reduce, require
from mmalign.core.objective import Objective
from mmalign.core.score import Score
from mmalign.core.terms import Nll, NllReduce, Preference, Term

__all__ = [  # noqa: RUF022
    "sft", "simpo", "alphapo", "cpo", "orpo", "asft",
]  # fmt: skip


def sft(reduce: NllReduce = "batch_token") -> Objective:
    """Supervised fine-tuning on the (chosen) response.

    loss = -log pi(chosen), averaged over tokens

    Args:
        reduce: "batch_token" averages over all response tokens of a step, whatever its
            micro-batches and processes; "mean" over each response, then over rows; "sum" over the
            response.

    Source: standard; TRL 1.16 loss_type sft.
    Departs: nothing.
    """
    return Objective(Nll(reduce=reduce))


def _mean_score(beta: float, transform: Transform) -> Score:
    return Score(beta, transform, reference_weight=0.0, reduce="mean")


def simpo(
    beta: float = 2.0,
    gamma: float = 0.5,
    link: Literal["sigmoid", "hinge"] = "sigmoid",
    label_smoothing: float = 0.0,
    sft_weight: float = 0.0,
) -> Objective:
    """Simple preference optimisation: mean log-probabilities with a target margin.

    loss = -log sigmoid(beta * [a_w - a_l] - gamma), a = mean log-probability per token

    Args:
        beta: Scale, in 1/nats per token; 2 to 10.
        gamma: Target margin, no unit. The released gamma_beta_ratio is gamma / beta.
        link: "hinge" is max(0, 1 - (beta * [a_w - a_l] - gamma)).
        label_smoothing: Assumed share of wrong labels, in [0, 0.5]; sigmoid only.
        sft_weight: Weight of the chosen response's mean negative log-likelihood.

    Source: Meng et al. 2024, arXiv:2405.14734.
    Departs: nothing. TRL's CPOTrainer reaches this with beta 2, simpo_gamma 0.5 and cpo_alpha 0.
    """
    return _simpo(ReverseKL(), beta, gamma, link, label_smoothing, sft_weight)


def alphapo(
    beta: float = 2.5,
    gamma: float = 0.25,
    alpha: float = 0.25,
    link: Literal["sigmoid", "hinge"] = "sigmoid",
    label_smoothing: float = 0.0,
    sft_weight: float = 0.0,
) -> Objective:
    """AlphaPO: SimPO with a bent reward.

    loss = -log sigmoid(beta * [h(a_w) - h(a_l)] - gamma), h(a) = (1 - exp(-alpha a)) / alpha

    Args:
        beta: Scale, in 1/nats per token.
        gamma: Target margin, no unit.
        alpha: Bend of the reward, of either sign; 0 is simpo. Above 0 unlikely responses are pushed
            harder, below 0 less: there the reward ends at -1 / |alpha|.
        link: "hinge" is max(0, 1 - margin).
        label_smoothing: Assumed share of wrong labels, in [0, 0.5]; sigmoid only.
        sft_weight: Weight of the chosen response's mean negative log-likelihood.

    Source: Gupta et al. 2025, arXiv:2501.03884.
    Departs: computed with expm1 and continued by its tangent line; TRL's power of exp(a) is nan
        below -104.
    """
    return _simpo(PowerScore(alpha), beta, gamma, link, label_smoothing, sft_weight)


def _simpo(
    transform: Transform, beta: float, gamma: float, link: str, smoothing: float, sft_weight: float
) -> Objective:
    chosen: Link = Hinge(gamma) if link == "hinge" else _sigmoid(smoothing, gamma, link)
    if link == "hinge":
        require(smoothing == 0.0, "label_smoothing", smoothing, "0 with link hinge")
    return _with_nll(Preference(_mean_score(beta, transform), chosen), sft_weight, "mean")


def _sigmoid(smoothing: float, margin: float, link: str) -> Link:
    require(link == "sigmoid", "link", link, "sigmoid, or another link this preset names")
    return Conservative(smoothing, margin) if smoothing else Logistic(margin)


def _with_nll(term: Term, weight: float, reduce: NllReduce) -> Objective:
    require(0.0 <= weight < math.inf, "sft_weight", weight, "at least 0")
    return Objective(term, Nll(weight, reduce)) if weight else Objective(term)


def cpo(
    beta: float = 0.1,
    sft_weight: float = 1.0,
    link: Literal["sigmoid", "hinge", "ipo"] = "sigmoid",
    label_smoothing: float = 0.0,
    nll_reduce: NllReduce = "mean",
    compat: Literal["trl-1.16"] | None = None,
) -> Objective:
    """Contrastive preference optimisation: DPO without a reference, plus likelihood of the chosen.

    loss = -log sigmoid(beta * [S_w - S_l]) + sft_weight * NLL(chosen), S = summed log-probability

    Args:
        beta: Scale, in 1/nats.
        sft_weight: Weight of the chosen response's negative log-likelihood.
        link: "hinge" is max(0, 1 - beta * [S_w - S_l]); "ipo" is (a_w - a_l - 1/(2 beta))^2 on
            means.
        label_smoothing: Assumed share of wrong labels, in [0, 0.5]; sigmoid only.
        nll_reduce: "mean" over each response, then rows; "batch_token" over the step's tokens;
            "sum".
        compat: "trl-1.16" is nll_reduce batch_token.

    Source: Xu et al. 2024, arXiv:2401.08417.
    Departs: the NLL is averaged per response by default, so accumulation does not change it.
    """
    reduce: Reduce = "mean" if link == "ipo" else "sum"
    score = Score(beta, reference_weight=0.0, reduce=reduce)
    if link != "sigmoid":
        require(label_smoothing == 0.0, "label_smoothing", label_smoothing, f"0 with link {link}")
    if link == "ipo":
        chosen: Link = Squared(0.5, scale=beta)
    elif link == "hinge":
        chosen = Hinge()
    else:
        chosen = _sigmoid(label_smoothing, 0.0, link)
    nll_reduce = nll_reduce if compat is None else "batch_token"
    return _with_nll(Preference(score, chosen), sft_weight, nll_reduce)


def orpo(
    lam: float = 0.1,
    nll_reduce: NllReduce = "mean",
    compat: Literal["trl-1.16"] | None = None,
) -> Objective:
    """Odds-ratio preference optimisation: SFT with a penalty on the odds ratio.

    loss = NLL(chosen) - lam * log sigmoid(o_w - o_l), o = log-odds of the mean token probability

    Args:
        lam: Weight of the odds-ratio term, no unit (TRL calls it beta).
        nll_reduce: "mean" over each response, then rows; "batch_token" over the step's tokens;
            "sum".
        compat: "trl-1.16" takes the NLL over prompt and response, averaged over the batch's tokens.

    Source: Hong et al. 2024, arXiv:2403.07691.
    Departs: the NLL covers the response only; the log-odds follow their tangent line within 1e-6 of
        certainty, where released code gives nan gradients.
    """
    require(0.0 <= lam < math.inf, "lam", lam, "at least 0")
    nll = Nll(reduce=nll_reduce) if compat is None else Nll(reduce="batch_token", prompt=True)
    return Objective(Preference(_mean_score(1.0, LogOdds()), Logistic(), coef=lam), nll)


def asft(beta: float = 1.0, lam: float = 1.0, sft_weight: float = 1.0) -> Objective:
    """Aligned supervised fine-tuning: absolute odds of both responses.

    loss = sft_weight * NLL(chosen) - lam * [log sigmoid(beta o_w) + log sigmoid(-beta o_l)],
    o = log-odds of the mean token probability

    Args:
        beta: Scale of the log-odds, no unit.
        lam: Weight of the odds terms.
        sft_weight: Weight of the chosen response's mean negative log-likelihood.

    Source: Wang et al. 2024, arXiv:2409.10571; turbo-alignment's code.
    Departs: no clamp at probability 1 - 1e-7, whose gradient is zero; the tangent line continues.
    """
    require(0.0 <= lam < math.inf, "lam", lam, "at least 0")
    term = Preference(_mean_score(beta, LogOdds()), Bernoulli(), coef=lam)
    return _with_nll(term, sft_weight, "mean")
