"""DoRA: it starts as its base, also where the base is stored in bfloat16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmalign.config import LoraSpec
from mmalign.models import lora
from mmalign.models.lora import comfyui_scale


class Net(nn.Module):
    """A convolution and a linear layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.linear = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv(x).mean((2, 3)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_fresh_dora_changes_nothing(dtype: torch.dtype) -> None:
    """With the norms of a bfloat16 sum every output would be off by up to 0.4 %."""
    torch.manual_seed(0)
    base, x = Net().to(dtype), torch.randn(4, 3, 6, 6, dtype=dtype)
    expected = base(x)
    spec = LoraSpec(rank=2, targets=["conv", "linear"], dora=True)
    policy: Any = lora.attach(base, spec, task=None)
    assert torch.equal(policy(x), expected)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        with policy.disable_adapter():
            expected = policy(x)
        assert torch.equal(policy(x), expected)


def test_the_magnitudes_are_norms_in_full_precision() -> None:
    base = Net().to(torch.bfloat16)
    norms = base.linear.weight.double().norm(dim=1)
    policy: Any = lora.attach(base, LoraSpec(rank=2, targets=["linear"], dora=True), task=None)
    layer = policy.base_model.model.linear.lora_magnitude_vector["default"].weight
    assert layer.dtype == torch.float32
    torch.testing.assert_close(layer.double(), norms, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3, 3)])
def test_the_scale_for_comfyui_undoes_its_other_norm(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    weight, product = torch.randn(shape).double(), torch.randn(shape).double()
    magnitude = torch.rand(6) + 0.5
    adapted = weight + product
    ours = adapted / adapted.flatten(1).norm(dim=1).view(-1, *[1] * (len(shape) - 1))
    ours = ours * magnitude.double().view(-1, *[1] * (len(shape) - 1))
    scale = comfyui_scale(weight, product.flatten(1), magnitude)
    theirs = adapted * scale / weight.flatten(1).norm(dim=1).view(-1, *[1] * (len(shape) - 1))
    torch.testing.assert_close(theirs, ours)
