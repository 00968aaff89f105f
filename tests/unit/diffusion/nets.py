"""What the diffusion tests share: the golden file's analytic networks, its table, given draws."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from goldens import fold, load, tensor
from torch import Tensor

from mmalign.core import CandidateLogps, Loss, Objective
from mmalign.diffusion.estimators import Point, Predict, RowRNG
from mmalign.diffusion.process import NoiseProcess, VPSchedule
from mmalign.diffusion.scores import denoising_error

GOLDEN = load("diffusion")


def table(prediction: Any = "epsilon") -> VPSchedule:
    """SD 1.5's noise table as the golden file stores it."""
    stored = torch.tensor(GOLDEN["schedule"]["alphas_cumprod_float32"], dtype=torch.float32)
    return VPSchedule(stored, prediction)


def rows(halves: Any) -> Tensor:  # [2B, ...] chosen, then rejected -> [B * 2, ...] row by row
    return fold(tensor(halves)).flatten(0, 1)


def halves(flat: Tensor) -> Tensor:  # the way back
    pairs = flat.unflatten(0, (-1, 2))
    return torch.cat([pairs[:, 0], pairs[:, 1]])


class Net:
    """y = a x cos(t / 1000) + b mean(c): network A, with its two parameters as leaves."""

    def __init__(self, weights: list[float], condition: Tensor) -> None:
        self.a, self.b = (tensor(w).requires_grad_() for w in weights)
        self.condition = condition  # [N, ...]
        self.called: list[list[float]] = []

    def __call__(self, x: Tensor, t: Tensor, rows: Tensor | None = None, /) -> Tensor:
        self.called.append(t.tolist())
        shape = (-1, *(1,) * (x.dim() - 1))
        level = torch.cos(t.to(x) / 1000.0).view(shape)
        condition = self.condition if rows is None else self.condition[rows]
        return self.a * x * level + self.b * condition.flatten(1).mean(1).view(shape)


class Given(RowRNG):
    """Stored numbers by name, instead of streams."""

    def __init__(self, numbers: Mapping[str, Tensor]) -> None:
        super().__init__([0] * len(next(iter(numbers.values()))))
        self.numbers = dict(numbers)

    def normal(
        self,
        name: str,
        shape: tuple[int, ...],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        assert self.numbers[name].shape[1:] == shape
        return self.numbers[name].to(device=device, dtype=dtype)


def logps(policy: Tensor, reference: Tensor | None = None, **extra: Any) -> CandidateLogps:
    """Errors [N] of pairs, row by row, as an adapter hands them over."""
    shaped = (-0.5 * policy).view(-1, 2, 1)
    fields: dict[str, Any] = {"labels": torch.tensor([1.0, 0.0]).expand(len(shaped), 2)}
    return CandidateLogps(
        policy=shaped,
        mask=torch.ones_like(shaped, dtype=torch.bool),
        reference=None if reference is None else (-0.5 * reference).view(-1, 2, 1),
        **(fields | extra),
    )


def pair_results(
    objective: Objective,
    point: Point,
    process: NoiseProcess,
    policy: Net,
    reference: Predict,
    labels: Tensor | None = None,
) -> dict[str, Tensor]:
    """What a pair case of the golden file lists, from one pass of both networks."""
    t = process.timestep_input(point.t)
    error = denoising_error(policy(point.x_t, t), point, process)
    ref_error = denoising_error(reference(point.x_t, t), point, process).detach()
    given = {} if labels is None else {"labels": labels}
    loss: Loss = objective(logps(error, ref_error, **given))
    assert loss.rewards is not None
    margin = loss.rewards[:, 0] - loss.rewards[:, 1]
    weight = 1.0 if labels is None else labels[:, 0] - labels[:, 1]
    slopes = torch.autograd.grad(loss.value, [policy.a, policy.b])
    gap = (error - ref_error).view(-1, 2)
    return {
        "logit": weight * margin,
        "loss": loss.value,
        "implicit_acc": loss.metrics["rewards/accuracies"],
        "raw_model_loss": error.mean(),
        "raw_ref_loss": ref_error.mean(),
        "w_diff": gap[:, 0],
        "l_diff": gap[:, 1],
        "dloss_da": slopes[0],
        "dloss_db": slopes[1],
    }
