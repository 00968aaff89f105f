"""Pictures as latents, encoded once."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mmalign.diffusion.notes import (
    Contents,
    PictureNotes,
    cache_folder,
    fingerprint_of,
    lost,
    open_store,
    require,
)
from mmalign.diffusion.pictures import Frame, row_pictures, row_size
from mmalign.diffusion.pipeline import has_component
from mmalign.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from mmalign.config import RunConfig
    from mmalign.data.example import Example, Picture
    from mmalign.diffusion.notes import Size

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
        self._contents = Contents()
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
    def notes(self) -> PictureNotes:
        """Sizes of pictures, which buckets follow from; not opened without those."""
        return PictureNotes(self._config, self._contents)

    def shape(self, example: Example) -> Size | None:
        """Height and width that the row's pictures are brought to; None: sizes are not known."""
        if not self.settings.buckets:
            return (self.settings.resolution, self.settings.resolution)
        sizes = [self.notes.get(picture) for picture in row_pictures(example)]
        known = [size for size in sizes if isinstance(size, tuple)]
        return row_size(known, self.settings) if sizes and len(known) == len(sizes) else None

    def key(self, picture: Picture, shape: Size, flip: bool) -> str:
        """The entry of a picture brought to a shape."""
        return self.store.key([*self._contents(picture), *shape, bool(flip)])

    def missing(self, examples: Iterable[Example]) -> list[Example]:
        """The rows that lack the latents of a picture."""
        return [example for example in examples if not self._has(example)]

    def require(self, examples: Sequence[Example]) -> None:
        """Refuse a cache that lacks rows.

        Raises:
            ConfigError: With the command that writes them.
        """
        require(self.store, "the latents", len(self.missing(examples)), len(examples))

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
            "the VAE gave latents beyond 65504, which is no picture's; its scaling_factor is wrong"
        )
    return half.numpy()
