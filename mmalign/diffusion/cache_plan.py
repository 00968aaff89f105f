"""What `mmalign cache` will write, counted beforehand, and its share for each process."""

from __future__ import annotations

import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Self, TypeVar, cast

import torch
import torch.distributed as dist

from mmalign.config import RunConfig
from mmalign.core import Needs
from mmalign.data.cache import HEADER_BYTES
from mmalign.data.example import Example, Picture
from mmalign.data.jobs import duration
from mmalign.data.opening import amount
from mmalign.data.sources import load_examples
from mmalign.diffusion.cache import (
    ErrorCache,
    LatentCache,
    PromptCache,
    caches_errors,
    check_cacheable,
    has_latents,
)
from mmalign.diffusion.components import Vae
from mmalign.diffusion.conditioning import load_tokenizers
from mmalign.diffusion.pictures import Size, cache_folder, captions_of, row_pictures
from mmalign.diffusion.pipeline import component, denoiser_config, read_json
from mmalign.errors import ConfigError


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
            f"{amount(part.each)} each: {amount(part.num_bytes)}"
            for part in self.parts
        ]
        folders = dict.fromkeys(str(part.folder) for part in self.parts)
        room = [f"{folder} has room for {amount(free)}" for folder, free in self._free().items()]
        lines += self.left_out
        total = f"{amount(self.num_bytes)} to write in {', '.join(folders)}"
        return "\n".join([*lines, total, *room])

    def check_room(self) -> None:
        """Refuse a disk that is too small.

        Raises:
            ConfigError: With what is needed and what is there.
        """
        for folder, free in self._free().items():
            if self.num_bytes > free:
                raise ConfigError(
                    f"cache: {amount(self.num_bytes)} are to be written, but the disk of {folder} "
                    f"has room for {amount(free)}. Set diffusion.cache_folder to a larger one, or "
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


def plan(config: RunConfig, needs: Needs, rows: Sequence[Example] | None = None) -> Plan:
    """What the cache of a run would hold and lacks; reads records and settings, no images.

    Args:
        config: The run.
        needs: Of its objective.
        rows: Where they are loaded already.

    Raises:
        ConfigError: There is nothing that can be cached.
    """
    check_cacheable(config, needs)
    if rows is None:
        loaded = load_examples(config.data, needs, seed=config.train.seed)
        rows = [row for part in loaded for row in part]
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
                f"latents are left out: diffusion.crop is {settings.crop}, so that an image's "
                "latents differ each time"
            )
        elif settings.estimator.generated:
            left_out.append("latents are left out: the images are generated in training")
        else:
            left_out.append("latents are left out: the model has no VAE and works on pixels")
        parts.append(_prompts(config, rows))
    if caches_errors(config, needs):
        parts.append(_errors(config, rows))
    if not parts:
        raise ConfigError(
            "cache: nothing to store: diffusion.cache is off, and reference.kind is "
            f"{config.reference.kind}, not cached"
        )
    return Plan(parts, left_out)


def captions_to_store(config: RunConfig, rows: Sequence[Example]) -> list[str]:
    """Every caption of the rows' candidates, the empty one, and the prompts shown in training."""
    own = (caption for row in rows for caption in captions_of(row))
    return list(dict.fromkeys(["", *own, *config.sample.prompts]))


def pictures_of(rows: Sequence[Example]) -> list[Picture]:
    """The images of some rows, each once."""
    return list(dict.fromkeys(picture for row in rows for picture in row_pictures(row)))


def _latents(config: RunConfig, rows: Sequence[Example]) -> Part:
    cache = LatentCache(config)
    keys: dict[str, Size] = {}
    unknown = 0  # buckets: images whose shape is known once they were decoded
    for row in rows:
        shape = cache.shape(row)
        if shape is None:
            unknown += len(row_pictures(row)) * len(cache.flips)
        else:
            keys |= {key: shape for _, _, key in cache.entries(row)}
    missing = cache.store.missing(keys)
    areas = [keys[key][0] * keys[key][1] for key in missing]
    # A bucket's area is the square's, or somewhat less.
    areas += [config.diffusion.resolution**2] * unknown
    model = config.model
    folder = component(model.path, "vae", model.revision)
    vae = Vae(torch.nn.Identity(), read_json(folder / "config.json"), model.path)
    tensors = 2 if vae.is_random else 1
    pixels = sum(areas) // len(areas) if areas else config.diffusion.resolution**2
    each = tensors * 2 * vae.channels * pixels // vae.factor**2 + 24 + (tensors + 1) * HEADER_BYTES
    name = "images and mirrored ones" if len(cache.flips) > 1 else "images"
    total = len(keys) + unknown
    return Part("latents", name, cache_folder(config), total, len(missing) + unknown, each)


