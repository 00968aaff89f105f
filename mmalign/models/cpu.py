"""Products and convolutions on a CPU, written for what torch is slow at.

`benchmarks/text_vs_trl.py` runs the products beside torch's own ("no oneDNN");
`benchmarks/diffusion_vs_diffusers.py --usual` both products and convolutions ("usual layers").
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
import time
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# PyTorch sends float32 products on a CPU to MKL, which leaves AVX-512 unused on AMD processors;
# oneDNN, which the same PyTorch carries for convolutions, does not: about twice as fast there, the
# same precision everywhere. Nothing here changes what is computed on other devices.
#
# A CPU without instructions for bfloat16 computes such products five times as slowly as those of
# float32. There, bfloat16 operands are widened: the sums are float32's either way, and the result
# is rounded to bfloat16 as it would be.

KERNELS = 16  # three products of a layer and of the head come in 15 shapes a step
SMALLEST_ROWS = 8  # below, preparing oneDNN costs more than it gives (token by token decoding)
SMALLEST = 2**25  # multiplications; below, MKL is done before oneDNN has prepared a new shape


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias without a gradient, for any strides: [m, k], [n, k] -> [m, n]."""
    large = x.numel() * len(weight) >= SMALLEST
    if large and _library != "mkl" and suits(x) and weight.dtype == x.dtype:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    if is_slow(x):
        with torch.autocast("cpu", enabled=False):
            wide = product(x.float(), weight.float(), None if bias is None else bias.float())
        return wide.to(x.dtype)
    return nn.functional.linear(x, weight, bias)


Library = Literal["onednn", "mkl", "mixed"]
LIBRARIES: tuple[Library, ...] = get_args(Library)
_library: Library = "onednn"


def use(library: Library) -> None:
    """Let a library compute all products of this process from now on.

    Args:
        library: `mixed` is oneDNN but for the gradients of weights. oneDNN copies both of their
            operands first, which lie transposed; MKL takes them as they lie.
    """
    global _library  # as torch's number of threads is one of the process
    _library = library


def gradient_of(weight: Tensor, upstream: Tensor, x: Tensor) -> Tensor:
    """Of a weight [n, k], in its precision: upstream^T x, for [..., n] and [..., k]."""
    rows, columns = upstream.flatten(0, -2).float(), x.flatten(0, -2).float()
    if _library == "mixed":
        return (rows.t() @ columns).to(weight.dtype)
    return product(rows.t(), columns.t()).to(weight.dtype)


@cache
def faster() -> Library:
    """The library that computes the products of a middling layer sooner here; takes 2 seconds.

    oneDNN for outputs and what flows back through them, which needs fewer bytes at the same time,
    unless the other is a tenth faster; for gradients of weights whichever is faster.
    """
    x, weight, upstream = torch.randn(1024, 768), torch.randn(2048, 768), torch.randn(1024, 2048)
    kinds = {
        "through": lambda: (product(x, weight), product(upstream, weight.t())),
        "weights": lambda: gradient_of(weight, upstream, x),
    }
    taken = {(kind, library): math.inf for kind in kinds for library in ("onednn", "mkl")}
    before, end, rounds = _library, time.perf_counter() + 2.0, 0
    while time.perf_counter() < end or not rounds:  # in turns: what else runs here meets both
        rounds += 1
        for kind, library in taken:
            use(cast("Library", library))
            began = time.perf_counter()
            kinds[kind]()
            taken[kind, library] = min(taken[kind, library], time.perf_counter() - began)
    use(before)
    if taken["through", "mkl"] < 0.9 * taken["through", "onednn"]:
        return "mkl"
    return "mixed" if taken["weights", "mkl"] < taken["weights", "onednn"] else "onednn"


@cache
def _lacks_bfloat16() -> bool:
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def is_slow(tensor: Tensor) -> bool:
    """Whether this CPU has no instructions for products of the tensor's type."""
    return tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" and _lacks_bfloat16()


def keep_few_kernels() -> None:
    """Bound what oneDNN keeps, for models whose shapes are new in every step.

    It prepares a kernel for each shape that it meets, of a mebibyte or more, and keeps the last
    1024. Both of its caches read their size at the first product of a process; one that the
    environment sets already stays.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(KERNELS))


def keep_memory() -> None:
    """Have glibc keep what a step frees for the next step, whose tensors are of like size.

    By default it gives blocks of some mebibytes back at once and asks for them again, and the
    system clears every page, which shows where a model is small and its images are many. A process
    whose environment says how memory is kept stays as it is; other C libraries do too.
    """
    told = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES"}
    if sys.platform != "linux" or not told.isdisjoint(os.environ):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        for option, value in _KEPT.items():
            library.mallopt(option, value)


_KEPT = {-3: 2**25, -1: 2**29, -2: 2**26}
"""mallopt's numbers of: the least block that is given back at once (32 MiB is the most that it
takes), the free memory that is kept at the end of the heap, and the step by which that grows."""


def use_onednn(model: nn.Module) -> int:
    """Route every plain `nn.Linear` of `model` that lies on a CPU; returns how many."""
    return _exchange(model, nn.Linear, CpuLinear, lambda m: suits(m.weight) or is_slow(m.weight))


def _exchange(
    model: nn.Module, plain: type[nn.Module], fast: type[nn.Module], fits: Callable[[Any], bool]
) -> int:
    """Only the class of modules changes: parameters, names and state dicts stay as they are."""
    found = [module for module in model.modules() if type(module) is plain and fits(module)]
    for module in found:
        module.__class__ = fast
    return len(found)


class CpuLinear(nn.Linear):
    """`nn.Linear` whose three products run in oneDNN, in float32 where bfloat16 would be slow."""

    def forward(self, input: Tensor) -> Tensor:
        """The same as `nn.Linear.forward`."""
        casts = torch.is_autocast_enabled("cpu") and (suits(input) or is_slow(input))
        x = input.to(torch.get_autocast_dtype("cpu")) if casts else input
        few = x.numel() < max(SMALLEST_ROWS * x.shape[-1], SMALLEST // self.out_features)
        if few or not (suits(x) or (is_slow(x) and (casts or self.weight.dtype == x.dtype))):
            return super().forward(input)
        with torch.autocast("cpu", enabled=False):
            if torch.is_grad_enabled():
                return _Linear.apply(x, self.weight, self.bias)
            return product(x, self.weight, self.bias)


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
            d_weight = gradient_of(weight, gradient, x)
        if ctx.needs_input_grad[2]:
            d_bias = gradient.flatten(0, -2).sum(0, dtype=weight.dtype)
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
            d_weight = gradient_of(weight, rows, columns).view_as(weight)
        if ctx.needs_input_grad[2]:
            d_bias = rows.flatten(0, 1).sum(0)
        return d_x, d_weight, d_bias, None
