"""Picture LoRAs whose start took a part out of the U-Net (PiSSA, OLoRA), saved by diffusers."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from mmalign.config import DiffusionConfig, LoraSpec, ModelConfig
from mmalign.diffusion.components import load_components
from mmalign.diffusion.export import continue_lora, load_trained
from mmalign.errors import CheckpointError
from mmalign.models import lora
from mmalign.models.merge import merge_checkpoints

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


def base_of(folder: Path) -> Any:
    config = ModelConfig(path=str(folder))
    return deepcopy(load_components(config, DiffusionConfig(resolution=64)).denoiser).eval()


def weights(unet: Any) -> dict[str, Tensor]:
    """The weights that act in every adapted layer: those of the base, and the LoRA's product."""
    found: dict[str, Tensor] = {}
    for name, module in unet.named_modules():
        if name.endswith(("to_q", "to_v")):
            weight = module.weight.detach().clone()
            if hasattr(module, "lora_A"):
                weight += module.get_delta_weight("default").detach()
            found[name.removeprefix("base_model.model.")] = weight
    return found


def saved(pipeline: Path, folder: Path, start: str) -> dict[str, Tensor]:
    """Write a LoRA as a trainer of diffusers does; the weights that it trained."""
    unet = base_of(pipeline)
    unet.add_adapter(
        LoraConfig(r=4, lora_alpha=2, init_lora_weights=start, target_modules=["to_q", "to_v"])
    )
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    StableDiffusionXLPipeline.save_lora_weights(
        str(folder),
        unet_lora_layers=get_peft_model_state_dict(unet),
        **_collate_lora_metadata({"unet": unet}),
    )
    return weights(unet)


@pytest.mark.runs
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_merged_and_trained_further_it_is_what_was_trained(
    start: str, sdxl_dir: Path, tmp_path: Path
) -> None:
    expected = saved(sdxl_dir, tmp_path / "lora", start)
    base = weights(base_of(sdxl_dir))
    assert max((expected[name] - base[name]).abs().max() for name in base) > 1e-3
    out = merge_checkpoints(sdxl_dir, [(tmp_path / "lora", 1.0)], tmp_path / "out")
    policy = continue_lora(base_of(sdxl_dir), tmp_path / "lora")
    for found in (weights(base_of(out)), weights(policy)):
        assert found.keys() == expected.keys()
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6)
    with policy.disable_adapter():  # so the base is a reference
        assert all(torch.equal(weights_, base[n]) for n, weights_ in bases(policy).items())


def bases(policy: Any) -> dict[str, Tensor]:
    named = policy.get_base_model().named_modules()
    return {n: m.weight.detach() for n, m in named if n.endswith(("to_q", "to_v"))}


@pytest.mark.runs
def test_it_is_not_put_under_a_lora_of_another_start(sdxl_dir: Path, tmp_path: Path) -> None:
    saved(sdxl_dir, tmp_path / "lora", "pissa")
    policy = lora.attach(base_of(sdxl_dir), LoraSpec(rank=4, targets=["to_q", "to_v"]), task=None)
    with pytest.raises(CheckpointError, match="init_lora_weights is pissa"):
        load_trained(policy, tmp_path / "lora")


def test_start_that_is_drawn_at_random_is_refused(sdxl_dir: Path, tmp_path: Path) -> None:
    saved(sdxl_dir, tmp_path / "lora", "pissa_niter_4")
    with pytest.raises(CheckpointError, match="init_lora_weights = 'pissa_niter_4'"):
        merge_checkpoints(sdxl_dir, [(tmp_path / "lora", 1.0)], tmp_path / "out")
    with pytest.raises(CheckpointError, match="init_lora_weights = 'pissa_niter_4'"):
        continue_lora(base_of(sdxl_dir), tmp_path / "lora")
