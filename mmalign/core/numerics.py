"""Stable arithmetic that every loss shares: exponentials, sums over positions, batch-wide means."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from mmalign.errors import ArgumentError

Reduce = Literal["sum", "mean"]


def require(condition: bool, key: str, value: object, rule: str) -> None:
    """Raise ArgumentError `KEY is VALUE; it must be RULE` unless `condition` holds."""
    if not condition:
        raise ArgumentError(f"{key} is {value!r}; it must be {rule}")


def full_precision(x: Tensor) -> Tensor:
    """The tensor in float32, or wider where it already is: half types lose whole nats in sums."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class _Expm1Linear(torch.autograd.Function):
    """Forward expm1, backward exp; autograd's expm1(x) + 1 loses digits where exp(x) is small."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.limit = limit
        if limit == math.inf:
            return torch.expm1(x)
        return torch.expm1(x.clamp(max=limit)) + math.exp(limit) * (x - limit).clamp(min=0.0)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return grad_outputs[0] * torch.exp(x.clamp(max=ctx.limit)), None


def expm1_linear(x: Tensor, limit: float | None = 30.0) -> Tensor:
    """exp(x) - 1 up to `limit`, its tangent line beyond: finite, increasing, gradient never zero.

    Args:
        x: Exponents, any shape, float32 or wider.
        limit: Where the tangent line takes over; None for the plain function.
    """
    return _Expm1Linear.apply(x, math.inf if limit is None else limit)  # pyright: ignore


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, exact at both ends; for values, not for gradients."""
    return torch.where(x > -math.log(2.0), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def num_positions(mask: Tensor) -> Tensor:  # [B, K, L] -> [B, K]
    """Unmasked positions of each candidate, at least 1 so that an empty candidate means zero."""
    return mask.sum(-1).clamp(min=1)


def over_positions(
    values: Tensor, mask: Tensor, weight: Tensor | None = None, reduce: Reduce = "sum"
) -> Tensor:  # [B, K, L] -> [B, K]
    """Weighted sum over unmasked positions, in float32 or wider.

    Args:
        values: [B, K, L]; masked entries may hold anything finite.
        mask: [B, K, L] bool.
        weight: [B, K, L]; None means 1.
        reduce: `mean` divides the sum by the number of unmasked positions, whatever the weights.
    """
    total = torch.where(mask, full_precision(values), 0.0)
    if weight is not None:
        total = total * torch.where(mask, full_precision(weight), 0.0)
    total = total.sum(-1)
    return total / num_positions(mask) if reduce == "mean" else total


def is_distributed() -> bool:
    """True if several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def global_sum(x: Tensor) -> Tensor:
    """Elementwise sum of `x` over all processes, detached."""
    total = x.detach().clone()
    if is_distributed():
        dist.all_reduce(total)
    return total


def global_mean(x: Tensor) -> Tensor:  # any -> []
    """Mean of all elements of `x` over all processes, detached; 0 when there is none."""
    x = x.detach()
    total = global_sum(torch.stack([x.sum(), x.new_tensor(float(x.numel()))]))
    return total[0] / total[1].clamp(min=1.0)


class _GatherRows(torch.autograd.Function):
    """all_gather whose backward sums what every process sends back to the owner of a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int]) -> Tensor:
        padded = x.new_zeros(max(counts))
        padded[: x.shape[0]] = x
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        start = sum(counts[: dist.get_rank()])
        ctx.own = slice(start, start + x.shape[0])
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        grad = grad_outputs[0].clone()
        dist.all_reduce(grad)
        return grad[ctx.own], None


def on_cpu(tensor: Tensor) -> bool:
    """Whether the host may look at values without waiting for a device."""
    return tensor.device.type == "cpu"


def gather_rows(x: Tensor) -> tuple[Tensor, slice]:  # [B] -> [sum of all B], own slice
    """The rows of all processes, with gradient, and which of them are this process's own."""
    if not is_distributed():
        return x, slice(0, x.shape[0])
    here = torch.tensor([x.shape[0]], device=x.device)
    numbers = [torch.empty_like(here) for _ in range(dist.get_world_size())]
    dist.all_gather(numbers, here)
    counts = [int(number) for number in numbers]  # a last batch may be shorter somewhere
    gathered: Tensor = _GatherRows.apply(x, counts)  # pyright: ignore
    start = sum(counts[: dist.get_rank()])
    return gathered, slice(start, start + x.shape[0])
