"""The second network of two-model guidance: the base with a negative change, and a positive one.

W_negative = W_base + a * delta_positive + b * delta_negative

delta_positive is what the run has trained, a is `negative_keeps` and b `negative_weight`. a = 1
keeps the positive model's offset, as the released scripts do by default; a = 0 is the base with the
negative change alone.

Source: Diffusion-NPO, `gen.py` and `gen_xl.py`: a = 1 - merge_weight, b = 1.
Departs: nothing; summed in float64 and rounded once.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from peft import PeftModel

from mmalign.diffusion.lora_export import lora_of
from mmalign.diffusion.models import load_denoiser
from mmalign.models.merge import Change, LoraDelta, combined, open_delta

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mmalign.config import ModelConfig, PictureSampleSpec
    from mmalign.models.merge import Delta


def load_negative(
    spec: PictureSampleSpec, model: ModelConfig, policy: nn.Module
) -> nn.Module | None:
    """The negative network on the policy's device; None where the config names none.

    Args:
        spec: `negative` is the final folder of a run, a LoRA (file or folder, in the layout of
            diffusers, kohya or peft), or a folder with a whole U-Net or transformer.
        model: The base that both changes are of.
        policy: The positive model, with or without adapter.

    Raises:
        CheckpointError: The negative model is of another base.
    """
    if spec.negative is None:
        return None
    network = load_denoiser(model.path, model)
    state = network.state_dict()
    with ExitStack() as files, torch.no_grad():
        deltas: list[tuple[Delta, float]] = [
            (open_delta(spec.negative, list(state), files), spec.negative_weight)
        ]
        if spec.negative_keeps:
            deltas.append((_delta_of(policy, list(state)), spec.negative_keeps))
        for name, tensor in state.items():
            if tensor.is_floating_point():
                tensor.copy_(combined(name, tensor, deltas))
    return network.to(next(policy.parameters()).device).requires_grad_(False).eval()


def _delta_of(policy: nn.Module, names: list[str]) -> Delta:
    """What a live policy changes in its base."""
    if isinstance(policy, PeftModel):
        return LoraDelta(lora_of(policy), names)
    state = policy.state_dict()

    def whole(name: str, base: Tensor) -> Change | None:
        return Change(state[name].to(base.device).double(), replaces=True)

    return whole
