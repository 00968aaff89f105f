"""Losses on the margin of a pair: DPO under every divergence, variants, soft labels, regression."""

from __future__ import annotations

import math
from typing import Literal, Unpack

from mmalign.core.divergence import (
    ChiSquaredKL,
    Divergence,
    DivergenceFields,
    resolve_divergence,
)
from mmalign.core.links import (
    ClippedLogistic,
    Conservative,
    CrossEntropy,
    DiscoPop,
    Exo,
    Hinge,
    Link,
    Logistic,
    Robust,
    Squared,
    SquaredEach,
    SquaredToLabels,
)
from mmalign.core.numerics import Reduce, require
from mmalign.core.objective import Objective
from mmalign.core.score import Score
from mmalign.core.terms import Nll, Preference
from mmalign.core.weights import Wpo, reweight

__all__ = [  # noqa: RUF022
    "dpo", "f_dpo", "chi_po", "cdpo", "rdpo", "ipo", "hinge", "rso", "sigmoid_norm", "exo",
    "discopop", "wpo", "dpo_gamma", "flex_dpo", "soft_dpo", "upo", "mcts_dpo", "sem_dpo",
    "sppo", "gpo", "inpo_nash", "online_ipo",
]  # fmt: skip


def dpo(beta: float = 0.1) -> Objective:
    """Direct preference optimisation.

    loss = -log sigmoid(beta * m), m = (log pi - log ref)(chosen) - (log pi - log ref)(rejected)

    Args:
        beta: Inverse temperature of the implicit reward, in 1/nats. Usual range 0.05 to 0.5.

    Source: Rafailov et al. 2023, arXiv:2305.18290.
    Departs: nothing.
    """
    return Objective(Preference(Score(beta), Logistic()))


def f_dpo(
    divergence: Divergence = "js",
    beta: float = 0.1,
    compat: Literal["trl-1.16"] | None = None,
    **fields: Unpack[DivergenceFields],
) -> Objective:
    """DPO under another divergence than reverse KL.

    loss = -log sigmoid(beta * [f'(u_chosen) - f'(u_rejected)]), u = pi / ref of the whole response

    On diffusion a non-linear f' is a per-timestep heuristic, not a bound on a trajectory's loss.

    Args:
        divergence: Name in DIVERGENCES, {name: ..., alpha: ...}, or a transform object.
        beta: Scale of the implicit reward, no unit beyond that of f'.
        compat: "trl-1.16" reads alpha as TRL's f_alpha_divergence_coef, which is 1 - alpha.
        fields: Of the divergence, where it is a name alone: the older spelling.

    Source: Wang et al. 2023, arXiv:2309.16240.
    Departs: constants are kept so that equal policies score 0 (they cancel in the loss and shift
        the logged rewards); exponentials beyond exp(30) follow their tangent line instead of being
        clamped.
    """
    transform = resolve_divergence(divergence, compat, **fields)
    return Objective(Preference(Score(beta, transform), Logistic()))


def cdpo(
    beta: float = 0.1,
    flip: float = 0.1,
    divergence: Divergence = "reverse_kl",
    **fields: Unpack[DivergenceFields],
) -> Objective:
    """Conservative DPO: label smoothing.

    loss = -(1 - flip) log sigmoid(beta * m) - flip log sigmoid(-beta * m)

    Args:
        beta: Inverse temperature of the implicit reward, in 1/nats.
        flip: Assumed share of wrong labels, in [0, 0.5].
        divergence: Name in DIVERGENCES, {name: ..., alpha: ...}, or a transform object.
        fields: Of the divergence, where it is a name alone: the older spelling.

    Source: Mitchell 2023, a note on DPO with noisy preferences; eric-mitchell released code.
    Departs: nothing. TRL 1.16 accepts label_smoothing with its sigmoid loss and ignores it.
    """
    transform = resolve_divergence(divergence, **fields)
    return Objective(Preference(Score(beta, transform), Conservative(flip)))


