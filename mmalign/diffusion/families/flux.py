"""FLUX.1, dev and schnell."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmalign.diffusion.families.base import Condition, Family
from mmalign.diffusion.process import NoiseProcess, Size, process_from

_PATCH = 2  # latents a side that are packed into the channels of one token


class FLUX(Family):
    """A flow transformer of packed latents under T5's states and CLIP's pooled output.

    Levels are shifted by exp(mu), mu linear in the number of an image's tokens, where the scheduler
    has `use_dynamic_shifting` (dev). dev was distilled with guidance and is given its scale;
    schnell is not.
    """

    name = "flux"
    title = "FLUX"
    pipeline = "FluxPipeline"
    denoiser = "FluxTransformer2DModel"
    encoders = ("text_encoder", "text_encoder_2")
    t5 = "text_encoder_2"
    t5_limit = 512

    def latent_channels(self, config: Mapping[str, Any]) -> int:
        """Of the VAE: a token has four latents side by side."""
        return int(config["in_channels"]) // _PATCH**2

    def patch_size(self, config: Mapping[str, Any]) -> int:
        """Packed by the pipeline and not by the denoiser, whose own `patch_size` is 1."""
        return _PATCH

    def is_distilled(self, config: Mapping[str, Any]) -> bool:
        """dev."""
        return bool(config.get("guidance_embeds"))

    def encode(self, pipe: Any, prompts: list[str], device: torch.device) -> Condition:
        """T5's states, and CLIP's pooled output."""
        embeds, pooled, _ = pipe.encode_prompt(
            prompts, None, device, max_sequence_length=self.t5_limit
        )
        return Condition(embeds, pooled)

    def num_places(self, limits: Mapping[str, int]) -> int:
        """T5's."""
        return limits["text_encoder_2"]

    def call(self, model: nn.Module, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """The transformer on packed latents.

        As in the pipeline the timestep is rounded to the network's dtype and divided by 1000, which
        the network undoes. In bfloat16 that leaves 500 of 1000 timesteps distinct, and those that
        are trained are those that will be sampled.
        """
        from diffusers.pipelines.flux.pipeline_flux import FluxPipeline as pipe

        (rows, channels, height, width), places = x.shape, cond.embeds.shape[1]
        ids = pipe._prepare_latent_image_ids(rows, height // 2, width // 2, x.device, x.dtype)  # pyright: ignore[reportPrivateUsage]
        output = model(
            hidden_states=pipe._pack_latents(x.contiguous(), rows, channels, height, width),  # pyright: ignore[reportPrivateUsage]
            timestep=t.to(x.dtype) / 1000,
            guidance=cond.guidance,
            pooled_projections=self.given(cond.pooled, "pooled embeddings (CLIP's)"),
            encoder_hidden_states=cond.embeds,
            txt_ids=torch.zeros(places, 3, device=x.device, dtype=x.dtype),
            img_ids=ids,
            return_dict=False,
        )[0]
        return pipe._unpack_latents(output, height, width, 1)  # pyright: ignore[reportPrivateUsage]

    def process(
        self, scheduler: Mapping[str, Any], prediction: str = "auto", zero_snr: bool = False
    ) -> NoiseProcess:
        """A flow whose shift follows the size of the latents, where the scheduler says so."""

        def shift_at(size: Size) -> float:
            mu = _mu(scheduler, size)
            return mu if scheduler.get("time_shift_type") == "linear" else math.exp(mu)

        return process_from(scheduler, prediction, zero_snr, shift_at)

    def set_timesteps(self, scheduler: Any, num_steps: int, size: Size) -> None:
        """Evenly spaced levels before the shift, down to 1 / num_steps."""
        sigmas = np.linspace(1.0, 1 / num_steps, num_steps)
        if scheduler.config.get("use_flow_sigmas"):
            sigmas = None
        scheduler.set_timesteps(num_steps, sigmas=sigmas, mu=_mu(scheduler.config, size))


def _mu(scheduler: Mapping[str, Any], size: Size) -> float:
    """The exponent of the shift for latents of a size, as the pipeline computes it."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    tokens = (size[0] // _PATCH) * (size[1] // _PATCH)
    return calculate_shift(
        tokens,
        scheduler.get("base_image_seq_len", 256),
        scheduler.get("max_image_seq_len", 4096),
        scheduler.get("base_shift", 0.5),
        scheduler.get("max_shift", 1.15),
    )
