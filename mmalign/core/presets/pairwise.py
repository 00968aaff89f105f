"""Losses on the margin of a pair: defined under every valid divergence."""

from __future__ import annotations

import math
from typing import Literal

from mmalign.core.catalogue import resolve_divergence
from mmalign.core.divergence import Alpha, Transform
from mmalign.core.links import (
    Conservative,
    DiscoPop,
    Exo,
    Hinge,
    Logistic,
    Robust,
    Squared,
)
from mmalign.core.numerics import Reduce, require
from mmalign.core.objective import Objective
from mmalign.core.score import Score
from mmalign.core.terms import Preference


def _transform(
    divergence: str | Transform, alpha: float | None, p: float | None, compat: str | None = None
) -> Transform:
    """The divergence that a preset's keywords mean; under `compat` alpha is TRL's coefficient."""
    if compat != "trl-1.16" or alpha is None:
        return resolve_divergence(divergence, alpha=alpha, p=p)
    named = resolve_divergence(divergence, p=p)
    if isinstance(named, Alpha):
        return Alpha.from_trl(alpha, named.limit)
    return resolve_divergence(divergence, alpha=1.0 - alpha, p=p)


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
    divergence: str | Transform = "js",
    beta: float = 0.1,
    alpha: float | None = None,
    p: float | None = None,
    compat: Literal["trl-1.16"] | None = None,
) -> Objective:
    """DPO under another divergence than reverse KL.

    loss = -log sigmoid(beta * [f'(u_chosen) - f'(u_rejected)]), u = pi / ref of the whole response

    On diffusion a non-linear f' is a per-timestep heuristic, not a bound on a trajectory's loss.

    Args:
        divergence: Name in DIVERGENCES, or a transform object.
        beta: Scale of the implicit reward, no unit beyond that of f'.
        alpha: Parameter of the alpha divergence, the paper's: 0 reverse KL, 1 forward KL.
        p: Policy's share of the mixture, for skewed_js.
        compat: "trl-1.16" reads alpha as TRL's f_alpha_divergence_coef, which is 1 - alpha.

    Source: Wang et al. 2023, arXiv:2309.16240.
    Departs: constants are kept so that equal policies score 0 (they cancel in the loss and shift
        the logged rewards); exponentials beyond exp(30) follow their tangent line instead of being
        clamped.
    """
    transform = _transform(divergence, alpha, p, compat)
    return Objective(Preference(Score(beta, transform), Logistic()))


def cdpo(
    beta: float = 0.1,
    flip: float = 0.1,
    divergence: str | Transform = "reverse_kl",
    alpha: float | None = None,
    p: float | None = None,
) -> Objective:
    """Conservative DPO: label smoothing.

    loss = -(1 - flip) log sigmoid(beta * m) - flip log sigmoid(-beta * m)

    Args:
        beta: Inverse temperature of the implicit reward, in 1/nats.
        flip: Assumed share of wrong labels, in [0, 0.5].
        divergence: Name in DIVERGENCES, or a transform object.
        alpha: Parameter of the alpha divergence.
        p: Parameter of skewed_js.

    Source: Mitchell 2023, a note on DPO with noisy preferences; eric-mitchell released code.
    Departs: nothing. TRL 1.16 accepts label_smoothing with its sigmoid loss and ignores it.
    """
    transform = _transform(divergence, alpha, p)
    return Objective(Preference(Score(beta, transform), Conservative(flip)))


def rdpo(
    beta: float = 0.1,
    flip: float = 0.1,
    divergence: str | Transform = "reverse_kl",
    alpha: float | None = None,
    p: float | None = None,
    compat: Literal["trl-1.16"] | None = None,
) -> Objective:
    """Provably robust DPO: unbiased under random label flips.

    loss = [-(1 - flip) log sigmoid(beta * m) + flip log sigmoid(-beta * m)] / (1 - 2 flip)

    Can be negative, and falls without bound as the margin grows: watch the margins.

    Args:
        beta: Inverse temperature of the implicit reward, in 1/nats.
        flip: Share of wrong labels, in [0, 0.5).
        divergence: Name in DIVERGENCES, or a transform object.
        alpha: Parameter of the alpha divergence.
        p: Parameter of skewed_js.
        compat: "trl-1.16" reads alpha as TRL's f_alpha_divergence_coef, which is 1 - alpha.

    Source: Chowdhury et al. 2024, arXiv:2403.00409.
    Departs: flip = 0.5 is an error, not a division by zero.
    """
    transform = _transform(divergence, alpha, p, compat)
    return Objective(Preference(Score(beta, transform), Robust(flip)))


def ipo(
    tau: float = 0.1,
    reduce: Reduce = "mean",
    divergence: str | Transform = "reverse_kl",
    alpha: float | None = None,
    p: float | None = None,
    length_norm: Literal["log_ratio", "score"] = "log_ratio",
    compat: Literal["trl-1.16", "official"] | None = None,
) -> Objective:
    """Identity preference optimisation.

    loss = (m - 1 / (2 tau))^2, m of per-token mean log-ratios, or of summed ones

    Args:
        tau: Regularisation, in 1/nats; the target margin is 1 / (2 tau).
        reduce: "mean" divides each log-ratio by its response's length; "sum" is the paper's
            equation.
        divergence: Name in DIVERGENCES, or a transform object.
        alpha: Parameter of the alpha divergence.
        p: Parameter of skewed_js.
        length_norm: What "mean" divides under a divergence: the log_ratio before f', or the score.
        compat: "trl-1.16" is reduce mean with length_norm score, and alpha is TRL's coefficient;
            "official" (the DPO repository) sums.

    Source: Azar et al. 2023, arXiv:2310.12036, eq. 17; TRL reports that its authors use the mean.
    Departs: the mean is the default; lengths are counted on the scored tokens.
    """
    require(0.0 < tau < math.inf, "tau", tau, "above 0 and finite")
    if compat == "trl-1.16":
        reduce, length_norm = "mean", "score"
    elif compat == "official":
        reduce = "sum"
    transform = _transform(divergence, alpha, p, compat)
    score = Score(tau, transform, reduce=reduce, length_norm=length_norm)
    return Objective(Preference(score, Squared(0.5, scale=tau)))


