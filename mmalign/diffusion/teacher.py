"""Self-NPO's place to score at: where a slow copy of the model, without its prompt, would arrive.

The student learns towards the clean picture that its teacher estimates a few steps later, under
guidance away from the prompt. What it becomes is a negative model. The teacher's weights are an
average of the student's: `mmalign.models.reference.Ema`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmalign.config import EstimatorSpec
from mmalign.core.numerics import full_precision
from mmalign.diffusion.draws import Draws
from mmalign.diffusion.moves import ddim_move, noisier
from mmalign.diffusion.point import Point, Predict
from mmalign.diffusion.process import NoiseProcess
from mmalign.errors import ConfigError


@dataclass(frozen=True)
class Walk:
    """What the teacher's steps leave.

    Attributes:
        x: [N, ...] pictures after the moves.
        t: [N] their level.
        x0: [N, ...] the clean pictures that the last evaluation implies.
    """

    x: Tensor
    t: Tensor
    x0: Tensor


@dataclass(frozen=True)
class Truncated:
    """A truncated walk of the teacher, then more noise: Self-NPO.

    With k = floor(T / num_steps) a picture is noised to t = (i + 1) k - 1, i uniform; the teacher
    makes `num_moves` moves of k and one last estimate of the clean picture, the target. The state
    after the moves is noised on to a level s uniform above it; there the student, with the prompt,
    is compared with the target.

    Source: Wang et al. 2025, Self-NPO in Diffusion-NPO's released code.
    Departs: estimates are always made to the end. The release stops where all pictures of the
        micro-batch have reached level 0, so that a target depends on which rows are together.
    """

    spec: EstimatorSpec
    needs_network: ClassVar[bool] = True

    @torch.no_grad()
    def __call__(
        self,
        x0: Tensor,
        draws: Draws,
        process: NoiseProcess,
        predict_cond: Predict,
        predict_empty: Predict,
    ) -> Point:
        """The point of every picture, with the teacher's clean picture as the target.

        Args:
            x0: [N, ...] clean pictures, from data or generated.
            draws: N streams of random numbers.
            process: A noise table that does not end in pure noise.
            predict_cond: The teacher with the prompts.
            predict_empty: The teacher with the empty prompt.

        Raises:
            ConfigError: Another noise process.
        """
        x0 = full_precision(x0)
        last = process.num_timesteps - 1
        stride = self._stride(process)
        index = (draws.uniform("start") * self.spec.steps).long()
        start = ((index + 1) * stride - 1).to(x0.device)
        noise = draws.normal("noise", tuple(x0.shape[1:]), x0.device, x0.dtype)
        walk = self.walk(
            process.add_noise(x0, noise, start), start, process, predict_cond, predict_empty
        )
        share = draws.uniform("student").to(x0.device)
        s = walk.t + 1 + (share * (last - walk.t)).long()
        more = draws.normal("more", tuple(x0.shape[1:]), x0.device, x0.dtype)
        return self.student_point(walk, s.clamp(max=last), more, process)

    @torch.no_grad()
    def walk(
        self,
        x: Tensor,
        t: Tensor,
        process: NoiseProcess,
        predict_cond: Predict,
        predict_empty: Predict,
        stop_early: bool = False,
    ) -> Walk:
        """The teacher's moves from (x, t), and its last estimate.

        A move goes to max(t - k, 0); at 0 a picture stays as it is.

        Args:
            x: [N, ...] noisy pictures.
            t: [N] their timesteps.
            process: The noise process.
            predict_cond: The teacher with the prompts.
            predict_empty: The teacher with the empty prompt.
            stop_early: As released: no evaluation once all pictures have reached 0.
        """
        stride = self._stride(process)
        for left in range(self.spec.num_moves, -1, -1):
            eps = self._guided(x, t, predict_cond, predict_empty)
            alpha, sigma = process.level(t, x)
            x0 = (x - sigma * eps) / alpha
            if left == 0:
                break
            goal = (t - stride).clamp(min=0)
            arrived = (t == 0).view(-1, *(1,) * (x.dim() - 1))
            x, t = torch.where(arrived, x, ddim_move(x, eps, t, goal, process)), goal
            if stop_early and not bool(t.any()):
                break
        return Walk(x, t, x0)

    def student_point(self, walk: Walk, s: Tensor, noise: Tensor, process: NoiseProcess) -> Point:
        """The student's input: the walk's end noised on to level s."""
        return Point(noisier(walk.x, noise, walk.t, s, process), s, walk.x0, in_x0=True)

    def _guided(
        self, x: Tensor, t: Tensor, predict_cond: Predict, predict_empty: Predict
    ) -> Tensor:
        w = self.spec.guidance
        if w == -1.0:
            return full_precision(predict_empty(x, t)).to(x.dtype)
        cond = full_precision(predict_cond(x, t)).to(x.dtype)
        if w == 0.0:
            return cond
        return cond + w * (cond - full_precision(predict_empty(x, t)).to(x.dtype))

    def _stride(self, process: NoiseProcess) -> int:
        if process.prediction == "flow" or process.ends_in_noise:
            raise ConfigError(
                "estimator.kind is truncated, which starts at the last level of a noise table; "
                "flow models and tables with zero terminal SNR have no picture left there"
            )
        grid = process.grid(self.spec.steps)
        return int(grid[1] - grid[0])