def rdpo(
    beta: float = 0.1,
    flip: float = 0.1,
    divergence: Divergence = "reverse_kl",
    compat: Literal["trl-1.16"] | None = None,
    **fields: Unpack[DivergenceFields],
) -> Objective:
    """Provably robust DPO: unbiased under random label flips.

    loss = [-(1 - flip) log sigmoid(beta * m) + flip log sigmoid(-beta * m)] / (1 - 2 flip)

    Can be negative, and falls without bound as the margin grows: watch the margins.

    Args:
        beta: Inverse temperature of the implicit reward, in 1/nats.
        flip: Share of wrong labels, in [0, 0.5).
        divergence: Name in DIVERGENCES, {name: ..., alpha: ...}, or a transform object.
        compat: "trl-1.16" reads alpha as TRL's f_alpha_divergence_coef, which is 1 - alpha.
        fields: Of the divergence, where it is a name alone: the older spelling.

    Source: Chowdhury et al. 2024, arXiv:2403.00409.
    Departs: flip = 0.5 is an error, not a division by zero.
    """
    transform = resolve_divergence(divergence, compat, **fields)
    return Objective(Preference(Score(beta, transform), Robust(flip)))


def ipo(
    tau: float = 0.1,
    reduce: Reduce = "mean",
    divergence: Divergence = "reverse_kl",
    length_norm: Literal["log_ratio", "score"] = "log_ratio",
    compat: Literal["trl-1.16", "official"] | None = None,
    **fields: Unpack[DivergenceFields],
) -> Objective:
    """Identity preference optimisation.

    loss = (m - 1 / (2 tau))^2, m of per-token mean log-ratios, or of summed ones

    Args:
        tau: Regularisation, in 1/nats; the target margin is 1 / (2 tau).
        reduce: "mean" divides each log-ratio by its response's length; "sum" is the paper's
            equation.
        divergence: Name in DIVERGENCES, {name: ..., alpha: ...}, or a transform object.
        length_norm: What "mean" divides under a divergence: the log_ratio before f', or the score.
        compat: "trl-1.16" is reduce mean with length_norm score, and alpha is TRL's coefficient;
            "official" (the DPO repository) sums.
        fields: Of the divergence, where it is a name alone: the older spelling.

    Source: Azar et al. 2023, arXiv:2310.12036, eq. 17; TRL reports that its authors use the mean.
    Departs: the mean is the default; lengths are counted on the scored tokens.
    """
    require(0.0 < tau < math.inf, "tau", tau, "above 0 and finite")
    if compat == "trl-1.16":
        reduce, length_norm = "mean", "score"
    elif compat == "official":
        reduce = "sum"
    transform = resolve_divergence(divergence, compat, **fields)
    score = Score(tau, transform, reduce=reduce, length_norm=length_norm)
    return Objective(Preference(score, Squared(0.5, scale=tau)))


def hinge(
    beta: float = 0.1,
    divergence: Divergence = "reverse_kl",
    compat: Literal["trl-1.16"] | None = None,
    **fields: Unpack[DivergenceFields],
) -> Objective:
    """Hinge loss on the log-ratio margin (SLiC with a reference).

    loss = max(0, 1 - beta * m)

    Args:
        beta: Inverse temperature of the implicit reward, in 1/nats.
        divergence: Name in DIVERGENCES, {name: ..., alpha: ...}, or a transform object.
        compat: "trl-1.16" reads alpha as TRL's f_alpha_divergence_coef, which is 1 - alpha.
        fields: Of the divergence, where it is a name alone: the older spelling.

    Source: Zhao et al. 2023, arXiv:2305.10425; Liu et al. 2023, arXiv:2309.06657.
    Departs: nothing.
    """
    transform = resolve_divergence(divergence, compat, **fields)
    return Objective(Preference(Score(beta, transform), Hinge()))


