"""What training reads instead of running the VAE, the text encoders and the reference.

Each cache is a folder of shards (`mmalign.data.cache`) below `diffusion.cache_folder`. An entry's
key holds everything that decides its values, so a changed picture, model or setting is a miss and
never a wrong number. `mmalign cache CONFIG` writes them.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mmalign.data.cache import TensorCache
from mmalign.data.example import Picture, as_text
from mmalign.diffusion.conditioning import T5_LIMIT, encoders_of
from mmalign.diffusion.pictures import Frame, row_pictures, row_size
from mmalign.diffusion.pipeline import (
    component_fingerprint,
    denoiser_config,
    family_of,
    has_component,
    model_index,
    scheduler_config,
)
from mmalign.errors import ConfigError, DataError
from mmalign.models.files import fingerprint

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor

    from mmalign.config import ModelConfig, RunConfig
    from mmalign.data.example import Example
    from mmalign.diffusion.denoiser import Condition

    Array = np.ndarray[Any, np.dtype[Any]]
    Size = tuple[int, int]  # height, width, in pixels

FLUSH_SECONDS = 30.0
"""Longest that finished work waits in memory: what an interruption may lose."""

_REMEDY = "Write them with `mmalign cache CONFIG`"

# Settings of the diffusion section that no reference error depends on.
_NOT_IN_ERRORS = {
    "sampling",
    "eval_draws",
    "cache",
    "cache_folder",
    "long_captions",
    "logp_scale",
}


def cache_folder(config: RunConfig) -> Path:
    """Where the caches lie: `diffusion.cache_folder`, or cache/ beside the run folder."""
    return config.diffusion.cache_folder or config.output.parent / "cache"


def has_latents(config: RunConfig) -> bool:
    """Whether a run's clean latents can come from a cache."""
    settings = config.diffusion
    return (
        settings.cache != "off"
        and settings.crop == "center"
        and not settings.estimator.generated
        and has_component(config.model.path, "vae", config.model.revision)
    )


class _Contents:
    """What identifies a picture: its file with size and time of change, and its cell.

    A file is looked at once in the life of the object.
    """

    def __init__(self) -> None:
        self._files: dict[Path, list[Any]] = {}

    def __call__(self, picture: Picture) -> list[Any]:
        file = self._files.get(picture.path)
        if file is None:
            try:
                info = picture.path.stat()
            except OSError as error:
                raise DataError(f"{picture}: cannot be read: {error}") from error
            file = self._files[picture.path] = [
                str(picture.path),
                info.st_size,
                info.st_mtime_ns,
            ]
        return [*file, picture.row, picture.column]


class PictureNotes:
    """What decoding a picture once has shown: its size, or why it cannot be decoded."""

    def __init__(self, config: RunConfig, contents: _Contents | None = None) -> None:
        self._contents = contents or _Contents()
        self._known: dict[Picture, Size | DataError] = {}
        self.store = TensorCache(
            cache_folder(config) / "pictures", {"holds": "sizes"}, seconds=FLUSH_SECONDS
        )

    def get(self, picture: Picture) -> Size | DataError | None:
        """Height and width in pixels, the error that decoding gave, or None: not known."""
        found = self._known.get(picture)
        if found is not None:
            return found
        key = self.key(picture)
        if not self.store.missing([key]) and (entry := self.store.get(key)) is not None:
            if "bad" in entry:
                found = DataError(entry["bad"].tobytes().decode("utf-8"))
            else:
                height, width = entry["size"].tolist()
                found = (height, width)
            self._known[picture] = found
        return found

    def put(self, picture: Picture, found: Size | DataError) -> None:
        """Remember what decoding gave."""
        self._known[picture] = found
        if isinstance(found, DataError):
            entry = {"bad": np.frombuffer(str(found).encode("utf-8"), np.uint8)}
        else:
            entry = {"size": np.array(found, np.int32)}
        self.store.put(self.key(picture), entry)

    def key(self, picture: Picture) -> str:
        """The picture's entry."""
        return self.store.key(self._contents(picture))


