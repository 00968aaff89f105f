"""What goes into the denoiser: captions and pictures, embedded and encoded here or read from disk.

The VAE and the text encoders are loaded when something is first missing from the caches, so a run
with complete caches never holds them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch

from mmalign.diffusion.batch import Collator, caption_of
from mmalign.diffusion.cache_plan import check_cacheable
from mmalign.diffusion.conditioning import PromptEncoder
from mmalign.diffusion.denoiser import Condition
from mmalign.diffusion.error_bank import ErrorBank
from mmalign.diffusion.generated import Generated
from mmalign.diffusion.latent_cache import LatentCache, has_latents
from mmalign.diffusion.latents import PixelSpace, Vae, load_vae
from mmalign.diffusion.notes import cache_folder
from mmalign.diffusion.prompt_cache import PromptCache

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from mmalign.config import RunConfig
    from mmalign.core import Needs
    from mmalign.data.example import Example
    from mmalign.diffusion.draws import Draws
    from mmalign.diffusion.models import Components
    from mmalign.diffusion.process import NoiseProcess
    from mmalign.models.adapter import Batch


C = TypeVar("C", PromptCache, LatentCache)


class Inputs:
    """Collates rows, and turns batches into conditions and clean latents on the device."""

    def __init__(
        self,
        config: RunConfig,
        needs: Needs,
        components: Components,
        process: NoiseProcess,
        *,
        banked: bool = False,
    ) -> None:
        self.config, self.needs, self.components, self.process = config, needs, components, process
        self.banked = banked
        self._collator: Collator | None = None
        self._encoder: PromptEncoder | None = None
        self._vae: Vae | PixelSpace | None = None
        self._prompts: PromptCache | None = None
        self._empty: Condition | None = None
        self._told: dict[tuple[str, ...], Condition] = {}  # prompts to show, on the CPU

    def open(self, examples: Sequence[Example], model: nn.Module) -> None:
        """Use caches where they hold all of these rows.

        Args:
            examples: All rows of the run.
            model: Generates the clean pictures of rows that have none, where the config asks.

        Raises:
            ConfigError: A cache that must be complete is not, with the command that writes it.
        """
        settings = self.config.diffusion
        prompts: PromptCache | None = None
        latents: LatentCache | Generated | None = None
        # Opening a cache means hashing the model's files: not for one that is not there.
        there = cache_folder(self.config).is_dir()
        if settings.cache == "on" or (settings.cache == "auto" and there):
            captions = ["", *(c for row in examples for c in captions_of(row))]
            prompts = _complete(PromptCache(self.config), captions, settings.cache)
            if has_latents(self.config):
                latents = _complete(LatentCache(self.config), examples, settings.cache)
        self._prompts = prompts
        if settings.estimator.generated:
            latents = Generated(self, model)
            latents.write(examples)
        bank = None
        if self.config.reference.kind == "cached" and self.needs.reference:
            check_cacheable(self.config, self.needs)
            bank = ErrorBank(self.config)
            bank.require(examples)
        self._collator = self._collate_with(prompts, latents, bank)
        self.release()

    @property
    def collator(self) -> Collator:
        """Makes batches; without `open` everything is computed on the spot."""
        if self._collator is None:
            self._collator = self._collate_with(None, None, None)
        return self._collator

    def release(self) -> None:
        """Give back the device's memory of what training does not use from step to step.

        Encoders whose output is cached are let go: prompts to show are remembered. A VAE waits on
        the CPU for the next pictures to decode.
        """
        if self._prompts is not None:
            self._encoder = None
        cached = self._collator is not None and self._collator.latents is not None
        if self._vae is not None and cached:
            self._vae.to("cpu")

    def _collate_with(
        self,
        prompts: PromptCache | None,
        latents: LatentCache | Generated | None,
        bank: ErrorBank | None,
    ) -> Collator:
        return Collator(
            self.config,
            self.needs,
            self.process,
            encoder=None if prompts else self.encoder,
            prompts=prompts,
            latents=latents,
            bank=bank,
            banked=self.banked or bank is not None,
            has_time_ids=self.components.family == "sdxl",
        )

    # -- captions ----------------------------------------------------------------------------

    @property
    def encoder(self) -> PromptEncoder:
        """The text encoders, loaded on first use."""
        if self._encoder is None:
            model = self.config.model
            dtype = getattr(torch, model.dtype)
            self._encoder = PromptEncoder.load(
                model.path, self.components.family, dtype, revision=model.revision
            )
        return self._encoder

    def condition(self, batch: Batch) -> Condition:
        """What the network is told of every picture, [B * K] rows."""
        flat = {name: value.flatten(0, 1) for name, value in batch.inputs.items() if _is_told(name)}
        time_ids = flat.get("time_ids")
        if "embeds" in flat:
            return Condition(flat["embeds"], flat.get("pooled"), time_ids)
        ids = {n.removeprefix("ids."): v for n, v in flat.items() if n.startswith("ids.")}
        told = self.encoder.to(batch.labels.device).embed(ids)
        return Condition(told.embeds, told.pooled, time_ids)

    def empty(self, device: torch.device) -> Condition:
        """The empty prompt, one row, without time ids."""
        if self._empty is None:
            self._empty = self.embed([""], device)
        return self._empty.to(device)

    def embed(self, prompts: Sequence[str], device: torch.device) -> Condition:
        """Embedded prompts without time ids, from the cache or the encoders.

        Prompts to show during a run are seldom cached, and need the encoders then.
        """
        if self._prompts is not None and not self._prompts.missing(prompts):
            found = self._prompts.get(prompts)
            return Condition(found["embeds"], found.get("pooled"), None).to(device)
        return self._embedded(prompts, device)

    def _embedded(self, prompts: Sequence[str], device: torch.device) -> Condition:
        """By the encoders; remembered where they are needed for nothing else."""
        if self._prompts is None:
            return self.encoder.to(device).encode(prompts)
        key = tuple(prompts)
        if key not in self._told:
            self._told[key] = self.encoder.to(device).encode(prompts).to("cpu")
        return self._told[key].to(device)

    # -- pictures ----------------------------------------------------------------------------

    @property
    def vae(self) -> Vae | PixelSpace:
        """The VAE, loaded on first use."""
        if self._vae is None:
            model = self.config.model
            self._vae = load_vae(model.path, self.config.diffusion, revision=model.revision)
        return self._vae

    @torch.no_grad()
    def latents(self, pictures: Mapping[str, Tensor], draws: Draws) -> Tensor:
        """Clean latents [N, C, h, w], drawn from the VAE's posterior.

        Args:
            pictures: `mean` and perhaps `std`, or `pixels`; [R, K, ...] each, N = R * K.
            draws: One stream a picture.
        """
        flat = {name: value.flatten(0, 1) for name, value in pictures.items()}
        if "pixels" in flat:
            pixels = flat["pixels"]
            with torch.autocast(pixels.device.type, enabled=False):
                mean, std = self.vae.to(pixels.device).encode(pixels)
            std = std if self.vae.is_random else None
        else:
            mean, std = flat["mean"].float(), flat.get("std")
        if std is None:
            return mean
        noise = draws.normal("posterior", tuple(mean.shape[1:]), mean.device, mean.dtype)
        return mean + std.to(mean.dtype) * noise


def _complete(cache: C, wanted: Any, mode: str) -> C | None:
    """The cache, where it holds all that is wanted; refused in mode `on` where it does not."""
    if mode == "on":
        cache.require(wanted)
    return None if cache.missing(wanted) else cache


def captions_of(example: Example) -> list[str]:
    """The captions of a row's candidates."""
    return [caption_of(example, k) for k in range(len(example.candidates))]


def _is_told(name: str) -> bool:
    return name in ("embeds", "pooled", "time_ids") or name.startswith("ids.")
