"""What the reference says of every row, at draws of timestep and noise that are used again."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch

from mmalign.data.example import as_text
from mmalign.diffusion.latent_cache import LatentCache, has_latents
from mmalign.diffusion.notes import (
    Contents,
    cache_folder,
    fingerprint_of,
    lost,
    open_store,
    require,
)
from mmalign.diffusion.pictures import row_pictures
from mmalign.diffusion.pipeline import (
    family_of,
    has_component,
    scheduler_config,
)
from mmalign.diffusion.prompt_cache import encoders_fingerprint
from mmalign.models.files import fingerprint

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from mmalign.config import RunConfig
    from mmalign.data.example import Example

# Settings of the diffusion section that no reference error depends on.
_NOT_IN_ERRORS = {
    "sampling",
    "eval_draws",
    "cache",
    "cache_folder",
    "long_captions",
    "logp_scale",
}


class ErrorBank:
    """Per row the reference's errors at each of `num_draws` stored draws of timestep and noise.

    A key holds captions, pictures, every setting that decides x_t, t and the target, the files of
    all parts of the model, and the torch version, whose generators make the noise.

    Args:
        config: The run; reads the files of its model, but no weights into memory.
    """

    def __init__(self, config: RunConfig) -> None:
        self.num_draws = config.diffusion.num_draws
        self._contents = Contents()
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
        """Refuse a bank that lacks rows, or whose errors are of latents that are not there.

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
    settings = config.diffusion.model_dump(mode="json", exclude=_NOT_IN_ERRORS)
    denoiser = "transformer" if family_of(path, revision) == "sd3" else "unet"
    return {
        "holds": "reference errors",
        "settings": json.dumps(settings, sort_keys=True),
        "latents": "float16" if has_latents(config) else "live",
        "denoiser": fingerprint_of(config, denoiser),
        "adapter": fingerprint(model.adapter) if model.adapter else "none",
        "vae": fingerprint_of(config, "vae") if has_component(path, "vae", revision) else "none",
        "encoders": encoders_fingerprint(config),
        "scheduler": json.dumps(scheduler_config(path, revision), sort_keys=True),
        "dtype": model.dtype,
        "autocast": config.train.mixed_precision,
        "torch": str(torch.__version__),
    }