class LatentCache:
    """Per picture, shape and flip: the VAE's posterior, scaled, and the frame for time ids.

    Mean and standard deviation are kept, in float16, so that training can draw from the posterior
    anew each time; the deviation is left out where the VAE has none. Pictures are cropped in the
    centre. A key holds the picture's file and cell, the shape all pictures of its row have, the
    flip, the VAE's files and its dtype.

    Args:
        config: The run; reads the files of its VAE, but no weights into memory.
    """

    def __init__(self, config: RunConfig) -> None:
        self.settings = config.diffusion
        self._contents = _Contents()
        self.notes = PictureNotes(config, self._contents)
        self.flips = (False, True) if self.settings.flip else (False,)
        self.store = TensorCache(
            cache_folder(config) / "latents",
            {
                "holds": "latents",
                "vae": component_fingerprint(config.model.path, "vae", config.model.revision),
                "dtype": self.settings.vae_dtype,
            },
            seconds=FLUSH_SECONDS,
        )

    def shape(self, example: Example) -> Size | None:
        """Height and width that the row's pictures are brought to; None: sizes are not known."""
        if not self.settings.buckets:
            return (self.settings.resolution, self.settings.resolution)
        sizes = [self.notes.get(picture) for picture in row_pictures(example)]
        known = [size for size in sizes if isinstance(size, tuple)]
        return row_size(known, self.settings) if len(known) == len(sizes) else None

    def key(self, picture: Picture, shape: Size, flip: bool) -> str:
        """The entry of a picture brought to a shape."""
        return self.store.key([*self._contents(picture), *shape, flip])

    def missing(self, examples: Iterable[Example]) -> list[Example]:
        """The rows that lack the latents of a picture."""
        return [example for example in examples if not self._has(example)]

    def require(self, examples: Sequence[Example]) -> None:
        """Refuse a cache that lacks rows.

        Raises:
            ConfigError: With the command that writes them.
        """
        _require(self.store, "the latents", len(self.missing(examples)), len(examples))

    def put(self, key: str, mean: Tensor, std: Tensor | None, frame: Frame) -> None:
        """Store a picture.

        Args:
            key: From `key`.
            mean: [C, h, w] of the posterior, scaled.
            std: [C, h, w]; None where the VAE has no spread.
            frame: Where the picture comes from.
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
                raise _lost(self.store, f"the latents of {picture}")
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
        if shape is None:
            return False
        keys = [self.key(picture, shape, flip) for picture in pictures for flip in self.flips]
        return not self.store.missing(keys)


class PromptCache:
    """Per caption the embeddings, and for SDXL and SD3 the pooled ones, as the encoders gave them.

    They keep the dtype they were computed in (`model.dtype`), so that training from the cache and
    from live encoders agree exactly. Places at the end that hold nothing but zeros (SDXL's empty
    prompt, SD3 without T5) take no room.

    Args:
        config: The run; reads the files of its text encoders, but no weights into memory.
    """

    def __init__(self, config: RunConfig) -> None:
        self.store = TensorCache(
            cache_folder(config) / "prompts",
            {
                "holds": "prompts",
                "encoders": _encoders_fingerprint(config.model),
                "dtype": config.model.dtype,
            },
            seconds=FLUSH_SECONDS,
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
        _require(
            self.store, "the embeddings", len(self.missing(captions)), len(captions), "captions"
        )

    def put(self, captions: Sequence[str], told: Condition) -> None:
        """Store the embeddings of some captions."""
        for i, caption in enumerate(captions):
            embeds = told.embeds[i]
            used = embeds.any(dim=1).nonzero()  # [places with a number in them, 1]
            length = int(used[-1]) + 1 if len(used) else 0
            entry = {"embeds": _bits(embeds[:length]), "places": np.array(len(embeds), np.int32)}
            if told.pooled is not None:
                entry["pooled"] = _bits(told.pooled[i])
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
                raise _lost(self.store, f"the embeddings of {caption!r}")
            found[caption] = self._tensors(entry)
        names = found[captions[0]]
        return {name: torch.stack([found[c][name] for c in captions]) for name in names}

    def _tensors(self, entry: Mapping[str, Array]) -> dict[str, Tensor]:
        """With the zeros that were left out."""
        embeds = _unbits(entry["embeds"])
        rest = int(entry["places"]) - len(embeds)
        tensors = {"embeds": torch.nn.functional.pad(embeds, (0, 0, 0, rest)) if rest else embeds}
        if "pooled" in entry:
            tensors["pooled"] = _unbits(entry["pooled"])
        return tensors


class ErrorBank:
    """Per row the reference's errors at each of `num_draws` stored draws of timestep and noise.

    A key holds captions, pictures, every setting that decides x_t, t and the target, the files of
    all parts of the model, and the torch version, whose generators make the noise.

    Args:
        config: The run; reads the files of its model, but no weights into memory.
    """

    def __init__(self, config: RunConfig) -> None:
        self.num_draws = config.diffusion.num_draws
        self._contents = _Contents()
        self._config = config
        folder = config.reference.cache or cache_folder(config)
        self.store = TensorCache(folder / "errors", _error_settings(config), seconds=FLUSH_SECONDS)

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
        """Refuse a bank that lacks rows, or whose errors are of latents that are not there.

        Raises:
            ConfigError: With the command that writes them.
        """
        keys = {self.key(example) for example in examples}
        _require(self.store, "the reference errors", len(self.store.missing(keys)), len(keys))
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
            raise _lost(self.store, f"the reference errors of row {example.id!r}")
        return torch.from_numpy(entry["errors"][draw].copy())


def _require(store: TensorCache, what: str, lacking: int, total: int, of: str = "rows") -> None:
    if lacking:
        raise ConfigError(
            f"{store.folder} lacks {what} of {lacking} of {total} {of} under this model and these "
            f"settings. {_REMEDY}, or train without: diffusion.cache: off, reference.kind: auto"
        )


def _lost(store: TensorCache, what: str) -> ConfigError:
    return ConfigError(f"{store.folder}: {what} are missing or damaged. {_REMEDY} again")


def _half(tensor: Tensor) -> Array:
    """In float16; a latent beyond its range would be a VAE's overflow."""
    half = tensor.detach().to("cpu", torch.float16)
    if not bool(half.isfinite().all()):
        raise ConfigError(
            "the VAE gave latents beyond 65504, which is no picture's; its scaling_factor is wrong"
        )
    return half.numpy()