def rso(gamma: float = 0.05) -> Objective:
    """RSO's hinge-norm loss; its rejection sampling happens in the data.

    loss = max(0, 1 - gamma * m)

    Args:
        gamma: Inverse temperature of the implicit reward, in 1/nats.

    Source: Liu et al. 2023, arXiv:2309.06657.
    Departs: nothing. "norm" means that the reference ratio is kept, not a division by length.
    """
    return hinge(gamma)


def sigmoid_norm(
    beta: float = 2.0,
    divergence: Divergence = "reverse_kl",
    length_norm: Literal["log_ratio", "score"] = "log_ratio",
    compat: Literal["trl-1.16"] | None = None,
    **fields: Unpack[DivergenceFields],
) -> Objective:
    """DPO on per-token mean log-ratios.

    loss = -log sigmoid(beta * m), m of per-token mean log-ratios

    Args:
        beta: Inverse temperature, in 1/nats per token; 2 to 10, larger than DPO's.
        divergence: Name in DIVERGENCES, {name: ..., alpha: ...}, or a transform object.
        length_norm: What is divided under a divergence: the log_ratio before f', or the score.
        compat: "trl-1.16" divides the score, and alpha is TRL's coefficient.
        fields: Of the divergence, where it is a name alone: the older spelling.

    Source: TRL 1.16 loss_type sigmoid_norm; Lambert et al. 2024, arXiv:2411.15124.
    Departs: under a divergence, f' is taken of the per-token ratio, not divided afterwards.
    """
    if compat is not None:
        length_norm = "score"
    transform = resolve_divergence(divergence, compat, **fields)
    score = Score(beta, transform, reduce="mean", length_norm=length_norm)
    return Objective(Preference(score, Logistic()))


def exo(
    beta: float = 0.5,
    flip: float = 1e-3,
    divergence: Divergence = "reverse_kl",
    compat: Literal["trl-1.16", "official"] | None = None,
    **fields: Unpack[DivergenceFields],
) -> Objective:
    """Exact optimisation on pairs: reverse KL to the smoothed label.

    loss = q [log q - log(1 - flip)] + (1 - q) [log(1 - q) - log flip], q = sigmoid(beta * m)

    Args:
        beta: Inverse temperature of the implicit reward, in 1/nats.
        flip: Label smoothing, in (0, 0.5].
        divergence: Name in DIVERGENCES, {name: ..., alpha: ...}, or a transform object.
        compat: "official" uses the released targets (0, -10) as log-probabilities: flip is exp(-10)
            and they do not sum to one; "trl-1.16" reads alpha as TRL's f_alpha_divergence_coef,
            which is 1 - alpha.
        fields: Of the divergence, where it is a name alone: the older spelling.

    Source: Ji et al. 2024, arXiv:2402.00856, eq. 16.
    Departs: the label is normalized.
    """
    require(0.0 < flip <= 0.5, "flip", flip, "in (0, 0.5], the label smoothing")
    link = Exo(0.0, -10.0) if compat == "official" else Exo(math.log1p(-flip), math.log(flip))
    transform = resolve_divergence(divergence, compat, **fields)
    return Objective(Preference(Score(beta, transform), link))


def discopop(
    beta: float = 0.05,
    tau: float = 0.05,
    divergence: Divergence = "reverse_kl",
    compat: Literal["trl-1.16"] | None = None,
    **fields: Unpack[DivergenceFields],
) -> Objective:
    """Discovered preference optimisation: a blend of logistic and exponential loss.

    loss = -log sigmoid(z) * sigmoid(-z / tau) + exp(-z) * sigmoid(z / tau), z = beta * m

    Not monotone in the margin: there is a shoulder near zero.

    Args:
        beta: Inverse temperature of the implicit reward, in 1/nats.
        tau: Width of the blend, no unit.
        divergence: Name in DIVERGENCES, {name: ..., alpha: ...}, or a transform object.
        compat: "trl-1.16" reads alpha as TRL's f_alpha_divergence_coef, which is 1 - alpha.
        fields: Of the divergence, where it is a name alone: the older spelling.

    Source: Lu et al. 2024, arXiv:2406.08414, eq. 5.
    Departs: computed as one exponential, finite for all margins.
    """
    transform = resolve_divergence(divergence, compat, **fields)
    return Objective(Preference(Score(beta, transform), DiscoPop(tau)))


