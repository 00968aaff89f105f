"""Linear layers through oneDNN: the same numbers, gradients, names and state."""

from __future__ import annotations

import copy
import os
import platform
import resource
import subprocess
import sys

import pytest
import torch
from torch import nn

from mmalign.models import cpu
from mmalign.models.cpu import CpuLinear, product, use_onednn

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this PyTorch is built without oneDNN"
)


@pytest.fixture(autouse=True)
def _small_products_count_as_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "SMALLEST", 1)


def test_small_products_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "SMALLEST", 20 * 7 * 5)
    layer = nn.Linear(7, 5)
    use_onednn(layer)
    assert "_Linear" in type(layer(torch.randn(20, 7)).grad_fn).__name__
    assert "_Linear" not in type(layer(torch.randn(19, 7)).grad_fn).__name__


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


def test_other_types_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_lacks_bfloat16", lambda: False)
    model = nn.Sequential(nn.Linear(7, 5).double(), nn.Linear(7, 5).bfloat16())
    assert use_onednn(model) == 0
    assert type(model[0]) is nn.Linear
    layer = nn.Linear(7, 5)
    use_onednn(layer)
    layer.double()  # moved afterwards
    assert layer(torch.randn(20, 7).double()).dtype == torch.float64


@pytest.mark.parametrize("lacks", [True, False])
def test_autocast_decides_as_ever(lacks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_lacks_bfloat16", lambda: lacks)
    layer = nn.Linear(7, 5)
    use_onednn(layer)
    for x in (torch.randn(20, 7), torch.randn(20, 7).bfloat16()):
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        with torch.autocast("cpu", torch.float16):
            assert layer(x).dtype == torch.float16
    with pytest.raises(RuntimeError, match="same dtype"):
        layer(torch.randn(20, 7).bfloat16())


@pytest.mark.parametrize("casts", [True, False], ids=["autocast", "weights"])
def test_widened_products_are_those_of_bfloat16(
    casts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Operands of few bits, so that both ways are exact but for the rounding of the result."""
    monkeypatch.setattr(cpu, "_lacks_bfloat16", lambda: True)
    draw = torch.Generator().manual_seed(0)

    def whole(*shape: int) -> torch.Tensor:
        return torch.randint(-8, 9, shape, generator=draw).float()

    plain = nn.Linear(32, 24)
    plain.weight.data, plain.bias.data = whole(24, 32), whole(24)
    plain = plain if casts else plain.bfloat16()
    fast = copy.deepcopy(plain)
    assert use_onednn(fast) == 1
    x, upstream = whole(2, 20, 32), whole(2, 20, 24).bfloat16()
    x = x if casts else x.bfloat16()
    found = []
    for layer in (plain, fast):
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=casts):
            out = layer(given)
        out.backward(upstream)
        found.append((out, given.grad, layer.weight.grad, layer.bias.grad))
    for want, got in zip(*found, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=2**-8, atol=0)


def test_kernels_are_bounded_unless_the_user_bounds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    cpu.keep_few_kernels()
    assert os.environ["LRU_CACHE_CAPACITY"] == "7"
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == str(cpu.KERNELS)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's settings")
@pytest.mark.parametrize("told", [{}, {"MALLOC_TOP_PAD_": "0", "MALLOC_TRIM_THRESHOLD_": "0"}])
def test_memory_is_kept_for_the_next_step_unless_the_user_says_how(told: dict[str, str]) -> None:
    """Pages that the system hands out for a step's tensors, the tenth time, in a process alone."""
    program = (
        "import resource, torch; from mmalign.models.cpu import keep_memory; keep_memory()\n"
        "for step in range(10):\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    kept = [torch.ones(2**20 + 2**16 * i) for i in range(8)]; del kept\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | told,
        capture_output=True,
        text=True,
        check=True,
    )
    pages = 8 * 2**22 // resource.getpagesize()
    assert (int(done.stdout) > pages // 2) == bool(told)


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
