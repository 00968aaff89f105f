"""Rows of images to a Batch, and what goes into the denoiser, computed here or read from disk."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch

from mmalign.data.example import Picture
from mmalign.diffusion.cache import (
    ErrorCache,
    LatentCache,
    PromptCache,
    check_cacheable,
    has_latents,
)
from mmalign.diffusion.cache_plan import Processes, progress
from mmalign.diffusion.components import PixelSpace, Vae, load_vae
from mmalign.diffusion.conditioning import PromptEncoder
from mmalign.diffusion.estimators import RowRNG, noise_seed
from mmalign.diffusion.families import Condition
from mmalign.diffusion.pictures import (
    Frame,
    cache_folder,
    caption_of,
    is_flipped,
    open_store,
    prepare,
    row_pictures,
)
from mmalign.diffusion.process import draw_timesteps
from mmalign.diffusion.sample import denoise, picture_size, start_noise
from mmalign.errors import DataError
from mmalign.models.batch import ON_CPU, ROWS, Batch, ModelInputs
from mmalign.models.files import state_fingerprint

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from mmalign.config import RunConfig
    from mmalign.core import Needs
    from mmalign.data.cache import TensorCache
    from mmalign.data.example import Example
    from mmalign.diffusion.components import Components
    from mmalign.diffusion.process import NoiseProcess


# Rows of images to a Batch: pixels or latents, captions, and what is drawn at random.

TIMESTEP_BIN = "timestep_bin"
"""Key of `Example.meta`: (k, n) for the k-th of the n timesteps a held-out row is scored at."""


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
    caption_ids: dict[str, Tensor] = field(default_factory=dict["str", "Tensor"])
    time_ids: Tensor | None = None
    ref_errors: Tensor | None = None


class Collator:
    """Makes batches; everything random in them comes from a row's draw."""

    def __init__(
        self,
        config: RunConfig,
        needs: Needs,
        process: NoiseProcess,
        *,
        encoder: PromptEncoder | None,
        prompts: PromptCache | None,
        latents: LatentCache | Generated | None,
        errors: ErrorCache | None,
        components: Components,
        stored_draws: bool = False,
    ) -> None:
        self.config, self.needs, self.process = config, needs, process
        self.encoder, self.prompts, self.latents, self.errors = encoder, prompts, latents, errors
        self.components = components
        self.stored_draws = stored_draws  # draws are numbers of stored ones

    def __call__(
        self, examples: Sequence[Example], draws: Sequence[int] | None
    ) -> Batch[ImageInputs]:
        """The batch of these rows; without draws, each row's own."""
        settings = self.config.diffusion
        row_seeds = [
            self._seed(example, None if draws is None else draws[i])
            for i, example in enumerate(examples)
        ]
        rng = RowRNG(torch.tensor(row_seeds))
        # Held-out rows lose, crop and mirror nothing by chance, but stored draws are as stored.
        fixed = draws is None and not self.stored_draws
        rate = 0.0 if fixed else settings.caption_dropout
        dropped = (rng.uniform("caption") < rate).tolist()
        captions = self._captions(examples, dropped)
        if "mismatched" in self.needs.roles:
            others = [captions[i - 1][0] for i in range(len(captions))]
            captions = [[row[0], other] for row, other in zip(captions, others, strict=True)]
            examples = [_doubled(example) for example in examples]

        parts, frames = self._pictures(examples, None if fixed else row_seeds)
        time_ids = ref_errors = None
        if self.components.family.has_time_ids:
            time_ids = torch.tensor(
                [[self._time_ids(frame) for frame in row] for row in frames], dtype=torch.float32
            )
        timesteps = self._timesteps(self._quantiles(examples, rng, draws), frames)
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
        if self.errors is not None and self.needs.reference:
            numbers = [
                self._number(e, None if draws is None else draws[i]) for i, e in enumerate(examples)
            ]
            ref_errors = torch.stack(
                [self.errors.get(e, d) for e, d in zip(examples, numbers, strict=True)]
            )
        return Batch(
            ImageInputs(
                parts, timesteps, seeds, own, time_ids=time_ids, ref_errors=ref_errors,
                **self._conditions(captions),
            ),
            torch.tensor([list(e.labels) for e in examples], dtype=torch.float32),
            torch.tensor([e.weight for e in examples], dtype=torch.float32),
            tuple(e.id for e in examples),
        )  # fmt: skip

    # -- what is drawn -----------------------------------------------------------------------

    def _seed(self, example: Example, draw: int | None) -> int:
        """The seed of a row this time."""
        if self.stored_draws:
            # By content: the same row has the same stored draws whatever it is called.
            return noise_seed("stored", _content(example), self._number(example, draw))
        return noise_seed("held out", example.id) if draw is None else draw

    def _number(self, example: Example, draw: int | None) -> int:
        """Which of the stored draws a visit uses."""
        which: int = example.meta.get(TIMESTEP_BIN, (0, 1))[0] if draw is None else draw
        return which % self.config.diffusion.num_draws

    def _quantiles(
        self, examples: Sequence[Example], rng: RowRNG, draws: Sequence[int] | None
    ) -> Tensor:  # [B]
        """Where in the timesteps' distribution each row is; spread evenly over several draws."""
        u = rng.uniform("timestep")
        bins: list[tuple[int, int]] = []
        for i, example in enumerate(examples):
            draw = None if draws is None else draws[i]
            if self.stored_draws:
                bins.append((self._number(example, draw), self.config.diffusion.num_draws))
            else:
                bins.append(example.meta.get(TIMESTEP_BIN, (0, 1)) if draw is None else (0, 1))
        first, count = torch.tensor(bins, dtype=u.dtype).unbind(-1)
        return (first + u) / count

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

    # -- captions ----------------------------------------------------------------------------

    def _captions(self, examples: Sequence[Example], dropped: Sequence[bool]) -> list[list[str]]:
        return [
            ["" if drop else caption_of(example, k) for k in range(len(example.candidates))]
            for example, drop in zip(examples, dropped, strict=True)
        ]

    def _conditions(self, captions: list[list[str]]) -> dict[str, Any]:
        """Fields of `ImageInputs`: captions embedded, or as token ids."""
        flat = [caption for row in captions for caption in row]
        shape = (len(captions), len(captions[0]))
        if self.prompts is not None:
            return {k: v.unflatten(0, shape) for k, v in self.prompts.get(flat).items()}
        assert self.encoder is not None
        ids = self.encoder.tokenize(flat)
        return {"caption_ids": {name: value.unflatten(0, shape) for name, value in ids.items()}}

    # -- images ----------------------------------------------------------------------------

    def _pictures(
        self, examples: Sequence[Example], seeds: Sequence[int] | None
    ) -> tuple[tuple[Part, ...], list[list[Frame]]]:
        """The images of every shape among the rows, and the frames of all."""
        settings = self.config.diffusion
        loaded: list[dict[str, Tensor]] = []
        frames: list[list[Frame]] = []
        for i, example in enumerate(examples):
            seed = None if seeds is None else seeds[i]  # None: the centre, and no flip
            if self.latents is not None:
                mean, std, row_frames = self.latents.get(example, is_flipped(settings, seed))
                row = {"mean": mean} if std is None else {"mean": mean, "std": std}
            else:
                pictures = row_pictures(example)
                if not pictures:
                    raise DataError(
                        f"row {example.id!r} is a prompt without an image; only "
                        "diffusion.estimator: {kind: truncated, generated: true} learns from those"
                    )
                done = prepare(pictures, settings, seed)
                row_frames = [frame for _, frame in done]
                row = {"pixels": torch.stack([torch.from_numpy(array) for array, _ in done])}
            loaded.append(row)
            frames.append(list(row_frames))
        groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for i, row in enumerate(loaded):
            groups[tuple((name, *value.shape) for name, value in sorted(row.items()))].append(i)
        parts = tuple(
            Part(
                torch.tensor(rows),
                {name: torch.stack([loaded[i][name] for i in rows]) for name in loaded[rows[0]]},
            )
            for rows in groups.values()
        )
        return parts, frames

    def _time_ids(self, frame: Frame) -> list[int]:
        if self.config.diffusion.time_ids == "constant":
            side = self.config.diffusion.resolution
            return [side, side, 0, 0, side, side]
        return [*frame.size, *frame.crop, *frame.target]


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


