"""Latents, caption embeddings and reference errors, computed once and kept on disk.

Each cache is a folder of shards (`mmalign.data.cache`) below `diffusion.cache_folder`. An entry's
key holds everything that decides its values, so a changed image, model or setting is a miss and
never a wrong number. `mmalign cache CONFIG` writes them.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from mmalign.config import RunConfig
from mmalign.config.diffusion import as_before
from mmalign.core import Needs
from mmalign.data.cache import TensorCache
from mmalign.data.example import Example, Picture, as_text
from mmalign.diffusion.conditioning import Condition, encoders_of
from mmalign.diffusion.families import family_of
from mmalign.diffusion.pictures import (
    FileStat,
    Frame,
    ImageSizeCache,
    Size,
    cache_folder,
    fingerprint_of,
    open_store,
    row_pictures,
    row_size,
)
from mmalign.diffusion.pipeline import (
    denoiser_config,
    has_component,
    model_index,
    scheduler_config,
)
from mmalign.errors import ConfigError
from mmalign.models.files import fingerprint, from_numpy, to_numpy

Item = TypeVar("Item", Example, str)
Array = np.ndarray[Any, np.dtype[Any]]


def has_latents(config: RunConfig) -> bool:
    """Whether a run's clean latents can come from a cache."""
    settings = config.diffusion
    return (
        settings.cache != "off"
        and settings.crop == "center"
        and not settings.estimator.generated
        and has_component(config.model.path, "vae", config.model.revision)
    )


class _Cache(ABC, Generic[Item]):
    """A store with entries of rows or of captions.

    Attributes:
        holds: What an entry is, for messages.
        of: What it is of.
        store: The files.
    """

    holds: ClassVar[str]
    of: ClassVar[str] = "rows"
    store: TensorCache

    @abstractmethod
    def missing(self, items: Iterable[Item]) -> list[Item]:
        """Those that lack an entry."""

    def require(self, items: Sequence[Item]) -> None:
        """Refuse a cache that lacks some.

        Raises:
            ConfigError: With the command that writes them.
        """
        if lacking := len(self.missing(items)):
            raise ConfigError(
                f"{self.store.folder} lacks the {self.holds} of {lacking} of {len(items)} "
                f"{self.of} under this model and these settings. Write them with `mmalign cache "
                "CONFIG`, or train without (diffusion.cache: off, reference.kind: auto)"
            )

    def _entry(self, key: str | None, of: str) -> dict[str, Array]:
        """What is stored under a key; None: no key is known."""
        entry = None if key is None else self.store.get(key)
        if entry is not None:
            return entry
        if self.store.bad_shards:
            raise ConfigError(
                f"{self.store.bad_shards[-1]} is damaged and held the {self.holds} of {of}. Remove "
                "this file, and write what it held again with `mmalign cache CONFIG`"
            )
        raise ConfigError(
            f"{self.store.folder}: the {self.holds} of {of} are missing. Write them with `mmalign "
            "cache CONFIG`"
        )


