"""Rows, configs and adapters for tests on tiny video models."""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING, Any

import torch

from mmalign.config import RunConfig
from mmalign.core import Needs
from mmalign.data.example import Candidate, Clip, Example, Media
from mmalign.models.adapter import build_adapter
from mmalign.models.reference import FrozenCopy

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from mmalign.video.adapter import VideoAdapter

ALL = Needs(reference=True, kl=True)


def run_config(folder: Path, **sections: Any) -> RunConfig:
    """A complete video config with some sections exchanged."""
    given: dict[str, Any] = {
        "modality": "video",
        "model": {"path": str(folder), "dtype": "float64", "lora": {"rank": 4}},
        "data": {"train": "none.jsonl"},
        "objective": {"name": "dpo"},
        "video": {"num_frames": 8},
        "output": "none",
    }
    for name, value in sections.items():
        old = given.get(name)
        given[name] = {**old, **value} if isinstance(old, dict) else value
    return RunConfig.model_validate(given)


def make_adapter(
    folder: Path, needs: Needs = ALL, *, moved: bool = True, **sections: Any
) -> VideoAdapter:
    """An adapter on a tiny model; `moved` puts the policy away from its reference."""
    torch.manual_seed(0)
    adapter: Any = build_adapter(run_config(folder, **sections), needs)
    _widen(adapter.policy)
    if isinstance(adapter.reference, FrozenCopy):
        _widen(adapter.reference.module)
    if moved:
        generator = torch.Generator().manual_seed(0)
        for name, parameter in adapter.policy.named_parameters():
            if parameter.requires_grad and ("lora_B" in name or "lora" not in name):
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.data += 0.05 * noise
    return adapter.eval()


def _widen(model: nn.Module) -> None:
    """Norms that compute in float32 whatever the model's precision get its precision."""

    def forward(self: Any, hidden: Tensor) -> Tensor:
        eps = getattr(self, "variance_epsilon", None) or getattr(self, "eps", 1e-6)
        return self.weight * hidden * (hidden.pow(2).mean(-1, keepdim=True) + eps).rsqrt()

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            vars(module)["forward"] = MethodType(forward, module)


def pair(clip: Path, name: str = "row", **changes: Any) -> Example:
    """A question about a clip with two answers."""
    given: dict[str, Any] = {
        "prompt": "What does the cat do?",
        "candidates": (
            Candidate("The cat plays in the sun.", spans=((8, 13),)),
            Candidate("Yeast makes bubbles.", spans=((0, 5),)),
        ),
        "labels": (1.0, 0.0),
        "media": Media((Clip(clip),)),
    }
    return Example(id=name, **{**given, **changes})


def gradients(adapter: VideoAdapter) -> Tensor:
    """All gradients as one vector; zeros where there is none."""
    parts = [p for p in adapter.parameters() if p.requires_grad]
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parts])
