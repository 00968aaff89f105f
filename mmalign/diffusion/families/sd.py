"""Stable Diffusion 1.x, 2.x and XL, and pipelines built like them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.diffusion.families.base import Condition, Family, KohyaNames
from mmalign.diffusion.pipeline import pipeline_folder, read_json
from mmalign.errors import ConfigError, NeedsError
from mmalign.models.lora_files import Place, in_unet_block, in_unet_file, sd_name, sdxl_name

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


NUM_TIME_IDS = 6  # original size, crop, target size; the SDXL refiner has a score in place of one

REFINER = (
    "is an SDXL refiner, whose conditioning has an aesthetic score and which continues another "
    "model's images; preference data has neither. Train the base model"
)


class SDXL(SD):
    """A U-Net under two CLIP encoders side by side, a pooled embedding, and sizes."""

    name = "sdxl"
    title = "SDXL"
    pipeline = "StableDiffusionXLPipeline"
    encoders = ("text_encoder", "text_encoder_2")
    has_time_ids = True
    kohya = KohyaNames(
        version="sdxl_base_v1-0",
        architecture="stable-diffusion-xl-v1-base",
        place=lambda module, layers: Place(sdxl_name(module, layers), (module,)),
        is_known=in_unet_file,
        kohya_reads=in_unet_block,
        layers="layers_per_block",
        loader="StableDiffusionXLLoraLoaderMixin",
        implementation="https://github.com/Stability-AI/generative-models",
    )

    def fits(self, config: Mapping[str, Any]) -> bool:
        """The conditioning has a pooled embedding and sizes."""
        return config.get("addition_embed_type") == "text_time"

    def check(self, path: str | Path, config: Mapping[str, Any], revision: str | None) -> None:
        """Refuse the refiner too: it has five time ids, so its pooled width does not come out."""
        super().check(path, config, revision)
        pooled = self.pooled_width(config)
        encoder = pipeline_folder(path, revision) / "text_encoder_2" / "config.json"
        if read_json(encoder, missing={}).get("projection_dim", pooled) != pooled:
            raise ConfigError(f"pipeline {path}: {REFINER}")

    def encode(self, pipe: Any, prompts: list[str], device: torch.device) -> Condition:
        """The last but one hidden states of both, and the projected summary of the second."""
        found = pipe.encode_prompt(prompts, device=device, do_classifier_free_guidance=False)
        return Condition(found[0], found[2])

    def zeroes_empty(self, index: Mapping[str, Any]) -> bool:
        """Unless the pipeline says that it does not."""
        return bool(index.get("force_zeros_for_empty_prompt", True))

    def pooled_width(self, config: Mapping[str, Any]) -> int:
        """What the time ids leave of the added embedding."""
        width = config["projection_class_embeddings_input_dim"]
        return width - NUM_TIME_IDS * config["addition_time_embed_dim"]

    def sized(self, cond: Condition, size: tuple[int, int]) -> Condition:
        """An image of this size that was not cropped."""
        ids = torch.tensor([*size, 0, 0, *size], dtype=torch.float32, device=cond.embeds.device)
        return replace(cond, time_ids=ids.repeat(len(cond), 1))

    def call(self, model: nn.Module, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """The U-Net under prompt, pooled prompt and time ids."""
        pooled = self.given(cond.pooled, "pooled embeddings (those of text_encoder_2)")
        time_ids = self.given(cond.time_ids, "time ids (original size, crop, target size)")
        if time_ids.shape[-1] != NUM_TIME_IDS:
            raise NeedsError(
                f"SDXL needs {NUM_TIME_IDS} time ids an image (height, width, top, left, target "
                f"height, target width); found {time_ids.shape[-1]}"
            )
        added = {"text_embeds": pooled, "time_ids": time_ids}
        given = {"encoder_hidden_states": cond.embeds, "added_cond_kwargs": added}
        return model(x, t, **given, return_dict=False)[0]

    kohya_version = Family.kohya_version  # there is one SDXL
