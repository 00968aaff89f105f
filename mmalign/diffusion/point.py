"""Where networks are called, and what they are compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Point:
    """Noisy pictures and what a network should return for them; no gradient flows into it.

    Attributes:
        x_t: [N, ...] noisy pictures, float32 or wider.
        t: [N] timesteps of the noise process.
        target: [N, ...] raw prediction to match, or with `in_x0` the clean picture to match.
        in_x0: Compare the clean picture that a prediction implies.
    """

    x_t: Tensor
    t: Tensor
    target: Tensor
    in_x0: bool = False


Predict = Callable[[Tensor, Tensor], Tensor]
"""The noise that a network sees in pictures [N, ...] at timesteps [N] of the process; without
gradient. Timesteps below the schedule occur (`semantics: legacy`)."""
