"""Rows of images to a Batch, and what goes into the denoiser, computed here or read from disk."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor

from mmalign.config import RunConfig
from mmalign.core import Needs
from mmalign.data.example import Example, Picture
from mmalign.diffusion.cache import (
    ErrorCache,
    LatentCache,
    PromptCache,
    check_cacheable,
    has_latents,
)
from mmalign.diffusion.components import Components, PixelSpace, Vae, load_vae
from mmalign.diffusion.conditioning import PromptEncoder
from mmalign.diffusion.estimators import RowRNG, noise_seed
from mmalign.diffusion.families import Condition
from mmalign.diffusion.pictures import (
    Frame,
    cache_folder,
    captions_of,
    is_flipped,
    prepare,
    row_pictures,
)
from mmalign.diffusion.process import NoiseProcess, draw_timesteps
from mmalign.errors import DataError
from mmalign.models.batch import ON_CPU, ROWS, Batch, ModelInputs

TIMESTEP_BIN = "timestep_bin"
"""Key of `Example.meta`: (k, n) for the k-th of the n timesteps a held-out row is scored at."""

C = TypeVar("C", PromptCache, LatentCache)


@dataclass(frozen=True, slots=True)
class Part(ModelInputs):
    """The rows of a batch whose images have one shape; they go through the network together.

    Attributes:
        rows: [R] their places in the batch; on the CPU.
        images: `mean` and `std` [R, K, C, h, w], the posterior of the latents (from a cache), or
            `pixels` [R, K, 3, H, W] in [-1, 1].
    """

    rows: Tensor = field(metadata=ROWS | ON_CPU)
    images: dict[str, Tensor]

    def columns(self, wanted: Tensor) -> Self:
        """As ever; `wanted` has all rows of the batch."""
        return super(Part, self).columns(wanted.cpu()[self.rows])

    def take(self, rows: Tensor) -> Self:
        """Those of the rows that are of this shape."""
        new, own = (rows.cpu()[:, None] == self.rows).nonzero(as_tuple=True)
        images = {name: value[own.to(value.device)] for name, value in self.images.items()}
        return replace(self, rows=new, images=images)


@dataclass(frozen=True, slots=True)
class ImageInputs(ModelInputs):
    """Images of a batch and all that goes with them.

    Attributes:
        parts: The images, by shape.
        timesteps: [B], one a row.
        seeds: [B, K] of the noise: of the row, or of the image where it is not shared; on the CPU,
            where random numbers are drawn.
        picture_seeds: [B, K] of what belongs to one image (the posterior's noise); likewise.
        embeds, pooled: [B, K, S, D] and [B, K, P], embedded captions (from a cache).
        caption_ids: Text encoder to [B, K, S], the token ids of captions that are not.
        time_ids: [B, K, 6] size, crop and target size of each image (SDXL).
        ref_errors: [B, K] of the reference, from a cache.
    """

    parts: tuple[Part, ...]
    timesteps: Tensor = field(metadata=ROWS)
    seeds: Tensor = field(metadata=ON_CPU)
    picture_seeds: Tensor = field(metadata=ON_CPU)
    embeds: Tensor | None = None
    pooled: Tensor | None = None
    caption_ids: dict[str, Tensor] = field(default_factory=dict["str", "Tensor"], metadata=ON_CPU)
    time_ids: Tensor | None = None
    ref_errors: Tensor | None = None


class CleanLatents(Protocol):
    """Clean latents by row: of encoded images, or of images that the model has generated."""

    def get(self, example: Example, flip: bool) -> tuple[Tensor, Tensor | None, list[Frame]]:
        """Mean and, where they have one, standard deviation [K, C, h, w], and K frames."""
        ...


class Inputs:
    """Collates rows, and turns batches into conditions and clean latents on the device.

    Everything random in a batch comes from a row's draw. The VAE and the text encoders are loaded
    when something is first missing from the caches, so a run with complete caches never holds them.

    Args:
        config: The run.
        needs: Of its objective.
        components: What the pipeline's files say.
        process: The noise process.
        stored_draws: A visit's draw is the number of a stored one, as a cache of errors has them.
    """

    def __init__(
        self,
        config: RunConfig,
        needs: Needs,
        components: Components,
        process: NoiseProcess,
        *,
        stored_draws: bool = False,
    ) -> None:
        self.config, self.needs, self.components, self.process = config, needs, components, process
        self.stored_draws = stored_draws
        self.clean: CleanLatents | None = None  # None: images are read and encoded
        self._prompts: PromptCache | None = None
        self._errors: ErrorCache | None = None
        self._empty: Condition | None = None
        self._shown: dict[tuple[str, ...], Condition] = {}  # prompts to show, on the CPU

    def open(self, examples: Sequence[Example]) -> None:
        """Use caches where they hold all of these rows.

        Args:
            examples: All rows of the run.

        Raises:
            ConfigError: A cache that must be complete is not, with the command that writes it.
        """
        settings = self.config.diffusion
        self.clean = self._prompts = None
        # Opening a cache means hashing the model's files: not for one that is not there.
        there = cache_folder(self.config).is_dir()
        if settings.cache == "on" or (settings.cache == "auto" and there):
            captions = list(dict.fromkeys(["", *(c for row in examples for c in captions_of(row))]))
            self._prompts = _complete(PromptCache(self.config), captions, settings.cache)
            if has_latents(self.config):
                self.clean = _complete(LatentCache(self.config), examples, settings.cache)
        if self.config.reference.kind == "cached" and self.needs.reference:
            check_cacheable(self.config, self.needs)
            self._errors = ErrorCache(self.config)
            self._errors.require(examples)
            self.stored_draws = True
        if self._prompts is None:
            _ = self.encoder  # loaded here, and not by each worker that collates

    def release(self) -> None:
        """Give back the device's memory of what training does not use from step to step.

        Encoders whose output is cached are let go: prompts to show are remembered. A VAE waits on
        the CPU for the next images to decode.
        """
        if self._prompts is not None:
            vars(self).pop("encoder", None)
        if "vae" in vars(self) and self.clean is not None:
            self.vae.to("cpu")

    def collate(
        self, examples: Sequence[Example], draws: Sequence[int] | None
    ) -> Batch[ImageInputs]:
        """The batch of these rows; without draws, each row's own."""
        settings = self.config.diffusion
        visits = [None] * len(examples) if draws is None else draws
        bins = [self._bin(*visit) for visit in zip(examples, visits, strict=True)]
        row_seeds = [self._seed(*visit) for visit in zip(examples, visits, strict=True)]
        rng = RowRNG(torch.tensor(row_seeds))
        # Held-out rows lose, crop and mirror nothing by chance, but stored draws are as stored.
        fixed = draws is None and not self.stored_draws
        dropped = rng.uniform("caption") < (0.0 if fixed else settings.caption_dropout)
        captions = [
            [""] * len(row.candidates) if drop else captions_of(row)
            for row, drop in zip(examples, dropped.tolist(), strict=True)
        ]
        if "mismatched" in self.needs.roles:
            others = [captions[i - 1][0] for i in range(len(captions))]
            captions = [[row[0], other] for row, other in zip(captions, others, strict=True)]
            examples = [_doubled(example) for example in examples]

        parts, frames = self._pictures(examples, [None] * len(examples) if fixed else row_seeds)
        time_ids = ref_errors = None
        if self.components.family.has_time_ids:
            time_ids = torch.tensor(
                [[self._time_ids(frame) for frame in row] for row in frames], dtype=torch.float32
            )
        # Where in the timesteps' distribution each row is, spread evenly over several draws.
        first, count = torch.tensor(bins, dtype=torch.float64).unbind(-1)
        timesteps = self._timesteps((first + rng.uniform("timestep")) / count, frames)
        # By name and not by place: exchanging two images exchanges all that is theirs.
        own = torch.tensor(
            [
                [noise_seed(seed, "picture", _name(c.response)) for c in example.candidates]
                for seed, example in zip(row_seeds, examples, strict=True)
            ]
        )
        # An inversion's noise belongs to an image's own path.
        shared = settings.estimator.kind == "forward" and settings.estimator.shared
        seeds = torch.tensor(row_seeds)[:, None].expand_as(own) if shared else own
        if self._errors is not None and self.needs.reference:
            stored = [self._errors.get(e, k) for e, (k, _) in zip(examples, bins, strict=True)]
            ref_errors = torch.stack(stored)
        return Batch(
            ImageInputs(
                parts, timesteps, seeds, own, time_ids=time_ids, ref_errors=ref_errors,
                **self._conditions(captions),
            ),
            torch.tensor([list(e.labels) for e in examples], dtype=torch.float32),
            torch.tensor([e.weight for e in examples], dtype=torch.float32),
            tuple(e.id for e in examples),
        )  # fmt: skip

    def _bin(self, example: Example, draw: int | None) -> tuple[int, int]:
        """(k, n): this visit's timestep is in the k-th of n equal shares of their distribution."""
        held_out: tuple[int, int] = example.meta.get(TIMESTEP_BIN, (0, 1))
        if self.stored_draws:
            num = self.config.diffusion.num_draws
            return (held_out[0] if draw is None else draw) % num, num
        return held_out if draw is None else (0, 1)

    def _seed(self, example: Example, draw: int | None) -> int:
        """The seed of a row this time."""
        if self.stored_draws:
            # By content: the same row has the same stored draws whatever it is called.
            words = [(c.prompt, _name(c.response)) for c in example.candidates]
            number, _ = self._bin(example, draw)
            return noise_seed("stored", repr((example.prompt, words)), number)
        return noise_seed("held out", example.id) if draw is None else draw

    def _timesteps(self, quantiles: Tensor, frames: Sequence[Sequence[Frame]]) -> Tensor:  # [B]
        """Timesteps of the rows, each by the noise process of its images' size."""
        groups: dict[NoiseProcess, list[int]] = defaultdict(list)
        for i, (frame, *_) in enumerate(frames):
            height, width = (side // self.components.factor for side in frame.target)
            groups[self.process.at((height, width))].append(i)
        drawn = [
            draw_timesteps(self.config.diffusion.timesteps, process, quantiles[rows])
            for process, rows in groups.items()
        ]
        order = torch.tensor([i for rows in groups.values() for i in rows])
        return torch.cat(drawn)[order.argsort()]

    def _conditions(self, captions: list[list[str]]) -> dict[str, Any]:
        """Fields of `ImageInputs`: captions embedded, or as token ids."""
        flat = [caption for row in captions for caption in row]
        shape = (len(captions), len(captions[0]))
        if self._prompts is not None:
            return {k: v.unflatten(0, shape) for k, v in self._prompts.get(flat).items()}
        ids = self.encoder.tokenizers.tokenize(flat)
        return {"caption_ids": {name: value.unflatten(0, shape) for name, value in ids.items()}}

    def _pictures(
        self, examples: Sequence[Example], seeds: Iterable[int | None]
    ) -> tuple[tuple[Part, ...], list[list[Frame]]]:
        """The images of every shape among the rows, and the frames of all."""
        rows = [self._row(*row) for row in zip(examples, seeds, strict=True)]
        groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for i, (images, _) in enumerate(rows):
            groups[tuple((name, *value.shape) for name, value in sorted(images.items()))].append(i)
        parts = tuple(
            Part(
                torch.tensor(own),
                {name: torch.stack([rows[i][0][name] for i in own]) for name in rows[own[0]][0]},
            )
            for own in groups.values()
        )
        return parts, [frames for _, frames in rows]

    def _row(self, example: Example, seed: int | None) -> tuple[dict[str, Tensor], list[Frame]]:
        """The images of a row and their frames; without a seed the centre, and no flip."""
        settings = self.config.diffusion
        if self.clean is not None:
            mean, std, frames = self.clean.get(example, is_flipped(settings, seed))
            return {"mean": mean} if std is None else {"mean": mean, "std": std}, frames
        pictures = row_pictures(example)
        if not pictures:
            raise DataError(
                f"row {example.id!r} is a prompt without an image; only "
                "diffusion.estimator: {kind: truncated, generated: true} learns from those"
            )
        arrays, frames = zip(*prepare(pictures, settings, seed), strict=True)
        return {"pixels": torch.stack([torch.from_numpy(array) for array in arrays])}, [*frames]

    def _time_ids(self, frame: Frame) -> list[int]:
        side = self.config.diffusion.resolution
        if self.config.diffusion.time_ids == "constant":
            return [side, side, 0, 0, side, side]
        return [*frame.size, *frame.crop, *frame.target]

    @cached_property
    def encoder(self) -> PromptEncoder:
        """The text encoders, loaded on first use."""
        model = self.config.model
        return PromptEncoder(model.path, getattr(torch, model.dtype), revision=model.revision)

    def condition(self, batch: Batch[ImageInputs]) -> Condition:
        """The conditioning of every image, [B * K] rows."""
        inputs = batch.inputs
        if inputs.embeds is not None:
            pooled = None if inputs.pooled is None else inputs.pooled.flatten(0, 1)
            cond = Condition(inputs.embeds.flatten(0, 1), pooled)
        else:
            ids = {name: value.flatten(0, 1) for name, value in inputs.caption_ids.items()}
            cond = self.encoder.to(batch.labels.device).embed(ids)
        if self.components.is_distilled:
            cond = cond.with_guidance(self.config.diffusion.embedded_guidance)
        times = inputs.time_ids
        return replace(cond, time_ids=None if times is None else times.flatten(0, 1))

    def empty(self, device: torch.device) -> Condition:
        """The empty prompt, one row, without time ids."""
        if self._empty is None:
            self._empty = self.embed([""], device)
        return self._empty.to(device)

    def embed(self, prompts: Sequence[str], device: torch.device) -> Condition:
        """Embedded prompts without time ids, from the cache or the encoders.

        Prompts to show during a run are seldom cached, and need the encoders then.
        """
        if self._prompts is None:
            return self.encoder.to(device).encode(prompts)
        if not self._prompts.missing(prompts):
            return Condition(**self._prompts.get(prompts)).to(device)
        key = tuple(prompts)
        if key not in self._shown:
            self._shown[key] = self.encoder.to(device).encode(prompts).to("cpu")
        return self._shown[key].to(device)

    @cached_property
    def vae(self) -> Vae | PixelSpace:
        """The VAE, loaded on first use."""
        model = self.config.model
        return load_vae(model.path, self.config.diffusion, revision=model.revision)

    @torch.no_grad()
    def latents(self, pictures: Mapping[str, Tensor], rng: RowRNG) -> Tensor:
        """Clean latents [N, C, h, w], drawn from the VAE's posterior.

        Args:
            pictures: `mean` and perhaps `std`, or `pixels`; [R, K, ...] each, N = R * K.
            rng: One stream an image.
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
        noise = rng.normal("posterior", tuple(mean.shape[1:]), mean.device, mean.dtype)
        return mean + std.to(mean.dtype) * noise


def _complete(cache: C, wanted: Any, mode: str) -> C | None:
    """The cache, where it holds all that is wanted; refused in mode `on` where it does not."""
    if mode == "on":
        cache.require(wanted)
    return None if cache.missing(wanted) else cache


def _doubled(example: Example) -> Example:
    """The row with its image twice: once more for another row's caption."""
    again = replace(example.candidates[0], role="mismatched")
    return replace(
        example, candidates=(example.candidates[0], again), labels=(example.labels[0], 0.0)
    )


def _name(response: object) -> str:
    """An image's name and its folder's, without the place of that, which differs elsewhere."""
    if isinstance(response, Picture):
        path = response.path
        return f"{path.parent.name}/{path.name} {response.row} {response.column}"
    return ""
