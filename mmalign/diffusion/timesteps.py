"""Which timesteps rows are scored at."""

from __future__ import annotations

import torch
from torch import Tensor

from mmalign.config import TimestepSpec
from mmalign.diffusion.process import NoiseProcess

REFINER_SHARE = 0.2
"""SDXL's refiner was trained on the 200 cleanest of 1000 levels."""

TURBO_LEVELS = 4
"""SDXL Turbo was distilled at the last level of each quarter: 249, 499, 749, 999."""


def draw_timesteps(spec: TimestepSpec, process: NoiseProcess, u: Tensor) -> Tensor:  # [N] -> [N]
    """Timesteps from uniform numbers; equally spaced numbers give a stratified set.

    uniform: quantile low + (high - low) u of the schedule. refiner: u / 5. turbo: the last level
    of quarter floor(4 u). logit_normal: sigmoid(mean + std * z), z the normal quantile of u; a
    positive mean draws more noise.

    Args:
        spec: Kind and its settings.
        process: Turns quantiles of the schedule into its timesteps.
        u: [N] in [0, 1), float64.

    Source: DiffusionDPO's released script (refiner, turbo); Esser et al. 2024, arXiv:2403.03206
        (logit_normal).
    Departs: turbo's level follows the quantile instead of the remainder of a whole number; the
        distribution is the same and sets stay stratified.
    """
    u = u.double()
    if spec.kind == "refiner":
        u = REFINER_SHARE * u
    elif spec.kind == "turbo":
        end_of_quarter = ((TURBO_LEVELS * u).floor() + 1.0) / TURBO_LEVELS
        u = end_of_quarter - 0.5 / process.num_timesteps  # the middle of its last level
    elif spec.kind == "logit_normal":
        u = torch.sigmoid(spec.mean + spec.std * torch.special.ndtri(u))
    else:
        u = spec.low + (spec.high - spec.low) * u
    return process.timestep(u)