def _bits(tensor: Tensor) -> Array:
    """As numpy; bfloat16, which numpy lacks, as its bits."""
    tensor = tensor.detach().cpu().contiguous()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _unbits(array: Array) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor


def _encoders_fingerprint(model: ModelConfig) -> str:
    """Hash of the files of the text encoders and tokenizers, and of what else embeds a prompt."""
    path, revision = model.path, model.revision
    family = family_of(path, revision)
    rest = [family, T5_LIMIT, model_index(path, revision).get("force_zeros_for_empty_prompt")]
    if family == "sd3":
        rest.append(denoiser_config(path, revision).get("joint_attention_dim"))
    parts = [
        [name, component_fingerprint(path, part, revision)]
        for name in encoders_of(path, family, revision)
        for part in (name, name.replace("text_encoder", "tokenizer"))
    ]
    return _hashed([rest, parts])


def _error_settings(config: RunConfig) -> dict[str, str]:
    model, path, revision = config.model, config.model.path, config.model.revision
    settings = config.diffusion.model_dump(mode="json", exclude=_NOT_IN_ERRORS)
    denoiser = "transformer" if family_of(path, revision) == "sd3" else "unet"
    return {
        "holds": "reference errors",
        "settings": json.dumps(settings, sort_keys=True),
        "latents": "float16" if has_latents(config) else "live",
        "denoiser": component_fingerprint(path, denoiser, revision),
        "adapter": fingerprint(model.adapter) if model.adapter else "none",
        "vae": component_fingerprint(path, "vae", revision)
        if has_component(path, "vae", revision)
        else "none",
        "encoders": _encoders_fingerprint(model),
        "scheduler": json.dumps(scheduler_config(path, revision), sort_keys=True),
        "dtype": model.dtype,
        "autocast": config.train.mixed_precision,
        "torch": str(torch.__version__),
    }


def _hashed(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
