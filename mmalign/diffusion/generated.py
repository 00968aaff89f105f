"""Clean latents for prompts that have no picture: generated once by the model before training."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from mmalign.diffusion.batch import caption_of
from mmalign.diffusion.draws import seed_of
from mmalign.diffusion.latents import factor_of
from mmalign.diffusion.notes import cache_folder, open_store
from mmalign.diffusion.pictures import Frame
from mmalign.diffusion.sample import denoise, picture_size, start_noise
from mmalign.diffusion.work import Processes, progress
from mmalign.models.files import state_fingerprint

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from mmalign.data.cache import TensorCache
    from mmalign.data.example import Example
    from mmalign.diffusion.inputs import Inputs

_AT_ONCE = 16


class Generated:
    """Stands in for a cache of encoded pictures.

    Self-NPO needs pictures only as places to start noising from; with those of the model itself it
    needs no data but prompts. They are kept on disk, so that a resumed run goes on with the same.

    Source: Self-NPO's paper calls the method data-free.
    Departs: the released scripts start from a folder of images.
    """

    def __init__(self, inputs: Inputs, model: nn.Module) -> None:
        """Open the folder.

        Args:
            inputs: Embeds prompts; its config says how pictures are generated.
            model: The network as it is before training.
        """
        config, components = inputs.config, inputs.components
        self._inputs, self._model = inputs, model
        self._factor = factor_of(components.folder)
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

        Pictures are made in the same groups whichever of them are there, so that their last bits
        do not depend on an interruption.
        """
        captions = {self._key(row): caption_of(row, 0) for row in examples}
        place = Processes.launched()
        mine = [key for key in captions if place.is_mine(key)]
        groups = [mine[start : start + _AT_ONCE] for start in range(0, len(mine), _AT_ONCE)]
        todo = [(group, lacking) for group in groups if (lacking := self._store.missing(group))]
        total = sum(len(lacking) for _, lacking in todo)
        with progress("clean pictures", total, shown=place.is_main) as seen, self._store:
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
        noise = start_noise([seed_of(self._seed, key) for key in keys], shape)
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
