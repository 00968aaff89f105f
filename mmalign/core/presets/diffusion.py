"""Losses on denoising errors: candidates' log-probabilities are -1/2 * mean squared error.

The adapter supplies policy = -e/2 at one drawn timestep a row, e the mean squared denoising error.
"""

from __future__ import annotations

import math
from typing import Literal

from mmalign.core.batchwide import Baseline, Kto, Utility
from mmalign.core.divergence import MapoScore
from mmalign.core.links import ClippedRatio, Hinge, Link, Logistic, Smoothed, Squared
from mmalign.core.numerics import require
from mmalign.core.objective import Objective
from mmalign.core.score import Score
from mmalign.core.terms import Nll, Preference

__all__ = [  # noqa: RUF022
    "diffusion_dpo", "smpo", "inpo", "diffusion_npo", "self_npo", "dcpo", "flow_dpo", "mapo",
    "diffusion_orpo", "diffusion_kto", "spo",
]  # fmt: skip


def diffusion_dpo(
    beta: float = 5000.0,
    link: Literal["sigmoid", "hinge", "ipo"] = "sigmoid",
    convention: Literal["diffusion_dpo", "diffusers"] = "diffusion_dpo",
) -> Objective:
    """Diffusion-DPO: dpo on denoising errors.

    loss = -log sigmoid(b * m), b = beta / 2, m = (e_ref - e)(chosen) - (e_ref - e)(rejected)

    Args:
        beta: Regularisation, per unit of mean squared error; 2000 for SD 1.5, 5000 for SDXL.
        link: "hinge" is max(0, 1 - b * m); "ipo" is (m - 1/(2 b))^2.
        convention: "diffusers" has b = beta (its SD LoRA script; 2500 there is 5000 here).

    Source: Wallace et al. 2023, arXiv:2311.12908, released code; diffusers research projects.
    Departs: nothing.
    """
    scale = beta if convention == "diffusers" else 0.5 * beta
    chosen: Link = Logistic()
    if link == "hinge":
        chosen = Hinge()
    elif link == "ipo":
        chosen = Squared(0.5, scale=scale)
    return Objective(Preference(Score(2.0 * scale), chosen), unit="error")  # policy is -e/2


def inpo(beta: float = 2000.0) -> Objective:
    """InPO: diffusion_dpo at images on the path of the model's own sampler.

    loss = -log sigmoid((beta / 2) * [m in errors]), errors at inverted images

    Args:
        beta: Regularisation, per unit of mean squared error; 2000 for SD 1.5, 5000 for SDXL.

    Source: Lu et al. 2025, arXiv:2503.18454, released code.
    Departs: the loss does not; the inversion (estimator.kind ddim_inversion) ends at the drawn
        timestep, every row has its own one, and the noise table is not in half precision.
    """
    return diffusion_dpo(beta)


def diffusion_npo(beta: float = 1000.0) -> Objective:
    """Diffusion-NPO: a negative model, from pairs exchanged (data.swap: true).

    loss = -log sigmoid((beta / 2) * [m in errors]), rejected and chosen exchanged

    Args:
        beta: Regularisation, per unit of mean squared error; 1000 for SD 1.5 (the released script's
            500 has no half), 2000 for SDXL.

    Source: Wang et al. 2025, arXiv:2505.11245, released code.
    Departs: ties are dropped or soft, as data says; the release keeps them in file order, so that
        they pull the same way in the positive and in the negative model.
    """
    return diffusion_dpo(beta)


def self_npo() -> Objective:
    """Self-NPO: a negative model without preferences, from the model's own truncated walks.

    loss = d(x0 of the student with the prompt, x0 of the teacher without it), d pseudo-Huber

    The teacher, an average of the student, and the walk belong to estimator.kind truncated.

    Source: Wang et al. 2025, arXiv:2505.11777, released code.
    Departs: the loss does not; the walk's last estimate is always made, whichever rows are in a
        batch together.
    """
    return Objective(Nll(2.0, "sum"), unit="error")  # policy is -d/2


def dcpo(beta: float = 500.0) -> Objective:
    """DCPO: diffusion_dpo where each image of a pair has its own caption.

    loss = -log sigmoid((beta / 2) * [m in errors]), each error under the image's own caption

    Args:
        beta: Regularisation, per unit of mean squared error; 500 for SD 2.1.

    Source: Saeidi et al. 2025, arXiv:2502.06023, released code.
    Departs: the loss does not; the prediction type is the model's own, where the release regresses
        a model that predicts v onto noise.
    """
    return diffusion_dpo(beta)


