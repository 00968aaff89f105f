"""LoRA files that change text encoders beside the denoiser: refused, applied, or left out."""

from __future__ import annotations

import logging
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from mmalign.config import DiffusionConfig, ModelConfig
from mmalign.diffusion.components import load_components
from mmalign.diffusion.export import continue_lora
from mmalign.errors import CheckpointError, ConfigError
from mmalign.models.merge import merge_checkpoints

IDS = torch.arange(8)[None]


def adapted(model: Any, targets: list[str]) -> tuple[Any, dict[str, Tensor]]:
    """A model with a trained LoRA of rank 2 and scale 2, and its tensors by their modules."""
    policy: Any = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=targets))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    tensors = get_peft_model_state_dict(policy)
    return policy, {name.removeprefix("base_model.model."): t for name, t in tensors.items()}


class Lora:
    """A LoRA on the U-Net and on the text encoders of a pipeline, and what those encode."""

    def __init__(self, folder: Path) -> None:
        from diffusers.pipelines.pipeline_utils import DiffusionPipeline

        torch.manual_seed(0)
        pipe: Any = DiffusionPipeline.from_pretrained(folder)
        names = [n for n in ("text_encoder", "text_encoder_2") if getattr(pipe, n, None)]
        _, self.unet = adapted(pipe.unet, ["to_q"])
        found = {n: adapted(getattr(pipe, n), ["q_proj", "fc1"]) for n in names}
        self.encoders = {name: tensors for name, (_, tensors) in found.items()}
        with torch.no_grad():
            self.told = {name: model(IDS)[0] for name, (model, _) in found.items()}

    def diffusers(self, file: Path) -> Path:
        """As diffusers writes it, with alpha where its readers find it."""
        tensors = {f"unet.{name}": t for name, t in self.unet.items()}
        for part, own in self.encoders.items():
            tensors |= {f"{part}.{name}": t for name, t in own.items()}
        scaled = {n: t * 2 if "lora_B" in n else t for n, t in tensors.items()}  # alpha = rank
        save_file({n: t.contiguous() for n, t in scaled.items()}, file)
        return file

    def kohya(self, file: Path) -> Path:
        """As kohya writes it: lora_te for the one encoder of SD, lora_te1 and lora_te2 for two."""
        one = {"text_encoder": "lora_te"}
        two = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
        prefixes = {"unet": "lora_unet", **(two if len(self.encoders) > 1 else one)}
        tensors: dict[str, Tensor] = {}
        for part, own in {"unet": self.unet, **self.encoders}.items():
            for name, tensor in own.items():
                layer, _, factor = name.removesuffix(".weight").rpartition(".lora_")
                if part != "unet" and not layer.startswith("text_model"):
                    layer = f"text_model.{layer}"
                key = f"{prefixes[part]}_{layer.replace('.', '_')}"
                side = {"A": "down", "B": "up"}[factor]
                tensors[f"{key}.lora_{side}.weight"] = tensor.contiguous()
                tensors[f"{key}.alpha"] = torch.tensor(4.0)
        save_file(tensors, file)
        return file


def encoded(folder: Path, name: str) -> Tensor:
    import transformers

    kind = transformers.CLIPTextModel if name == "text_encoder" else None
    kind = kind or transformers.CLIPTextModelWithProjection
    with torch.no_grad():
        return kind.from_pretrained(folder / name)(IDS)[0]


@pytest.mark.runs
@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("family", ["sd15_dir", "sdxl_dir"])
def test_both_are_merged_into_a_pipeline(
    request: pytest.FixtureRequest, tmp_path: Path, family: str, layout: str
) -> None:
    base: Path = request.getfixturevalue(family)
    lora = Lora(base)
    file = getattr(lora, layout)(tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match=r"changes a text encoder \(\d+ tensors do\)"):
        merge_checkpoints(base, [(file, 1.0)], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    out = merge_checkpoints(base, [(file, 1.0)], tmp_path / "out", text_encoders="apply")
    for name, told in lora.told.items():
        assert float((encoded(base, name) - told).abs().max()) > 1e-3
        torch.testing.assert_close(encoded(out, name), told, rtol=1e-4, atol=1e-5)
    alone = merge_checkpoints(base, [(file, 1.0)], tmp_path / "alone", text_encoders="ignore")
    for name in lora.told:
        assert torch.equal(encoded(alone, name), encoded(base, name))


def test_they_are_left_out_with_a_count(
    sd15_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = Lora(sd15_dir).diffusers(tmp_path / "lora.safetensors")
    config = ModelConfig(path=str(sd15_dir), adapter=str(file))
    unet = load_components(config, DiffusionConfig(resolution=64)).denoiser
    with pytest.raises(CheckpointError, match="adapter_text_encoders: ignore, leaves the encoders"):
        continue_lora(deepcopy(unet), file)
    with caplog.at_level(logging.WARNING):
        policy = continue_lora(deepcopy(unet), file, encoders="ignore")
    assert any("lora_" in name for name, _ in policy.named_parameters())
    assert "8 tensors that change text encoders are left out (8 of text_encoder)" in caplog.text


def test_an_encoder_that_the_base_lacks_is_named(
    sd15_dir: Path, sdxl_dir: Path, tmp_path: Path
) -> None:
    lora = Lora(sdxl_dir)
    lora.unet = Lora(sd15_dir).unet
    file = lora.diffusers(tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match=r"changes text_encoder_2, which .* does not have"):
        merge_checkpoints(sd15_dir, [(file, 1.0)], tmp_path / "out", text_encoders="apply")
    with pytest.raises(ConfigError, match="text-encoders is 'maybe'; it must be one of stop"):
        merge_checkpoints(sd15_dir, [(file, 1.0)], tmp_path / "out", text_encoders="maybe")
    assert not (tmp_path / "out").exists()
