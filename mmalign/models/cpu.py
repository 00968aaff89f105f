"""Float32 products and convolutions on a CPU, written for the shapes in which torch is slow.

`benchmarks/text_vs_trl.py` runs the products beside torch's own ("no oneDNN");
`benchmarks/diffusion_vs_diffusers.py --usual` both products and convolutions ("usual layers").
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# PyTorch sends float32 products on a CPU to MKL, which leaves AVX-512 unused on AMD processors;
# oneDNN, which the same PyTorch carries for convolutions, does not: about twice as fast there, the
# same precision everywhere. Nothing here changes what is computed on other devices or in other
# types.

SMALLEST_ROWS = 8  # below, preparing oneDNN costs more than it gives (token by token decoding)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias without a gradient, for any strides: [m, k], [n, k] -> [m, n]."""
    if suits(x) and weight.dtype == x.dtype:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return nn.functional.linear(x, weight, bias)


def use_onednn(model: nn.Module) -> int:
    """Route every plain float32 `nn.Linear` of `model` that lies on a CPU; returns how many."""
    return _exchange(model, nn.Linear, CpuLinear, lambda module: suits(module.weight))


def _exchange(
    model: nn.Module, plain: type[nn.Module], fast: type[nn.Module], fits: Callable[[Any], bool]
) -> int:
    """Only the class of modules changes: parameters, names and state dicts stay as they are."""
    found = [module for module in model.modules() if type(module) is plain and fits(module)]
    for module in found:
        module.__class__ = fast
    return len(found)


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


# oneDNN brings the weight of a convolution into a layout of its own at every call. Deep inside a
# U-Net that costs more than the convolution: Stable Diffusion's 1280 x 1280 x 3 x 3 weights meet
# 4 x 4 or 8 x 8 pixels there. A product of the unfolded pixels with the weight as it lies in memory
# needs no such copy: two to five times as fast there, forward and backward, in the same precision.

MOST_PIXELS = 256  # of all images of a batch; above, arranging the weight is soon paid back
SMALLEST_WEIGHT = 2**20  # below, a weight stays in the processor's cache and is arranged quickly


def use_products(model: nn.Module) -> int:
    """Route plain float32 `nn.Conv2d`s of many channels that lie on a CPU; returns how many."""
    return _exchange(model, nn.Conv2d, CpuConv2d, _is_plain)


def _is_plain(module: nn.Conv2d) -> bool:
    usual = module.groups == 1 and module.padding_mode == "zeros" and module.dilation == (1, 1)
    large = module.weight.numel() >= SMALLEST_WEIGHT
    return usual and large and not isinstance(module.padding, str) and suits(module.weight)


class CpuConv2d(nn.Conv2d):
    """`nn.Conv2d` that is a product of unfolded pixels wherever there are few of them."""

    def forward(self, input: Tensor) -> Tensor:
        """The same as `nn.Conv2d.forward`."""
        few = input.dim() == 4 and len(input) * math.prod(self._sides(input)) <= MOST_PIXELS
        if not few or not suits(input) or torch.is_autocast_enabled("cpu"):
            return super().forward(input)
        if torch.is_grad_enabled():
            return cast("Tensor", _Conv.apply(input, self.weight, self.bias, self))
        return self.product(input)

    def product(self, x: Tensor) -> Tensor:
        """The convolution as one product, without a gradient."""
        rows = nn.functional.unfold(x, **self.windows).transpose(1, 2)  # [N, H * W, C * kernel]
        found = product(rows, self.weight.flatten(1), self.bias)
        return found.transpose(1, 2).unflatten(2, self._sides(x)).contiguous()

    @property
    def windows(self) -> dict[str, Any]:
        """Where it looks, as `unfold` and its adjoint `fold` take it."""
        return dict(kernel_size=self.kernel_size, padding=self.padding, stride=self.stride)

    def _sides(self, x: Tensor) -> list[int]:
        given = zip(x.shape[-2:], self.kernel_size, self.padding, self.stride, strict=True)
        return [(side + 2 * int(pad) - kernel) // step + 1 for side, kernel, pad, step in given]


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: CpuConv2d
    ) -> Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        ctx.windows, ctx.size = layer.windows, x.shape[-2:]
        return layer.product(x)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = gradient.flatten(2).transpose(1, 2)  # [N, H * W, C_out]
        d_x = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            columns = product(rows, weight.flatten(1).t()).transpose(1, 2)
            d_x = nn.functional.fold(columns, ctx.size, **ctx.windows)
        if ctx.needs_input_grad[1]:
            columns = nn.functional.unfold(x, **ctx.windows).transpose(1, 2).flatten(0, 1)
            d_weight = product(rows.flatten(0, 1).t(), columns.t()).view_as(weight)
        if ctx.needs_input_grad[2]:
            d_bias = rows.flatten(0, 1).sum(0)
        return d_x, d_weight, d_bias, None