class LatentCache(_Cache[Example]):
    """Per image, shape and flip: the VAE's posterior, scaled, and the frame for time ids.

    Mean and standard deviation are kept, in float16, so that training can draw from the posterior
    again each time; the deviation is left out where the VAE has none. Images are cropped in the
    centre. A key holds the image's file and cell, the shape all images of its row have, the
    flip, the VAE's files and its dtype.

    Args:
        config: The run; reads the files of its VAE, but no weights into memory.
    """

    holds = "latents"

    def __init__(self, config: RunConfig) -> None:
        self.settings = config.diffusion
        self._contents = FileStat()
        self._config = config
        self.flips = (False, True) if self.settings.flip else (False,)
        self.store = open_store(
            cache_folder(config) / "latents",
            {
                "holds": "latents",
                "vae": fingerprint_of(config, "vae"),
                "dtype": self.settings.vae_dtype,
            },
        )

    @cached_property
    def notes(self) -> ImageSizeCache:
        """Sizes of images, which buckets follow from; not opened without those."""
        return ImageSizeCache(self._config, self._contents)

    def shape(self, example: Example) -> Size | None:
        """Height and width that the row's images are brought to; None: sizes are not known."""
        if not self.settings.buckets:
            return (self.settings.resolution, self.settings.resolution)
        sizes = [self.notes.get(picture) for picture in row_pictures(example)]
        known = [size for size in sizes if isinstance(size, tuple)]
        return row_size(known, self.settings) if sizes and len(known) == len(sizes) else None

    def picture_key(self, picture: Picture, shape: Size, flip: bool) -> str:
        """The entry of an image brought to a shape."""
        return self.store.key([*self._contents(picture), *shape, bool(flip)])

    def entries(self, example: Example) -> list[tuple[int, bool, str]]:
        """Candidate, whether mirrored, and key of every entry of a row; none: sizes not known."""
        shape = self.shape(example)
        if shape is None:
            return []
        own, flips = enumerate(row_pictures(example)), self.flips
        return [(k, flip, self.picture_key(p, shape, flip)) for k, p in own for flip in flips]

    def missing(self, items: Iterable[Example]) -> list[Example]:
        """The rows that lack the latents of an image."""

        def lacks(example: Example) -> bool:
            keys = [key for _, _, key in self.entries(example)]
            return not keys or bool(self.store.missing(keys))

        return [example for example in items if lacks(example)]

    def put(self, key: str, mean: Tensor, std: Tensor | None, frame: Frame) -> None:
        """Store an image.

        Args:
            key: From `picture_key`.
            mean: [C, h, w] of the posterior, scaled.
            std: [C, h, w]; None where the VAE has no spread.
            frame: Where the image comes from.
        """
        entry = {"mean": _half(mean)} | ({} if std is None else {"std": _half(std)})
        places = [*frame.size, *frame.crop, *frame.target]
        self.store.put(key, entry | {"frame": np.array(places, np.int32)})

    def get(self, example: Example, flip: bool) -> tuple[Tensor, Tensor | None, list[Frame]]:
        """Mean and standard deviation [K, C, h, w], float16, and K frames.

        Raises:
            ConfigError: An entry is missing or damaged.
        """
        shape = self.shape(example)
        entries: list[dict[str, Array]] = []
        for picture in row_pictures(example):
            key = None if shape is None else self.picture_key(picture, shape, flip)
            entries.append(self._entry(key, str(picture)))
        stacked = {
            name: torch.from_numpy(np.stack([entry[name] for entry in entries]))
            for name in ("mean", "std")
            if name in entries[0]
        }
        places = [entry["frame"].tolist() for entry in entries]
        frames = [Frame((a, b), (c, d), (e, f)) for a, b, c, d, e, f in places]
        return stacked["mean"], stacked.get("std"), frames


def _half(tensor: Tensor) -> Array:
    """In float16; a latent beyond its range would be a VAE's overflow."""
    half = tensor.detach().to("cpu", torch.float16)
    if not bool(half.isfinite().all()):
        raise ConfigError(
            "the VAE gave latents beyond 65504, which is no image's; its scaling_factor is wrong"
        )
    return half.numpy()