def flow_dpo(beta: float = 100.0) -> Objective:
    """Flow-DPO: diffusion_dpo on the error of a flow model's velocity, from stored pairs.

    loss = -log sigmoid((beta / 2) * [m in errors]), errors of the velocity noise - x0

    Args:
        beta: Regularisation, per unit of mean squared error; the same at all noise levels.

    Source: Liu et al. 2025, arXiv:2501.13918; flow_grpo's released script.
    Departs: offline only; the script samples groups with the policy and takes best and worst.
    """
    return diffusion_dpo(beta)


def spo(beta: float = 10.0, eps: float = 0.1) -> Objective:
    """SPO: pairs of the next latents of one sampler step, with clipped ratios.

    loss = -log sigmoid(beta * [log r_w - log r_l]), r = pi / pi_ref clipped to [1 - eps, 1 + eps]

    pi is the step's Gaussian density, averaged over elements before the exponential
    (`mmalign.diffusion.stepwise`). The sampling that makes the pairs while the model trains is not
    built; this is the loss for those who bring it.

    Args:
        beta: Inverse temperature of the ratio.
        eps: Half-width of the clip, in (0, 1).

    Source: Liang et al. 2024, arXiv:2406.04314, released code.
    Departs: nothing.
    """
    require(0.0 < eps < 1.0, "eps", eps, "in (0, 1)")
    link = ClippedRatio(beta * math.log1p(-eps), beta * math.log1p(eps))
    return Objective(Preference(Score(beta), link))


def smpo(beta: float = 50000.0) -> Objective:
    """SmPO-Diffusion: smoothed preferences; the inversion is the adapter's estimator.

    loss = -log sigmoid((beta / 2) * (p_w - p_l) * [m in errors]), (p_w, p_l) = labels

    Args:
        beta: Regularisation, per unit of mean squared error, with the published constant 10 folded
            in: 20000 is the published 2000 (SD 1.5), 50000 the published 5000 (SDXL).

    Source: Lu et al. 2025, SmPO-Diffusion, released code.
    Departs: each row has its own label; the release applies the first row's to the whole
        micro-batch.
    """
    return Objective(Preference(Score(beta), Smoothed()), unit="error")


def mapo(beta: float = 0.1, s: float = 0.5, temperature: float = 1000.0) -> Objective:
    """MaPO: margin-aware, reference-free, on denoising errors.

    loss = e(chosen) - beta * log sigmoid(temperature * [g(e_chosen) - g(e_rejected)]),
    g(e) = s e / (exp(s e) - 1)

    Args:
        beta: Weight of the preference term.
        s: Scale of errors inside g.
        temperature: Scale of the score, the number of timesteps in the release.

    Source: Hong et al. 2024, arXiv:2406.06424, released code.
    Departs: g is continued by its series at e = 0.
    """
    require(0.0 <= beta < math.inf, "beta", beta, "at least 0")
    score = Score(temperature, MapoScore(s), reference_weight=0.0)
    term = Preference(score, Logistic(), coef=beta)
    return Objective(term, Nll(2.0, "sum"), unit="error")


def diffusion_orpo(beta: float = 0.1, compat: Literal["official"] | None = None) -> Objective:
    """ORPO-style loss on denoising errors, reference-free.

    loss = e(chosen) - beta * log sigmoid(e(rejected) - e(chosen))

    Args:
        beta: Weight of the preference term.
        compat: "official" has the released sign, which rewards a larger error on the chosen image.

    Source: diffusers research projects, diffusion_orpo.
    Departs: the sign lowers the chosen error.
    """
    require(0.0 <= beta < math.inf, "beta", beta, "at least 0")
    sides = None if compat is None else (1, 0)
    score = Score(2.0, reference_weight=0.0)
    term = Preference(score, Logistic(), coef=beta, candidates=sides)
    return Objective(term, Nll(2.0, "sum"), unit="error")


def diffusion_kto(
    beta: float = 1000.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    utility: Utility = "sigmoid",
    baseline: Baseline = "batch",
) -> Objective:
    """Diffusion-KTO: utility of single rated images.

    loss = weight * (1 - h(z)), z = +-beta * (u - z0), u = e_ref - e, + for desirable images

    Args:
        beta: Regularisation, per unit of mean squared error, without the factor 1/2.
        desirable_weight: Weight of desirable rows.
        undesirable_weight: Weight of undesirable rows.
        utility: h: "sigmoid"; "loss_averse" log sigmoid(z); "risk_seeking_1" -y log sigmoid(-beta
            (u - z0)) with y = +-1; "risk_seeking_3" -log sigmoid(-z).
        baseline: z0, no gradient: "batch" max(0, mean u); "class_means" average of both groups'
            means; "mismatched" max(0, mean u under other prompts); "zero".

    Source: Li et al. 2024, arXiv:2404.04465, released code.
    Departs: baselines are means over all processes.
    """
    score = Score(2.0 * beta)  # policy is -e/2, and this method's beta has no half
    term = Kto(score, desirable_weight, undesirable_weight, baseline, utility)
    return Objective(term, unit="error")
