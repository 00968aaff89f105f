"""What `mmalign cache` will write, counted and measured before a weight is loaded."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from mmalign.diffusion.batch import caption_of
from mmalign.diffusion.conditioning import OPTIONAL, T5_LIMIT, load_tokenizers
from mmalign.diffusion.error_bank import ErrorBank
from mmalign.diffusion.latent_cache import LatentCache, has_latents
from mmalign.diffusion.latents import Vae
from mmalign.diffusion.notes import cache_folder
from mmalign.diffusion.pictures import row_pictures
from mmalign.diffusion.pipeline import (
    NUM_TIME_IDS,
    component,
    denoiser_config,
    family_of,
    has_component,
    read_json,
)
from mmalign.diffusion.prompt_cache import PromptCache
from mmalign.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mmalign.config import RunConfig
    from mmalign.core import Needs
    from mmalign.data.example import Example, Picture
    from mmalign.diffusion.notes import Size

HEADER_BYTES = 220
"""What a tensor costs beside its values: its name, shape, place and checksum in a shard."""


@dataclass(frozen=True, slots=True)
class Part:
    """One cache of a plan."""

    name: str
    unit: str
    folder: Path
    total: int  # entries that the run needs
    missing: int
    each: int  # bytes of an entry, the mean of those that are missing

    @property
    def num_bytes(self) -> int:
        """To be written."""
        return self.missing * self.each


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything to write, and the room for it."""

    parts: list[Part]
    left_out: list[str] = field(default_factory=list)  # what is not cached and why, as sentences

    @property
    def num_bytes(self) -> int:
        """To be written."""
        return sum(part.num_bytes for part in self.parts)

    def text(self) -> str:
        """A line a cache, the sum, and the room on the disk."""
        lines = [
            f"{part.name:<17}{part.missing:>9} of {part.total} {part.unit} to write, "
            f"{size(part.each)} each: {size(part.num_bytes)}"
            for part in self.parts
        ]
        folders = dict.fromkeys(str(part.folder) for part in self.parts)
        room = [f"{folder} has room for {size(free)}" for folder, free in self._free().items()]
        lines += self.left_out
        total = f"{size(self.num_bytes)} to write in {', '.join(folders)}"
        return "\n".join([*lines, total, *room])

    def check_room(self) -> None:
        """Refuse a disk that is too small.

        Raises:
            ConfigError: With what is needed and what is there.
        """
        for folder, free in self._free().items():
            if self.num_bytes > free:
                raise ConfigError(
                    f"cache: {size(self.num_bytes)} are to be written, but the disk of {folder} "
                    f"has room for {size(free)}. Set diffusion.cache_folder to a larger one, or "
                    "lower diffusion.num_draws or data.max_samples"
                )

    def _free(self) -> dict[str, int]:
        """Bytes that are free where the caches go."""
        free: dict[str, int] = {}
        for part in self.parts:
            folder = part.folder.absolute()
            while not folder.is_dir():
                folder = folder.parent
            free[str(folder)] = shutil.disk_usage(folder).free
        return free


def plan(config: RunConfig, needs: Needs) -> Plan:
    """What the cache of a run would hold and lacks; reads records and settings, no pictures.

    Raises:
        ConfigError: There is nothing that can be cached.
    """
    from mmalign.data.sources import load_examples

    rows = load_examples(config.data, needs, seed=config.train.seed)
    return plan_rows(config, needs, [row for part in rows for row in part])


def plan_rows(config: RunConfig, needs: Needs, rows: Sequence[Example]) -> Plan:
    """As `plan`, for rows that are loaded already."""
    check_cacheable(config, needs)
    parts: list[Part] = []
    left_out: list[str] = []
    settings = config.diffusion
    if settings.cache == "off":
        left_out.append("latents and prompts are left out: diffusion.cache is off")
    else:
        if has_latents(config):
            parts.append(_latents(config, rows))
        elif settings.crop != "center":
            left_out.append(
                f"latents are left out: diffusion.crop is {settings.crop}, so that a picture's "
                "latents differ each time"
            )
        elif settings.estimator.generated:
            left_out.append("latents are left out: the pictures are generated in training")
        else:
            left_out.append("latents are left out: the model has no VAE and works on pixels")
        parts.append(_prompts(config, rows))
    if banks_errors(config, needs):
        parts.append(_errors(config, rows))
    if not parts:
        raise ConfigError(
            "cache: nothing to store: diffusion.cache is off, and reference.kind is "
            f"{config.reference.kind}, not cached"
        )
    return Plan(parts, left_out)


