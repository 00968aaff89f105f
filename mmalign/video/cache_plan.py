"""What the cache of a run on media would hold and lacks: tokens counted, nothing encoded."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mmalign.config import ReferenceConfig
from mmalign.core import Needs
from mmalign.errors import ConfigError
from mmalign.models.adapter import load_usable
from mmalign.text.cache import ReferenceCache, cache_folder
from mmalign.text.model import causal_model
from mmalign.video.encode import media_tensors
from mmalign.video.model import encode
from mmalign.video.processing import Processor, load_processor
from mmalign.video.survey import counting_encoder, look_at, shown_by
from mmalign.video.write_cache import open_features

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmalign.config import RunConfig
    from mmalign.data.example import Example, Media
    from mmalign.video.adapter import VideoAdapter
    from mmalign.video.survey import CountingEncoder

_HEADER_BYTES = 220  # of a tensor in a shard: its name, shape, place and checksum
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True, slots=True)
class Part:
    """One of the caches: entries that the run needs, those that are missing, and their bytes."""

    name: str
    total: int
    missing: int
    num_bytes: int

    def text(self) -> str:
        """A line."""
        return f"{self.name}: {self.missing:,} of {self.total:,} to write, {size(self.num_bytes)}"


def plan_caches(config: RunConfig, needs: Needs, make: type[VideoAdapter]) -> str:
    """What `write_caches` would write, how large it is and how long it takes, in words.

    Raises:
        ConfigError: Nothing of it can be stored.
    """
    frozen = not {"tower", "projector"} & set(config.video.train)
    if not frozen and config.reference.kind != "cached":
        raise ConfigError(
            "cache: with a trained tower or projector (video.train) features are other ones at "
            "every step, and the reference is not read from a cache (reference.kind: cached)"
        )
    rows = [row for part in load_usable(config, needs) for row in part]
    processor = Processor(load_processor(config), config)
    encoder = counting_encoder(config, processor, look_at(config, processor, [rows]))
    parts: list[Part] = []
    said: list[str] = []
    if frozen:
        part, todo = _features(config, encoder, rows)
        parts.append(part)
        if todo is not None:
            seconds = part.missing * _seconds(config, make, todo)
            said.append(f"about {_duration(seconds)} for the features, by timing one of them")
    if config.reference.kind == "cached":
        parts.append(_reference(config, needs, encoder, rows))
    folder = cache_folder(config).absolute()
    total = sum(part.num_bytes for part in parts)
    there = folder
    while not there.is_dir():
        there = there.parent
    room = shutil.disk_usage(there).free
    short = "" if room > total else ", which is not enough"
    lines = [part.text() for part in parts]
    return "\n".join(
        [*lines, *said, f"{size(total)} in {folder}, with room for {size(room)}{short}"]
    )


def size(num_bytes: float) -> str:
    """Bytes in words."""
    for unit in _UNITS:
        if num_bytes < 1024 or unit == _UNITS[-1]:
            break
        num_bytes /= 1024
    return f"{num_bytes:,.0f} {unit}" if unit == "bytes" else f"{num_bytes:,.1f} {unit}"


def _features(
    config: RunConfig, encoder: CountingEncoder, rows: Sequence[Example]
) -> tuple[Part, Media | None]:
    """The features of all media, and one of those that are missing."""
    store = open_features(config)
    shown = dict.fromkeys(media for row in rows for media in shown_by(row))
    keys = {encoder.reader.key(media): media for media in shown}
    absent = set(store.missing(map(store.key, keys)))
    todo = [media for key, media in keys.items() if store.key(key) in absent]
    each, tensors = _width(config)
    tokens = sum(_places(encoder, media) for media in todo)
    num_bytes = tokens * each * tensors + len(todo) * tensors * _HEADER_BYTES
    return Part("features of media", len(keys), len(todo), num_bytes), next(iter(todo), None)


def _places(encoder: CountingEncoder, media: Media) -> int:
    """Tokens in whose place features stand."""
    ids = encoder.reader.prepare(media, "cache").processed.tensors["input_ids"]
    wanted = torch.tensor(sorted(encoder.shown_ids))
    return int(torch.isin(ids, wanted).sum())


def _width(config: RunConfig) -> tuple[int, int]:
    """Bytes of a token's features, and tensors of an entry: one, and one a deeper layer."""
    from transformers import AutoConfig

    model = config.model
    settings: Any = AutoConfig.from_pretrained(
        model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
    )
    settings = getattr(settings, "thinker_config", settings)
    width = settings.get_text_config().hidden_size
    deep = getattr(getattr(settings, "vision_config", None), "deepstack_visual_indexes", None)
    return width * getattr(torch, model.dtype).itemsize, 1 + len(deep or ())


def _reference(
    config: RunConfig, needs: Needs, encoder: CountingEncoder, rows: Sequence[Example]
) -> Part:
    """A log-probability a response token, or its last hidden state where a KL needs it."""
    cache = ReferenceCache(config, encoder, needs)
    rows = list({id(row): row for row in rows}.values())
    absent = set(cache.store.missing(map(cache.key, rows)))
    todo = [row for row in rows if cache.key(row) in absent]
    tokens = 0
    for row in todo:
        encoded = encoder.encode_example(row)
        tokens += len(encoded) * max(len(item.response) for item in encoded)
    each = _width(config)[0] if cache.name == "ref_hidden" else 4
    num_bytes = tokens * each + len(todo) * _HEADER_BYTES
    return Part("rows of the reference", len(rows), len(todo), num_bytes)


@torch.no_grad()
def _seconds(config: RunConfig, make: type[VideoAdapter], media: Media) -> float:
    """To decode and encode one entry, the second time: the first one also sets things up."""
    from accelerate import Accelerator

    live = config.model_copy(update={"reference": ReferenceConfig()})
    device = Accelerator().device
    adapter = make.build(live, Needs()).to(device).eval()
    inner, encoder = causal_model(adapter.policy), adapter.encoder
    found = 0.0
    for _ in range(2):
        began = time.perf_counter()
        prepared = encoder.reader.prepare(media, "cache", pixels=True)
        tensors = {k: v.to(device) for k, v in media_tensors(prepared).items()}
        encode(inner, tensors, encoder.shown_ids, encoder.kinds)
        if device.type == "cuda":
            torch.cuda.synchronize()
        found = time.perf_counter() - began
    return found


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
