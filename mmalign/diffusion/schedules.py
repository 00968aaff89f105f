"""Noise tables from a scheduler's settings, in float32 as the models were trained with them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmalign.errors import ConfigError


def betas(scheduler_config: Mapping[str, Any]) -> Tensor:  # [T] float32
    """The variances added at each step.

    scaled_linear: squares of a line between square roots; linear: a line; squaredcos_cap_v2:
    1 - f((i + 1) / T) / f(i / T), at most 0.999, with f(s) = cos^2(pi/2 (s + .008) / 1.008).

    Args:
        scheduler_config: Contents of `scheduler_config.json`; what is missing has the value that
            diffusers gives it.

    Raises:
        ConfigError: Another name of a schedule.
    """
    listed = scheduler_config.get("trained_betas")
    if listed is not None:
        return torch.tensor(listed, dtype=torch.float32)
    num = int(scheduler_config.get("num_train_timesteps", 1000))
    low = float(scheduler_config.get("beta_start", 0.0001))
    high = float(scheduler_config.get("beta_end", 0.02))
    kind = scheduler_config.get("beta_schedule", "linear")
    if kind == "linear":
        return torch.linspace(low, high, num, dtype=torch.float32)
    if kind == "scaled_linear":
        return torch.linspace(low**0.5, high**0.5, num, dtype=torch.float32) ** 2
    if kind == "squaredcos_cap_v2":
        kept = [math.cos((i / num + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(num + 1)]
        steps = [min(1.0 - kept[i + 1] / kept[i], 0.999) for i in range(num)]
        return torch.tensor(steps, dtype=torch.float32)
    raise ConfigError(
        f"the model's scheduler has beta_schedule {kind!r}; known are linear, scaled_linear, "
        "squaredcos_cap_v2 and a list in trained_betas"
    )


def alphas_cumprod(betas: Tensor) -> Tensor:  # [T] -> [T]
    """Share of the signal's variance left at each step: the running product of 1 - beta."""
    return torch.cumprod(1.0 - betas, dim=0)


def zero_terminal(table: Tensor) -> Tensor:  # [T] -> [T]
    """The table rescaled so that it ends in pure noise and begins where it began.

    s <- (s - s_last) * s_first / (s_first - s_last), s the square root of the table.

    Source: Lin et al. 2023, arXiv:2305.08891, algorithm 1.
    """
    root = table.sqrt()
    first, last = root[0], root[-1]
    return ((root - last) * first / (first - last)) ** 2
