"""Latents, caption embeddings and reference errors, computed once and kept on disk."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mmalign.config.diffusion import as_before
from mmalign.data.example import as_text
from mmalign.diffusion.conditioning import encoders_of
from mmalign.diffusion.families import family_of
from mmalign.diffusion.pictures import (
    FileStat,
    Frame,
    ImageSizeCache,
    cache_folder,
    fingerprint_of,
    lost,
    open_store,
    require,
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
from mmalign.models.files import fingerprint

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor

    from mmalign.config import RunConfig
    from mmalign.core import Needs
    from mmalign.data.example import Example, Picture
    from mmalign.diffusion.conditioning import Condition
    from mmalign.diffusion.pictures import Size


# Images as latents, encoded once.

if TYPE_CHECKING:
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


class LatentCache:
    """Per image, shape and flip: the VAE's posterior, scaled, and the frame for time ids.

    Mean and standard deviation are kept, in float16, so that training can draw from the posterior
    again each time; the deviation is left out where the VAE has none. Images are cropped in the
    centre. A key holds the image's file and cell, the shape all images of its row have, the
    flip, the VAE's files and its dtype.

    Args:
        config: The run; reads the files of its VAE, but no weights into memory.
    """

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

    def key(self, picture: Picture, shape: Size, flip: bool) -> str:
        """The entry of an image brought to a shape."""
        return self.store.key([*self._contents(picture), *shape, bool(flip)])

    def missing(self, examples: Iterable[Example]) -> list[Example]:
        """The rows that lack the latents of an image."""
        return [example for example in examples if not self._has(example)]

    def require(self, examples: Sequence[Example]) -> None:
        """Refuse a cache that lacks rows.

        Raises:
            ConfigError: With the command that writes them.
        """
        require(self.store, "the latents", len(self.missing(examples)), len(examples))

    def put(self, key: str, mean: Tensor, std: Tensor | None, frame: Frame) -> None:
        """Store an image.

        Args:
            key: From `key`.
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
            entry = None if shape is None else self.store.get(self.key(picture, shape, flip))
            if entry is None:
                raise lost(self.store, f"the latents of {picture}")
            entries.append(entry)
        mean = torch.from_numpy(np.stack([entry["mean"] for entry in entries]))
        std = None
        if "std" in entries[0]:
            std = torch.from_numpy(np.stack([entry["std"] for entry in entries]))
        frames: list[Frame] = []
        for entry in entries:
            a, b, c, d, e, f = entry["frame"].tolist()
            frames.append(Frame((a, b), (c, d), (e, f)))
        return mean, std, frames

    def _has(self, example: Example) -> bool:
        pictures = row_pictures(example)
        shape = self.shape(example)
        if shape is None or not pictures:
            return False
        keys = [self.key(picture, shape, flip) for picture in pictures for flip in self.flips]
        return not self.store.missing(keys)


def _half(tensor: Tensor) -> Array:
    """In float16; a latent beyond its range would be a VAE's overflow."""
    half = tensor.detach().to("cpu", torch.float16)
    if not bool(half.isfinite().all()):
        raise ConfigError(
            "the VAE gave latents beyond 65504, which is no image's; its scaling_factor is wrong"
        )
    return half.numpy()


# Captions as embeddings, computed once.


