"""Float32 matrix products on a CPU through oneDNN.

PyTorch sends float32 products on a CPU to MKL, which leaves AVX-512 unused on AMD processors;
oneDNN, which the same PyTorch carries for convolutions, does not: about twice as fast there, the
same precision everywhere. Nothing here changes what is computed on other devices or in other types.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST_ROWS = 8  # below, preparing oneDNN costs more than it gives (token by token decoding)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias without a gradient, for any strides: [m, k], [n, k] -> [m, n]."""
    if suits(x) and weight.dtype == x.dtype:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return nn.functional.linear(x, weight, bias)


def use_onednn(model: nn.Module) -> int:
    """Route every plain float32 `nn.Linear` of `model` that lies on a CPU; returns how many.

    Only the class of those modules changes: parameters, names and state dicts stay as they are.
    """
    count = 0
    for module in model.modules():
        if type(module) is nn.Linear and suits(module.weight):
            module.__class__ = CpuLinear
            count += 1
    return count


class CpuLinear(nn.Linear):
    """`nn.Linear` whose three float32 products run in oneDNN."""

    def forward(self, input: Tensor) -> Tensor:
        """The same as `nn.Linear.forward`."""
        rows = input.numel() // max(input.shape[-1], 1)
        if rows < SMALLEST_ROWS or not suits(input) or torch.is_autocast_enabled("cpu"):
            return super().forward(input)
        if torch.is_grad_enabled():
            return _Linear.apply(input, self.weight, self.bias)
        return product(input, self.weight, self.bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        out = product(x, weight, bias)
        return torch.ops.aten._unsafe_view(out, out.shape)  # a view may not be changed in place

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        d_x = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            d_x = product(gradient, weight.t())
        if ctx.needs_input_grad[1]:
            d_weight = product(gradient.flatten(0, -2).t(), x.flatten(0, -2).t())
        if ctx.needs_input_grad[2]:
            d_bias = gradient.flatten(0, -2).sum(0)
        return d_x, d_weight, d_bias


def suits(tensor: Tensor) -> bool:
    """Whether oneDNN can take it: float32 on a CPU, where PyTorch has oneDNN and it is on."""
    return (
        tensor.dtype == torch.float32
        and tensor.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
    )
