"""Where networks are called, and what they are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

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


class Predict(Protocol):
    """The noise that a network sees in the N pictures of a batch; without gradient."""

    def __call__(self, x: Tensor, t: Tensor, rows: Tensor | None = None, /) -> Tensor:
        """The noise.

        Args:
            x: [M, ...] pictures.
            t: [M] timesteps of the process; some below the schedule (`semantics: legacy`).
            rows: [M] which of the N pictures these are; None: all of them, in order.
        """
        ...
