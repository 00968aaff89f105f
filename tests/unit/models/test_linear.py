"""Linear layers through oneDNN: the same numbers, gradients, names and state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mmalign.models.cpu import CpuLinear, product, use_onednn

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this PyTorch is built without oneDNN"
)


@pytest.mark.parametrize("shape", [(3, 7), (40, 7), (2, 20, 7)])
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_those_of_linear(shape: tuple[int, ...], bias: bool) -> None:
    plain = nn.Linear(7, 5, bias=bias)
    fast = copy.deepcopy(plain)
    assert use_onednn(fast) == 1
    x, y = (torch.randn(shape, generator=torch.manual_seed(1)).requires_grad_() for _ in range(2))
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


def test_what_is_frozen_gets_no_gradient_and_keeps_no_input() -> None:
    layer = nn.Linear(7, 5).requires_grad_(False)
    use_onednn(layer)
    x = torch.randn(20, 7, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x).sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(20, 7))
    assert all(tensor.shape != x.shape for tensor in kept)


def test_other_types_stay_where_they_are() -> None:
    model = nn.Sequential(nn.Linear(7, 5).double(), nn.Linear(7, 5).bfloat16())
    assert use_onednn(model) == 0
    assert type(model[0]) is nn.Linear
    layer = nn.Linear(7, 5)
    use_onednn(layer)
    layer.double()  # moved afterwards
    assert layer(torch.randn(20, 7).double()).dtype == torch.float64


def test_autocast_decides_as_ever() -> None:
    layer = nn.Linear(7, 5)
    use_onednn(layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(20, 7)).dtype == torch.bfloat16


def test_names_state_and_copies_are_kept() -> None:
    model = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert use_onednn(model) == 2
    assert use_onednn(model) == 0
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    twin = copy.deepcopy(model)
    assert type(twin[0]) is CpuLinear
    assert twin[0].weight is not model[0].weight


def test_any_strides() -> None:
    x, weight = torch.randn(9, 30).t(), torch.randn(9, 12).t()
    torch.testing.assert_close(product(x, weight), x @ weight.t(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 8, 16), (24, 16)])
def test_the_output_may_be_changed_in_place(shape: tuple[int, ...]) -> None:
    layer = nn.Linear(16, 12)
    expected = (layer(torch.ones(shape)) * 2).sum()
    (want,) = torch.autograd.grad(expected, [layer.weight])
    use_onednn(layer)
    out = layer(torch.ones(shape))
    out *= 2
    (got,) = torch.autograd.grad(out.sum(), [layer.weight])
    torch.testing.assert_close(got, want)