class PromptCache:
    """Per caption the embeddings, and for SDXL and SD3 the pooled ones, as the encoders gave them.

    They keep the dtype they were computed in (`model.dtype`), so that training from the cache and
    from live encoders agree exactly. Places at the end that hold nothing but zeros (SDXL's empty
    prompt, SD3 without T5) take no room.

    Args:
        config: The run; reads the files of its text encoders, but no weights into memory.
    """

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

    def missing(self, captions: Iterable[str]) -> list[str]:
        """The captions without an entry, each once."""
        keys = {self.key(caption): caption for caption in captions}
        return [keys[key] for key in self.store.missing(keys)]

    def require(self, captions: Sequence[str]) -> None:
        """Refuse a cache that lacks captions.

        Raises:
            ConfigError: With the command that writes them.
        """
        captions = list(dict.fromkeys(captions))
        require(
            self.store, "the embeddings", len(self.missing(captions)), len(captions), "captions"
        )

    def put(self, captions: Sequence[str], cond: Condition) -> None:
        """Store the embeddings of some captions."""
        for i, caption in enumerate(captions):
            embeds = cond.embeds[i]
            used = embeds.any(dim=1).nonzero()  # [places with a number in them, 1]
            length = int(used[-1]) + 1 if len(used) else 0
            entry = {"embeds": _bits(embeds[:length]), "places": np.array([len(embeds)], np.int32)}
            if cond.pooled is not None:
                entry["pooled"] = _bits(cond.pooled[i])
            self.store.put(self.key(caption), entry)

    def get(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """`embeds` [N, S, D] and, where the family has them, `pooled` [N, P].

        Raises:
            ConfigError: An entry is missing or damaged.
        """
        found: dict[str, dict[str, Tensor]] = {}
        for caption in dict.fromkeys(captions):
            entry = self.store.get(self.key(caption))
            if entry is None:
                raise lost(self.store, f"the embeddings of {caption!r}")
            found[caption] = self._tensors(entry)
        names = found[captions[0]]
        return {name: torch.stack([found[c][name] for c in captions]) for name in names}

    def _tensors(self, entry: Mapping[str, Array]) -> dict[str, Tensor]:
        """With the zeros that were left out."""
        embeds = _unbits(entry["embeds"])
        rest = int(entry["places"][0]) - len(embeds)
        tensors = {"embeds": torch.nn.functional.pad(embeds, (0, 0, 0, rest)) if rest else embeds}
        if "pooled" in entry:
            tensors["pooled"] = _unbits(entry["pooled"])
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


def _bits(tensor: Tensor) -> Array:
    """As numpy; bfloat16, which numpy lacks, as its bits."""
    tensor = tensor.detach().cpu().contiguous()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _unbits(array: Array) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor


# What the reference says of every row, at draws of timestep and noise that are used again.

# Settings of the diffusion section that no reference error depends on.
_NOT_IN_ERRORS = {
    "sampling",
    "eval_draws",
    "cache",
    "cache_folder",
    "long_captions",
    "logp_scale",
}


class ErrorCache:
    """Per row the reference's errors at each of `num_draws` stored draws of timestep and noise.

    A key holds captions, images, every setting that decides x_t, t and the target, the files of
    all parts of the model, and the torch version, whose generators make the noise.

    Args:
        config: The run; reads the files of its model, but no weights into memory.
    """

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

    def missing(self, examples: Iterable[Example]) -> list[Example]:
        """The rows without an entry, each content once."""
        keys: dict[str, Example] = {}
        for example in examples:
            keys.setdefault(self.key(example), example)
        return [keys[key] for key in self.store.missing(keys)]

    def require(self, examples: Sequence[Example]) -> None:
        """Refuse a cache that lacks rows, or whose errors are of latents that are not there.

        Raises:
            ConfigError: With the command that writes them.
        """
        keys = {self.key(example) for example in examples}
        require(self.store, "the reference errors", len(self.store.missing(keys)), len(keys))
        if has_latents(self._config):
            LatentCache(self._config).require(examples)

    def put(self, example: Example, errors: Tensor) -> None:  # [num_draws, K]
        """Store a row."""
        self.store.put(self.key(example), {"errors": errors.detach().cpu().numpy()})

    def get(self, example: Example, draw: int) -> Tensor:  # [K]
        """The errors of a row at a stored draw, a number below `num_draws`.

        Raises:
            ConfigError: The entry is missing or damaged.
        """
        entry = self.store.get(self.key(example))
        if entry is None:
            raise lost(self.store, f"the reference errors of row {example.id!r}")
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
