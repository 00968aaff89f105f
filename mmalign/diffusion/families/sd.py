"""Stable Diffusion 1.x and 2.x, and pipelines built like them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.diffusion.families.base import Condition, Family, KohyaNames
from mmalign.errors import ConfigError
from mmalign.models.lora_files import Place, in_unet_block, in_unet_file, sd_name

_SD2_WIDTH = 1024  # of the text encoder's output; 768 in SD 1


class SD(Family):
    """A U-Net under one CLIP encoder's last hidden states."""

    name = "sd"
    title = "SD"
    pipeline = "StableDiffusionPipeline"
    denoiser = "UNet2DConditionModel"
    part = "unet"
    encoders = ("text_encoder",)
    width = "cross_attention_dim"
    kohya = KohyaNames(
        version="sd_v1",
        architecture="stable-diffusion-v1",
        place=lambda module, _: Place(sd_name(module), (module,)),
        is_known=in_unet_file,
        kohya_reads=in_unet_block,
        loader="StableDiffusionLoraLoaderMixin",
    )

    def fits(self, config: Mapping[str, Any]) -> bool:
        """The conditioning is the prompt alone."""
        return config.get("addition_embed_type") is None

    def check(self, path: str | Path, config: Mapping[str, Any], revision: str | None) -> None:
        """Refuse U-Nets that read more than a noisy image and a prompt (SDXL: and sizes)."""
        ins, outs = config.get("in_channels", 4), config.get("out_channels", 4)
        if ins != outs:
            known = {9: "an inpainting", 8: "an image-editing", 7: "an upscaling"}
            what = (known | {5: "a depth-guided"}).get(ins, "another")
            raise ConfigError(
                f"pipeline {path}: is {what} model: its U-Net reads {ins} channels and returns "
                f"{outs}, so it needs more than a prompt and an image. Use the text-to-image model"
            )
        for name in ("class_embed_type", "time_cond_proj_dim", "encoder_hid_dim_type"):
            if config.get(name) is not None:
                raise ConfigError(
                    f"pipeline {path}: its U-Net has {name} {config[name]!r}, an input that "
                    "text-to-image training does not have"
                )
        embed = config.get("addition_embed_type")
        if embed not in (None, "text_time"):
            raise ConfigError(
                f"pipeline {path}: its U-Net has addition_embed_type {embed!r}; supported are none "
                "(SD) and 'text_time' (SDXL)"
            )

    def encode(self, pipe: Any, prompts: list[str], device: torch.device) -> Condition:
        """The last hidden states."""
        return Condition(pipe.encode_prompt(prompts, device, 1, False)[0])

    def pooled_width(self, config: Mapping[str, Any]) -> int:
        """None."""
        return 0

    def call(self, model: nn.Module, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """The U-Net under the prompt."""
        return model(x, t, encoder_hidden_states=cond.embeds, return_dict=False)[0]

    def kohya_version(
        self, names: KohyaNames, config: Mapping[str, Any], prediction: str
    ) -> tuple[str, str]:
        """SD 2 has versions of its own; it is known by the width of its prompt embeddings."""
        if config.get("cross_attention_dim") != _SD2_WIDTH:
            return names.version, names.architecture
        if prediction == "v_prediction":
            return "sd_v2_v", "stable-diffusion-v2-768-v"
        return "sd_v2", "stable-diffusion-v2-512"