def _prompts(config: RunConfig, rows: Sequence[Example]) -> Part:
    cache = PromptCache(config)
    captions = captions_to_store(config, rows)
    path, revision = config.model.path, config.model.revision
    tokenizers, network = load_tokenizers(path, revision), denoiser_config(path, revision)
    family = tokenizers.family
    pooled = family.pooled_width(network)
    numbers = family.num_places(tokenizers.limits) * network[family.width] + pooled
    itemsize = getattr(torch, config.model.dtype).itemsize
    each = itemsize * numbers + 4 + (3 if pooled else 2) * HEADER_BYTES
    missing = len(cache.missing(captions))
    return Part("prompts", "captions", cache_folder(config), len(captions), missing, each)


def _errors(config: RunConfig, rows: Sequence[Example]) -> Part:
    errors = ErrorCache(config)
    keys = {errors.key(row): len(row.candidates) for row in rows}
    missing = errors.store.missing(keys)
    mean = sum(keys[key] for key in missing) / max(1, len(missing))
    itemsize = 8 if config.model.dtype == "float64" else 4
    each = int(itemsize * errors.num_draws * mean) + HEADER_BYTES
    unit = f"rows of {errors.num_draws} draws"
    folder = config.reference.cache or cache_folder(config)
    return Part("reference errors", unit, folder, len(keys), len(missing), each)


Item = TypeVar("Item")
Result = TypeVar("Result")

FIRST_LINE, NEXT_LINE = 5.0, 30.0
"""Seconds of work before the first line of progress, and between two, where there is no bar."""


class Processes:
    """Where this process works, what falls to it, and how it waits for the others.

    Waiting has a group of its own: the one of training gives up after some minutes, and shares of
    hours of work do not end so close together.

    Args:
        device: Of this process.
        number: Of this process, from 0.
        total: Of processes.
    """

    def __init__(self, device: torch.device, number: int = 0, total: int = 1) -> None:
        self.device, self.number, self.total = device, number, total
        self._group: Any = None
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(days=30))

    @classmethod
    def launched(cls) -> Self:
        """As accelerate or torchrun started it."""
        from accelerate import PartialState

        state = PartialState()
        return cls(cast("torch.device", state.device), state.process_index, state.num_processes)

    @property
    def is_main(self) -> bool:
        """Whether it is the one that speaks."""
        return self.number == 0

    def is_mine(self, key: str) -> bool:
        """Whether an entry falls to this process: by its key alone, so that all agree on it."""
        return int(key[:12], 16) % self.total == self.number

    def wait(self) -> None:
        """Until all are here."""
        if self._group is not None:
            dist.barrier(group=self._group)

    def gather(self, value: Result) -> list[Result]:
        """The values of all processes."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.total
        dist.all_gather_object(values, value, group=self._group)
        return values


def ahead(
    items: Iterable[Item], load: Callable[[Item], Result], *, threads: int, depth: int
) -> Iterator[Result]:
    """`load` of every item, in order, by threads that are at most `depth` items ahead."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(load, item))
                if len(waiting) >= depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def progress(what: str, total: int, *, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, elsewhere a line now and then; both with the time that is left.

    Args:
        what: Name of the stage.
        total: Of what is counted; at 0 nothing is shown.
        shown: Whether this process shows anything.

    Yields:
        A function to call with the number of things done since the last call.
    """
    if not shown or not total:
        yield lambda _: None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True)) as bars:
            task = bars.add_task(what, total=total)
            yield lambda number: bars.advance(task, number)
    else:
        began, done = time.monotonic(), 0
        due = began + FIRST_LINE

        def line(number: int) -> None:
            nonlocal done, due
            done, now = done + number, time.monotonic()
            if now < due or not done:
                return
            due, speed = now + NEXT_LINE, done / (now - began)
            left = duration((total - done) / speed)
            text = f"{what}: {done} of {total}, {speed:.3g} a second, {left} left"
            print(text, file=sys.stderr, flush=True)

        yield line