# Variants of DPO: another clip, weight, reference or temperature.


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


# Losses on soft labels (p, 1 - p) and on weighted rows.


def soft_dpo(beta: float = 0.1) -> Objective:
    """DPO on soft labels: the share of raters, or one smoothing per pair.

    loss = -p log sigmoid(beta * m) - (1 - p) log sigmoid(-beta * m), (p, 1 - p) = labels

    Args:
        beta: Inverse temperature of the implicit reward, in 1/nats.

    Source: the conservative form of Mitchell 2023 with a label per pair.
    Departs: nothing.
    """
    return Objective(Preference(Score(beta), CrossEntropy()))


def upo(beta: float = 0.1, nll_weight: float = 0.0) -> Objective:
    """Uncertainty-enhanced preference optimisation, in its safe form.

    loss = -(1 - a) log sigmoid(beta * m) - a log sigmoid(-beta * m) + nll_weight * NLL(chosen),
    (1 - a, a) = labels, a = uncertainty of the pair / 2 (core.weights.uncertainty_labels)

    Args:
        beta: Inverse temperature of the implicit reward, in 1/nats.
        nll_weight: Weight of the chosen response's mean negative log-likelihood.

    Source: Self-Evolutionary LLMs through Uncertainty-Enhanced Preference Optimization, paper text.
    Departs: a runs from 0 to 1/2; the printed 1 / (P + 1) is never below 1/2 and trains backwards.
        The likelihood term raises the chosen response; the printed sign lowers it.
    """
    require(0.0 <= nll_weight < math.inf, "nll_weight", nll_weight, "at least 0")
    term = Preference(Score(beta), CrossEntropy())
    return Objective(term, Nll(nll_weight)) if nll_weight else Objective(term)


def mcts_dpo(beta: float = 0.1) -> Objective:
    """DPO on pairs from a search tree, smoothed by visit counts.

    loss = -(1 - e) log sigmoid(beta * m) - e log sigmoid(-beta * m), (1 - e, e) = labels,
    e = min(1 - 1 / (1 + N_worse / max(1, N_better)), 1/2) (core.weights.visit_labels)

    Args:
        beta: Inverse temperature of the implicit reward, in 1/nats.

    Source: Xie et al. 2024, arXiv:2405.00451, released code.
    Departs: nothing.
    """
    return soft_dpo(beta)


def sem_dpo(beta: float = 0.1) -> Objective:
    """Semantically weighted DPO.

    loss = -w log sigmoid(beta * m), w = the record's weight = exp(-alpha * cosine distance of
    prompt and chosen response) (core.weights.semantic_weights)

    Args:
        beta: Inverse temperature of the implicit reward, in 1/nats.

    Source: Sem-DPO, formula as quoted in public notes.
    Departs: weights come with the data, so any pair loss can use them.
    """
    return Objective(Preference(Score(beta), Logistic()))


# Squared losses: log-ratios, or their margin, regressed to a target.


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
    """Online IPO on length-normalized log-ratios, the inner loss of EGPO.

    loss = (m - (p_0 - p_1) / beta)^2, m of per-token mean log-ratios, p = labels: win rates

    Args:
        beta: Regularisation, in 1/nats per token.

    Source: Zhou et al. 2025, arXiv:2503.08942 (EGPO), released code.
    Departs: win rates come with the data, as labels; the extragradient lives in the loop.
    """
    return Objective(Preference(Score(beta, reduce="mean"), SquaredToLabels(scale=beta)))
