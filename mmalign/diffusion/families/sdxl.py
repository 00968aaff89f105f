"""Stable Diffusion XL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.diffusion.families.base import Condition, Family, KohyaNames
from mmalign.diffusion.families.sd import SD
from mmalign.diffusion.pipeline import pipeline_folder, read_json
from mmalign.errors import ConfigError, NeedsError
from mmalign.models.lora_files import Place, in_unet_block, in_unet_file, sdxl_name

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