def _content(example: Example) -> str:
    return repr((example.prompt, [(c.prompt, _name(c.response)) for c in example.candidates]))


# Clean latents for prompts that have no image: generated once by the model before training.

_AT_ONCE = 16


class Generated:
    """Stands in for a cache of encoded images.

    Self-NPO needs images only as places to start noising from; with those of the model itself it
    needs no data but prompts. They are kept on disk, so that a resumed run goes on with the same.

    Source: Self-NPO's paper calls the method data-free.
    Departs: the released scripts start from a folder of images.
    """

    def __init__(self, inputs: Inputs, model: nn.Module) -> None:
        """Open the folder.

        Args:
            inputs: Embeds prompts; its config says how images are generated.
            model: The network as it is before training.
        """
        config, components = inputs.config, inputs.components
        self._inputs, self._model = inputs, model
        self._factor = components.factor
        self._size = picture_size(config.diffusion, self._factor)
        sampling = config.diffusion.sampling.model_dump(mode="json", exclude={"seed", "negative"})
        self._seed = config.train.seed
        self._settings = {
            "holds": "generated latents",
            "model": state_fingerprint(model),
            "sampling": json.dumps(sampling, sort_keys=True),
            "size": str(self._size),
            "seed": str(self._seed),
        }
        self._store = self._opened()

    def _opened(self) -> TensorCache:
        return open_store(cache_folder(self._inputs.config), self._settings)

    def write(self, examples: Sequence[Example]) -> None:
        """Generate what is not there yet; every process its share.

        Images are made in the same groups whichever of them are there, so that their last bits
        do not depend on an interruption.
        """
        captions = {self._key(row): caption_of(row, 0) for row in examples}
        place = Processes.launched()
        mine = [key for key in captions if place.is_mine(key)]
        groups = [mine[start : start + _AT_ONCE] for start in range(0, len(mine), _AT_ONCE)]
        todo = [(group, lacking) for group in groups if (lacking := self._store.missing(group))]
        total = sum(len(lacking) for _, lacking in todo)
        with progress("clean images", total, shown=place.is_main) as seen, self._store:
            for group, lacking in todo:
                found = dict(zip(group, self._generate(group, captions), strict=True))
                for key in lacking:
                    self._store.put(key, {"mean": found[key].cpu().numpy()})
                seen(len(lacking))
        place.wait()
        self._store = self._opened()  # with what the other processes wrote

    def get(self, example: Example, flip: bool) -> tuple[Tensor, None, list[Frame]]:
        """Latents [1, C, h, w] of a row, and its frame; there is nothing to mirror."""
        entry = self._store.get(self._key(example))
        assert entry is not None, "written before training"
        return torch.from_numpy(entry["mean"])[None], None, [Frame(self._size, (0, 0), self._size)]

    def _generate(self, keys: Sequence[str], captions: dict[str, str]) -> Tensor:
        inputs = self._inputs
        device = next(self._model.parameters()).device
        channels = inputs.components.latent_channels
        shape = (channels, self._size[0] // self._factor, self._size[1] // self._factor)
        noise = start_noise([noise_seed(self._seed, key) for key in keys], shape)
        options: dict[str, Any] = {"pixels": self._size}
        return denoise(
            self._model,
            inputs.components,
            inputs.config.diffusion,
            inputs.embed([captions[key] for key in keys], device),
            inputs.empty(device),
            noise.to(device),
            **options,
        )

    def _key(self, example: Example) -> str:
        return self._store.key(caption_of(example, 0))


# What goes into the denoiser: captions and images, embedded and encoded here or read from disk.
#
# The VAE and the text encoders are loaded when something is first missing from the caches, so a run
# with complete caches never holds them.

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
        stored_draws: bool = False,
    ) -> None:
        self.config, self.needs, self.components, self.process = config, needs, components, process
        self.stored_draws = stored_draws
        self._collator: Collator | None = None
        self._encoder: PromptEncoder | None = None
        self._vae: Vae | PixelSpace | None = None
        self._prompts: PromptCache | None = None
        self._empty: Condition | None = None
        self._shown: dict[tuple[str, ...], Condition] = {}  # prompts to show, on the CPU

    def open(self, examples: Sequence[Example], model: nn.Module) -> None:
        """Use caches where they hold all of these rows.

        Args:
            examples: All rows of the run.
            model: Generates the clean images of rows that have none, where the config asks.

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
        errors = None
        if self.config.reference.kind == "cached" and self.needs.reference:
            check_cacheable(self.config, self.needs)
            errors = ErrorCache(self.config)
            errors.require(examples)
        self._collator = self._collate_with(prompts, latents, errors)
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
        the CPU for the next images to decode.
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
        errors: ErrorCache | None,
    ) -> Collator:
        return Collator(
            self.config,
            self.needs,
            self.process,
            encoder=None if prompts else self.encoder,
            prompts=prompts,
            latents=latents,
            errors=errors,
            stored_draws=self.stored_draws or errors is not None,
            components=self.components,
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
        if self._prompts is not None and not self._prompts.missing(prompts):
            found = self._prompts.get(prompts)
            return Condition(found["embeds"], found.get("pooled"), None).to(device)
        return self._embedded(prompts, device)

    def _embedded(self, prompts: Sequence[str], device: torch.device) -> Condition:
        """By the encoders; remembered where they are needed for nothing else."""
        if self._prompts is None:
            return self.encoder.to(device).encode(prompts)
        key = tuple(prompts)
        if key not in self._shown:
            self._shown[key] = self.encoder.to(device).encode(prompts).to("cpu")
        return self._shown[key].to(device)

    # -- images ----------------------------------------------------------------------------

    @property
    def vae(self) -> Vae | PixelSpace:
        """The VAE, loaded on first use."""
        if self._vae is None:
            model = self.config.model
            self._vae = load_vae(model.path, self.config.diffusion, revision=model.revision)
        return self._vae

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


def captions_of(example: Example) -> list[str]:
    """The captions of a row's candidates."""
    return [caption_of(example, k) for k in range(len(example.candidates))]


# What training reads instead of running the VAE, the text encoders and the reference.
#
# Each cache is a folder of shards (`mmalign.data.cache`) below `diffusion.cache_folder`. An entry's
# key holds everything that decides its values, so a changed image, model or setting is a miss and
# never a wrong number. `mmalign cache CONFIG` writes them.
