"""Encoding the media of all rows beforehand, and the reference's scores where a run reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mmalign.config import ReferenceConfig
from mmalign.core import Needs
from mmalign.data.cache import TensorCache
from mmalign.data.jobs import only_writer
from mmalign.errors import ConfigError
from mmalign.models.adapter import load_usable
from mmalign.models.files import fingerprint
from mmalign.text.cache import cache_folder
from mmalign.text.model import causal_model
from mmalign.text.tools import write_reference
from mmalign.video.encode import media_tensors
from mmalign.video.model import encode

if TYPE_CHECKING:
    from mmalign.config import RunConfig
    from mmalign.data.example import Media
    from mmalign.video.adapter import VideoAdapter


def open_features(config: RunConfig) -> TensorCache:
    """The folder with the features of a model's frozen towers; empty before it is written to."""
    model = config.model
    return TensorCache(
        cache_folder(config),
        {
            "model": fingerprint(model.path, model.revision),
            "quantization": str(model.quantization),
            "dtype": model.dtype,
            "holds": "media_features",
        },
    )


def write_caches(config: RunConfig, needs: Needs, adapter: type[VideoAdapter]) -> str:
    """Store what training would compute again and again.

    Args:
        config: The run's configuration.
        needs: Of its objective.
        adapter: Makes the model.

    Returns:
        What was done, a sentence a line.

    Raises:
        ConfigError: Nothing of it can be stored.
    """
    said: list[str] = []
    if not {"tower", "projector"} & set(config.video.train):
        with only_writer(cache_folder(config), "cache", wait=True):
            said.append(_write_features(config, needs, adapter))
    if config.reference.kind == "cached":
        said.append(write_reference(config, needs, adapter.build))
    if not said:
        raise ConfigError(
            "cache: with a trained tower or projector (video.train) features are other ones at "
            "every step, and the reference is not read from a cache (reference.kind: cached)"
        )
    return "\n".join(said)


@torch.no_grad()
def _write_features(config: RunConfig, needs: Needs, make: type[VideoAdapter]) -> str:
    from accelerate import Accelerator
    from rich.console import Console
    from rich.progress import track

    rows = [row for part in load_usable(config, needs) for row in part]
    own = [row.media for row in rows]
    own += [c.media for row in rows for c in row.candidates if c.media is not None]
    shown: list[Media] = [media for media in dict.fromkeys(own) if media]
    live = config.model_copy(update={"reference": ReferenceConfig()})
    device = Accelerator().device
    adapter = make.build(live, Needs()).to(device).eval()
    reader, store = adapter.encoder.reader, open_features(config)
    adapter.features.disk = store
    store.sweep()
    keys = {reader.key(media): media for media in shown}
    absent = set(store.missing(map(store.key, keys), read=True))
    store.repair()
    todo = [(key, media) for key, media in keys.items() if store.key(key) in absent]
    console = Console(stderr=True)
    with store:
        for key, media in track(todo, "features", console=console, disable=not console.is_terminal):
            prepared = reader.prepare(media, str(media.videos or media.images or media.sounds))
            tensors = {k: v.to(device) for k, v in media_tensors(prepared).items()}
            inner, encoder = causal_model(adapter.policy), adapter.encoder
            encoded = encode(inner, tensors, encoder.shown_ids, encoder.kinds)
            adapter.features.write(key, encoded)
    return (
        f"{store.folder}: features of {len(todo)} media written, {len(keys) - len(todo)} were "
        "there; runs with this config find them"
    )
