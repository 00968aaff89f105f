"""Convolutions of few pixels as products: the same numbers, gradients, names and state."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from mmalign.models import cpu
from mmalign.models.cpu import CpuConv2d, use_products

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this PyTorch is built without oneDNN"
)


@pytest.fixture(autouse=True)
def _small_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "SMALLEST_WEIGHT", 1)


def pair(**options: Any) -> tuple[nn.Conv2d, nn.Conv2d]:
    plain = nn.Conv2d(6, 5, **options)
    fast = copy.deepcopy(plain)
    assert use_products(fast) == 1
    assert type(fast) is CpuConv2d
    return plain, fast


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": 3, "padding": 0, "stride": 2, "bias": False},
        {"kernel_size": 1},
        {"kernel_size": (3, 1), "padding": (1, 0)},
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_values_and_gradients_are_those_of_a_convolution(
    options: dict[str, Any], layout: torch.memory_format
) -> None:
    plain, fast = pair(**options)
    x, y = (torch.randn(2, 6, 7, 8, generator=torch.manual_seed(1)) for _ in range(2))
    x, y = (v.contiguous(memory_format=layout).requires_grad_() for v in (x, y))
    outputs = plain(x), fast(y)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-6)
    upstream = torch.randn_like(outputs[0])
    for output in outputs:
        output.backward(upstream)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-6)
    for a, b in zip(plain.parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(fast(y), outputs[1], rtol=0, atol=0)


def test_a_frozen_weight_gets_no_gradient_and_its_input_is_not_kept() -> None:
    _, fast = pair(kernel_size=3, padding=1)
    fast.requires_grad_(False)
    x = torch.randn(2, 6, 4, 4, requires_grad=True)
    kept: list[torch.Size] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        fast(x).sum().backward()
    assert fast.weight.grad is None
    assert x.grad is not None
    assert kept == [fast.weight.shape]


def test_many_pixels_go_the_usual_way(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fast = pair(kernel_size=3, padding=1)
    monkeypatch.setattr(CpuConv2d, "product", None)  # would fail if it were called
    x = torch.randn(2, 6, 16, 16)
    assert torch.equal(plain(x), fast(x))
    few = x[:1, :, :2, :2]
    with torch.autocast("cpu", torch.bfloat16):
        assert fast(few).dtype == torch.bfloat16
    assert fast.double()(few.double()).dtype == torch.float64


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "groups": 2, "out_channels": 6},
        {"kernel_size": 3, "dilation": 2},
        {"kernel_size": 3, "padding": "same"},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
        {"kernel_size": 3, "dtype": torch.float64},
    ],
    ids=str,
)
def test_unusual_ones_stay_as_they_are(options: dict[str, Any]) -> None:
    layer = nn.Conv2d(6, **{"out_channels": 5, **options})
    assert use_products(layer) == 0
    assert type(layer) is nn.Conv2d


def test_small_weights_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "SMALLEST_WEIGHT", 10_000)
    assert use_products(nn.Sequential(nn.Conv2d(6, 5, 3), nn.Conv2d(64, 64, 3))) == 1