def hinge(
    beta: float = 0.1,
    divergence: str | Transform = "reverse_kl",
    alpha: float | None = None,
    p: float | None = None,
    compat: Literal["trl-1.16"] | None = None,
) -> Objective:
    """Hinge loss on the log-ratio margin (SLiC with a reference).

    loss = max(0, 1 - beta * m)

    Args:
        beta: Inverse temperature of the implicit reward, in 1/nats.
        divergence: Name in DIVERGENCES, or a transform object.
        alpha: Parameter of the alpha divergence.
        p: Parameter of skewed_js.
        compat: "trl-1.16" reads alpha as TRL's f_alpha_divergence_coef, which is 1 - alpha.

    Source: Zhao et al. 2023, arXiv:2305.10425; Liu et al. 2023, arXiv:2309.06657.
    Departs: nothing.
    """
    transform = _transform(divergence, alpha, p, compat)
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
    divergence: str | Transform = "reverse_kl",
    alpha: float | None = None,
    p: float | None = None,
    length_norm: Literal["log_ratio", "score"] = "log_ratio",
    compat: Literal["trl-1.16"] | None = None,
) -> Objective:
    """DPO on per-token mean log-ratios.

    loss = -log sigmoid(beta * m), m of per-token mean log-ratios

    Args:
        beta: Inverse temperature, in 1/nats per token; 2 to 10, larger than DPO's.
        divergence: Name in DIVERGENCES, or a transform object.
        alpha: Parameter of the alpha divergence.
        p: Parameter of skewed_js.
        length_norm: What is divided under a divergence: the log_ratio before f', or the score.
        compat: "trl-1.16" divides the score, and alpha is TRL's coefficient.

    Source: TRL 1.16 loss_type sigmoid_norm; Lambert et al. 2024, arXiv:2411.15124.
    Departs: under a divergence, f' is taken of the per-token ratio, not divided afterwards.
    """
    if compat is not None:
        length_norm = "score"
    transform = _transform(divergence, alpha, p, compat)
    score = Score(beta, transform, reduce="mean", length_norm=length_norm)
    return Objective(Preference(score, Logistic()))


def exo(
    beta: float = 0.5,
    flip: float = 1e-3,
    divergence: str | Transform = "reverse_kl",
    alpha: float | None = None,
    p: float | None = None,
    compat: Literal["trl-1.16", "official"] | None = None,
) -> Objective:
    """Exact optimisation on pairs: reverse KL to the smoothed label.

    loss = q [log q - log(1 - flip)] + (1 - q) [log(1 - q) - log flip], q = sigmoid(beta * m)

    Args:
        beta: Inverse temperature of the implicit reward, in 1/nats.
        flip: Label smoothing, in (0, 0.5].
        divergence: Name in DIVERGENCES, or a transform object.
        alpha: Parameter of the alpha divergence.
        p: Parameter of skewed_js.
        compat: "official" uses the released targets (0, -10) as log-probabilities: flip is exp(-10)
            and they do not sum to one; "trl-1.16" reads alpha as TRL's f_alpha_divergence_coef,
            which is 1 - alpha.

    Source: Ji et al. 2024, arXiv:2402.00856, eq. 16.
    Departs: the label is normalised.
    """
    require(0.0 < flip <= 0.5, "flip", flip, "in (0, 0.5], the label smoothing")
    link = Exo(0.0, -10.0) if compat == "official" else Exo(math.log1p(-flip), math.log(flip))
    transform = _transform(divergence, alpha, p, compat)
    return Objective(Preference(Score(beta, transform), link))


def discopop(
    beta: float = 0.05,
    tau: float = 0.05,
    divergence: str | Transform = "reverse_kl",
    alpha: float | None = None,
    p: float | None = None,
    compat: Literal["trl-1.16"] | None = None,
) -> Objective:
    """Discovered preference optimisation: a blend of logistic and exponential loss.

    loss = -log sigmoid(z) * sigmoid(-z / tau) + exp(-z) * sigmoid(z / tau), z = beta * m

    Not monotone in the margin: there is a shoulder near zero.

    Args:
        beta: Inverse temperature of the implicit reward, in 1/nats.
        tau: Width of the blend, no unit.
        divergence: Name in DIVERGENCES, or a transform object.
        alpha: Parameter of the alpha divergence.
        p: Parameter of skewed_js.
        compat: "trl-1.16" reads alpha as TRL's f_alpha_divergence_coef, which is 1 - alpha.

    Source: Lu et al. 2024, arXiv:2406.08414, eq. 5.
    Departs: computed as one exponential, finite for all margins.
    """
    transform = _transform(divergence, alpha, p, compat)
    return Objective(Preference(Score(beta, transform), DiscoPop(tau)))