def banks_errors(config: RunConfig, needs: Needs) -> bool:
    """Whether the run reads its reference from stored errors."""
    return config.reference.kind == "cached" and needs.reference


def check_cacheable(config: RunConfig, needs: Needs) -> None:
    """Refuse reference errors that no cache can hold.

    Raises:
        ConfigError: With the reason.
    """
    if banks_errors(config, needs) and "mismatched" in needs.roles:
        raise ConfigError(
            "reference.kind is cached, but the objective scores pictures under the captions of the "
            "rows beside them in a batch, which change. Use reference.kind: auto"
        )


def captions_to_store(config: RunConfig, rows: Sequence[Example]) -> list[str]:
    """Every caption of the rows' candidates, the empty one, and the prompts shown in training."""
    captions = {"": None}
    for row in rows:
        captions |= {caption_of(row, k): None for k in range(len(row.candidates))}
    return list(captions | dict.fromkeys(config.sample.prompts))


def pictures_of(rows: Sequence[Example]) -> list[Picture]:
    """The pictures of some rows, each once."""
    return list(dict.fromkeys(picture for row in rows for picture in row_pictures(row)))


def size(num_bytes: int) -> str:
    """Bytes for people: 1.5 MB."""
    value = float(num_bytes)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def _latents(config: RunConfig, rows: Sequence[Example]) -> Part:
    cache = LatentCache(config)
    keys: dict[str, Size] = {}
    unknown = 0  # buckets: pictures whose shape is known once they were decoded
    for row in rows:
        shape = cache.shape(row)
        for picture in row_pictures(row):
            if shape is None:
                unknown += len(cache.flips)
            else:
                keys |= {cache.key(picture, shape, flip): shape for flip in cache.flips}
    missing = cache.store.missing(keys)
    areas = [keys[key][0] * keys[key][1] for key in missing]
    # A bucket's area is the square's, or somewhat less.
    areas += [config.diffusion.resolution**2] * unknown
    model = config.model
    folder = component(model.path, "vae", model.revision)
    vae = Vae(torch.nn.Identity(), read_json(folder / "config.json"), model.path, model.revision)
    tensors = 2 if vae.is_random else 1
    pixels = sum(areas) // len(areas) if areas else config.diffusion.resolution**2
    each = tensors * 2 * vae.channels * pixels // vae.factor**2 + 24 + (tensors + 1) * HEADER_BYTES
    name = "pictures and mirrored ones" if len(cache.flips) > 1 else "pictures"
    total = len(keys) + unknown
    return Part("latents", name, cache_folder(config), total, len(missing) + unknown, each)


def _prompts(config: RunConfig, rows: Sequence[Example]) -> Part:
    cache = PromptCache(config)
    captions = captions_to_store(config, rows)
    path, revision = config.model.path, config.model.revision
    family, network = family_of(path, revision), denoiser_config(path, revision)
    limits = load_tokenizers(path, revision).limits
    places, pooled = limits["text_encoder"], 0
    if family == "sd3":
        width, pooled = network["joint_attention_dim"], network["pooled_projection_dim"]
        # Without T5 its places hold zeros, which are not stored.
        places += T5_LIMIT if has_component(path, OPTIONAL, revision) else 0
    else:
        width = network["cross_attention_dim"]
        if family == "sdxl":
            pooled = network["projection_class_embeddings_input_dim"]
            pooled -= NUM_TIME_IDS * network["addition_time_embed_dim"]
    numbers = places * width + pooled
    itemsize = getattr(torch, config.model.dtype).itemsize
    each = itemsize * numbers + 4 + (3 if pooled else 2) * HEADER_BYTES
    missing = len(cache.missing(captions))
    return Part("prompts", "captions", cache_folder(config), len(captions), missing, each)


def _errors(config: RunConfig, rows: Sequence[Example]) -> Part:
    bank = ErrorBank(config)
    keys = {bank.key(row): len(row.candidates) for row in rows}
    missing = bank.store.missing(keys)
    mean = sum(keys[key] for key in missing) / max(1, len(missing))
    itemsize = 8 if config.model.dtype == "float64" else 4
    each = int(itemsize * bank.num_draws * mean) + HEADER_BYTES
    unit = f"rows of {bank.num_draws} draws"
    folder = config.reference.cache or cache_folder(config)
    return Part("reference errors", unit, folder, len(keys), len(missing), each)
