"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.diffusion.families.base import Condition, Family, KohyaNames
from mmalign.models.lora_files import in_sd3_file, sd3_place


class SD3(Family):
    """A flow transformer under two CLIP encoders and T5; where T5 is left out, under zeros.

    The states of both CLIP encoders side by side, filled up with zeros to T5's width, are followed
    by T5's; the projected summaries of the CLIP encoders are the pooled embedding.
    """

    name = "sd3"
    title = "SD3"
    pipeline = "StableDiffusion3Pipeline"
    denoiser = "SD3Transformer2DModel"
    encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    optional = ("text_encoder_3",)
    t5 = "text_encoder_3"
    kohya = KohyaNames(
        version="sd3",
        architecture="stable-diffusion-3",
        place=sd3_place,
        is_known=in_sd3_file,
        kohya_reads=lambda _: True,
        layers="num_layers",
        network="networks.lora_sd3",
    )

    def encode(self, pipe: Any, prompts: list[str], device: torch.device) -> Condition:
        """All three, or two and zeros."""
        options = {"prompt_2": None, "prompt_3": None, "max_sequence_length": self.t5_limit}
        found = pipe.encode_prompt(
            prompts, device=device, do_classifier_free_guidance=False, **options
        )
        return Condition(found[0], found[2])

    def num_places(self, limits: Mapping[str, int]) -> int:
        """CLIP's and T5's; where T5 is left out its places hold zeros."""
        return limits["text_encoder"] + limits.get("text_encoder_3", 0)

    def call(self, model: nn.Module, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """The transformer under prompt and pooled prompt."""
        pooled = self.given(cond.pooled, "pooled embeddings (those of both CLIP encoders)")
        given = {"encoder_hidden_states": cond.embeds, "pooled_projections": pooled, "timestep": t}
        return model(hidden_states=x, **given, return_dict=False)[0]