class PromptCache(_Cache[str]):
    """Per caption the embeddings, and for SDXL and SD3 the pooled ones, as the encoders gave them.

    They keep the dtype they were computed in (`model.dtype`), so that training from the cache and
    from live encoders agree exactly. Places at the end that hold nothing but zeros (SDXL's empty
    prompt, SD3 without T5) take no room.

    Args:
        config: The run; reads the files of its text encoders, but no weights into memory.
    """

    holds, of = "embeddings", "captions"

    def __init__(self, config: RunConfig) -> None:
        self.store = open_store(
            cache_folder(config) / "prompts",
            {
                "holds": "prompts",
                "encoders": encoders_fingerprint(config),
                "dtype": config.model.dtype,
            },
        )

    def key(self, caption: str) -> str:
        """The entry of a caption."""
        return self.store.key(caption)

    def missing(self, items: Iterable[str]) -> list[str]:
        """The captions without an entry, each once."""
        keys = {self.key(caption): caption for caption in items}
        return [keys[key] for key in self.store.missing(keys)]

    def put(self, captions: Sequence[str], cond: Condition) -> None:
        """Store the embeddings of some captions."""
        for i, caption in enumerate(captions):
            embeds = cond.embeds[i]
            used = embeds.any(dim=1).nonzero()  # [places with a number in them, 1]
            length = int(used[-1]) + 1 if len(used) else 0
            entry = {
                "embeds": to_numpy(embeds[:length]),
                "places": np.array([len(embeds)], np.int32),
            }
            if cond.pooled is not None:
                entry["pooled"] = to_numpy(cond.pooled[i])
            self.store.put(self.key(caption), entry)

    def get(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """`embeds` [N, S, D] and, where the family has them, `pooled` [N, P].

        Raises:
            ConfigError: An entry is missing or damaged.
        """
        found: dict[str, dict[str, Tensor]] = {}
        for caption in dict.fromkeys(captions):
            found[caption] = self._tensors(self._entry(self.key(caption), repr(caption)))
        names = found[captions[0]]
        return {name: torch.stack([found[c][name] for c in captions]) for name in names}

    def _tensors(self, entry: Mapping[str, Array]) -> dict[str, Tensor]:
        """With the zeros that were left out."""
        embeds = from_numpy(entry["embeds"])
        rest = int(entry["places"][0]) - len(embeds)
        tensors = {"embeds": torch.nn.functional.pad(embeds, (0, 0, 0, rest)) if rest else embeds}
        if "pooled" in entry:
            tensors["pooled"] = from_numpy(entry["pooled"])
        return tensors


def encoders_fingerprint(config: RunConfig) -> str:
    """Hash of the files of the text encoders and tokenizers, and of what else embeds a prompt."""
    path, revision = config.model.path, config.model.revision
    family = family_of(path, revision)
    zeros = model_index(path, revision).get("force_zeros_for_empty_prompt")
    rest = [family.name, family.t5_limit, zeros]
    if family.optional:  # as many zeros stand for it
        rest.append(denoiser_config(path, revision).get("joint_attention_dim"))
    parts = [
        [name, fingerprint_of(config, part)]
        for name in encoders_of(path, family, revision)
        for part in (name, name.replace("text_encoder", "tokenizer"))
    ]
    text = json.dumps([rest, parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


_NOT_IN_ERRORS = {"sampling", "eval_draws", "cache", "cache_folder", "long_captions", "logp_scale"}
"""Settings of the diffusion section that no reference error depends on."""


class ErrorCache(_Cache[Example]):
    """Per row the reference's errors at each of `num_draws` stored draws of timestep and noise.

    A key holds captions, images, every setting that decides x_t, t and the target, the files of
    all parts of the model, and the torch version, whose generators make the noise.

    Args:
        config: The run; reads the files of its model, but no weights into memory.
    """

    holds = "reference errors"

    def __init__(self, config: RunConfig) -> None:
        self.num_draws = config.diffusion.num_draws
        self._contents = FileStat()
        self._config = config
        folder = config.reference.cache or cache_folder(config)
        self.store = open_store(folder / "errors", _error_settings(config))

    def key(self, example: Example) -> str:
        """The entry of a row."""
        pictures = [self._contents(picture) for picture in row_pictures(example)]
        own = [None if c.prompt is None else as_text(c.prompt) for c in example.candidates]
        return self.store.key([as_text(example.prompt), own, pictures])

    def missing(self, items: Iterable[Example]) -> list[Example]:
        """The rows without an entry, each content once."""
        keys = {self.key(example): example for example in items}
        return [keys[key] for key in self.store.missing(keys)]

    def require(self, items: Sequence[Example]) -> None:
        """Refuse also errors of latents that are not there; rows of one content count once."""
        super().require(list({self.key(item): item for item in items}.values()))
        if has_latents(self._config):
            LatentCache(self._config).require(items)

    def put(self, example: Example, errors: Tensor) -> None:  # [num_draws, K]
        """Store a row."""
        self.store.put(self.key(example), {"errors": errors.detach().cpu().numpy()})

    def get(self, example: Example, draw: int) -> Tensor:  # [K]
        """The errors of a row at a stored draw, a number below `num_draws`.

        Raises:
            ConfigError: The entry is missing or damaged.
        """
        entry = self._entry(self.key(example), f"row {example.id!r}")
        return torch.from_numpy(entry["errors"][draw].copy())


def _error_settings(config: RunConfig) -> dict[str, str]:
    model, path, revision = config.model, config.model.path, config.model.revision
    settings = as_before(config.diffusion.model_dump(mode="json", exclude=_NOT_IN_ERRORS))
    return {
        "holds": "reference errors",
        "settings": json.dumps(settings, sort_keys=True),
        "latents": "float16" if has_latents(config) else "live",
        "denoiser": fingerprint_of(config, family_of(path, revision).part),
        "adapter": fingerprint(model.adapter) if model.adapter else "none",
        "vae": fingerprint_of(config, "vae") if has_component(path, "vae", revision) else "none",
        "encoders": encoders_fingerprint(config),
        "scheduler": json.dumps(scheduler_config(path, revision), sort_keys=True),
        "dtype": model.dtype,
        "autocast": config.train.mixed_precision,
        "torch": str(torch.__version__),
    }


def caches_errors(config: RunConfig, needs: Needs) -> bool:
    """Whether the run reads its reference from stored errors."""
    return config.reference.kind == "cached" and needs.reference


def check_cacheable(config: RunConfig, needs: Needs) -> None:
    """Refuse reference errors that no cache can hold.

    Raises:
        ConfigError: With the reason.
    """
    if caches_errors(config, needs) and "mismatched" in needs.roles:
        raise ConfigError(
            "reference.kind is cached, but the objective scores images under the captions of the "
            "rows beside them in a batch, which change. Use reference.kind: auto"
        )
