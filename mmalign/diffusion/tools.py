"""What commands do with image models beside training: `mmalign cache`, and rows for a terminal.

Only what is missing is computed. What is finished is on disk within half a minute, in shards that
are renamed into place when complete, so the work may be stopped at any moment, also by SIGKILL,
and goes on from there. An entry's values do not depend on which others are computed with it:
batches never mix rows in a way that changes with what is missing, so a cache written in pieces
equals one written at once.
"""

from __future__ import annotations

import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmalign.config import ReferenceConfig, RunConfig, SampleConfig
from mmalign.core import Needs
from mmalign.data.example import Example, as_text
from mmalign.data.jobs import duration, only_writer
from mmalign.data.sources import load_examples
from mmalign.diffusion import components, methods, pictures
from mmalign.diffusion.adapter import DiffusionAdapter, filter_examples
from mmalign.diffusion.cache import (
    ErrorCache,
    LatentCache,
    PromptCache,
    caches_errors,
    check_cacheable,
    has_latents,
)
from mmalign.diffusion.cache_plan import (
    Plan,
    Processes,
    ahead,
    captions_to_store,
    pictures_of,
    plan,
    progress,
)
from mmalign.diffusion.conditioning import PromptEncoder
from mmalign.diffusion.inputs import TIMESTEP_BIN
from mmalign.diffusion.sample import write_samples
from mmalign.diffusion.scores import by_timestep
from mmalign.models.adapter import LogpUnit, Surveyed, Tools, load_usable

Pixels = np.ndarray[Any, np.dtype[np.float32]]

CAPTIONS_AT_ONCE = 32
DEPTH = 16  # rows whose images are decoded before the VAE asks for them
STALE_SECONDS = 3600  # age at which an unfinished shard belongs to a run that was killed


def sweep(folder: Path) -> None:
    """Remove what killed runs left of unfinished shards."""
    for partial in folder.glob("*/.*.part"):
        try:
            if time.time() - partial.stat().st_mtime > STALE_SECONDS:
                partial.unlink()
        except OSError:  # just renamed by the process it belongs to
            continue


def _look(config: RunConfig, needs: Needs, place: Processes) -> None:
    """Decode the images that no earlier run has decoded, and note their sizes or faults."""
    loaded = load_examples(config.data, needs, seed=config.train.seed)
    notes = pictures.ImageSizeCache(config)
    todo = [
        picture
        for picture in pictures_of([row for part in loaded for row in part])
        if notes.get(picture) is None and place.is_mine(notes.key(picture))
    ]
    with progress("images looked at", len(todo), shown=place.is_main) as seen, notes.store:
        pictures.look(config, todo, notes=notes, seen=seen)


def _write_latents(
    config: RunConfig, needs: Needs, rows: Sequence[Example], place: Processes
) -> int:
    """Encode images, decoded by threads meanwhile; returns how many."""
    cache = LatentCache(config)
    work = _pictures_to_encode(cache, rows, place)
    total = sum(len(items) for _, items in work)
    if not total:
        return 0
    vae = _vae(config, place)
    waiting: dict[tuple[int, ...], list[tuple[str, Pixels, pictures.Frame]]] = defaultdict(list)

    def load(task: tuple[Example, list[_Item]]) -> list[tuple[str, Pixels, pictures.Frame]]:
        example, items = task
        done = pictures.prepare(pictures.row_pictures(example), config.diffusion, None)
        found: list[tuple[str, Pixels, pictures.Frame]] = []
        for k, flip, key in items:
            pixels, frame = done[k]
            found.append((key, np.ascontiguousarray(pixels[..., ::-1] if flip else pixels), frame))
        return found

    def encode(items: list[tuple[str, Pixels, pictures.Frame]], size: int) -> None:
        arrays = [pixels for _, pixels, _ in items]
        arrays += arrays[-1:] * (size - len(arrays))  # always as many: see the module's docstring
        mean, std = vae.encode(torch.from_numpy(np.stack(arrays)).to(place.device))
        mean, std = mean.cpu(), std.cpu()
        for i, (key, _, frame) in enumerate(items):
            cache.put(key, mean[i], std[i] if vae.is_random else None, frame)
        seen(len(items))

    threads = min(DEPTH, os.cpu_count() or 1)
    with progress("latents", total, shown=place.is_main) as seen, cache.store:
        for loaded in ahead(work, load, threads=threads, depth=DEPTH):
            for item in loaded:
                shape = item[1].shape
                size = pictures_at_once(shape, place)
                waiting[shape].append(item)
                if len(waiting[shape]) == size:
                    encode(waiting.pop(shape), size)
        for shape, items in waiting.items():
            encode(items, pictures_at_once(shape, place))
    return total


_Item = tuple[int, bool, str]  # candidate, mirrored, key


def _pictures_to_encode(
    cache: LatentCache, rows: Sequence[Example], place: Processes
) -> list[tuple[Example, list[_Item]]]:
    """This process's rows with the images of theirs that are missing, each image once.

    An image of several rows is the business of the first that brings it to this shape, whatever is
    missing, so that processes that start at different times agree.
    """
    taken: set[str] = set()
    work: list[tuple[Example, list[_Item]]] = []
    for row in rows:
        items: list[_Item] = []
        for item in cache.entries(row):
            if item[2] not in taken:
                taken.add(item[2])
                items.append(item)
        if not items or not place.is_mine(items[0][2]):
            continue
        missing = set(cache.store.missing(key for _, _, key in items))
        items = [item for item in items if item[2] in missing]
        if items:
            work.append((row, items))
    return work


def pictures_at_once(shape: tuple[int, ...], place: Processes) -> int:
    """Images [3, H, W] a call of the VAE; a CPU gains nothing from several."""
    if place.device.type == "cpu":
        return 1
    return max(1, components.PIXELS_AT_ONCE // (shape[1] * shape[2]))


def _write_prompts(
    config: RunConfig, needs: Needs, rows: Sequence[Example], place: Processes
) -> int:
    """Embed captions; returns how many."""
    cache = PromptCache(config)
    captions = captions_to_store(config, rows)
    todo = [caption for caption in cache.missing(captions) if place.is_mine(cache.key(caption))]
    if not todo:
        return 0
    encoder, size = _encoder(config, place)
    with progress("prompts", len(todo), shown=place.is_main) as seen, cache.store:
        for start in range(0, len(todo), size):
            part = todo[start : start + size]
            cond = encoder.encode([*part, *[""] * (size - len(part))])
            cache.put(part, cond.to("cpu"))
            seen(len(part))
    return len(todo)


def _write_errors(
    config: RunConfig, needs: Needs, rows: Sequence[Example], place: Processes
) -> int:
    """Score rows under the reference at every stored draw; returns how many rows.

    The reference is the policy as it starts, so one network and one pass are enough.
    """
    errors = ErrorCache(config)
    todo = [row for row in errors.missing(rows) if place.is_mine(errors.key(row))]
    if not todo:
        return 0
    policy = _policy(config, place, todo)
    size = config.train.eval_batch_size or config.train.batch_size
    half = config.train.mixed_precision == "bf16"
    autocast = torch.autocast(place.device.type, torch.bfloat16, enabled=half)
    unit = -config.diffusion.logp_scale
    with progress("reference errors", len(todo), shown=place.is_main) as seen, errors.store:
        for row in todo:
            parts: list[torch.Tensor] = []
            for start in range(0, errors.num_draws, size):
                draws = list(range(start, min(start + size, errors.num_draws)))
                batch = policy.collate([row] * len(draws), draws).to(place.device)
                with autocast, torch.no_grad():
                    scores = policy(batch, Needs()).policy[..., 0]
                parts.append(scores.cpu() / unit)
            errors.put(row, torch.cat(parts))
            seen(1)
    return len(todo)


def _vae(config: RunConfig, place: Processes) -> components.Vae | components.PixelSpace:
    model = config.model
    vae = components.load_vae(model.path, config.diffusion, revision=model.revision)
    return vae.to(place.device)


def _encoder(config: RunConfig, place: Processes) -> tuple[PromptEncoder, int]:
    """The text encoders, and how many captions they are given at once."""
    model = config.model
    dtype = getattr(torch, model.dtype)
    encoder = PromptEncoder(model.path, dtype, place.device, revision=model.revision)
    return encoder, 1 if place.device.type == "cpu" else CAPTIONS_AT_ONCE


def _policy(config: RunConfig, place: Processes, rows: Sequence[Example]) -> DiffusionAdapter:
    """The policy as it starts, with a live reference, at the stored draws of these rows."""
    live = config.model_copy(update={"reference": ReferenceConfig()})
    loaded = components.load_components(config.model, config.diffusion)
    policy = DiffusionAdapter(live, Needs(), loaded, stored_draws=True).to(place.device).eval()
    policy.setup(rows)
    return policy


def forecast(planned: Plan, config: RunConfig, needs: Needs) -> str:
    """A sentence on the time that writing what is missing takes on this machine.

    An entry of each kind is computed and timed, not stored. Each part's model is loaded in turn,
    as in writing. Reading images is not in it: threads do that while the VAE works.

    Args:
        planned: What is missing.
        config: The run.
        needs: Of its objective.
    """
    parts: list[str] = []
    total = 0.0
    for part in planned.parts:
        if not part.missing:
            continue
        _, seconds_each = STAGES[part.name]
        seconds = part.missing * seconds_each(config, needs)
        total += seconds
        parts.append(f"{part.name} {duration(seconds)}")
    if not parts:
        return "nothing is left to compute"
    return f"about {duration(total)} on this device ({', '.join(parts)}), by timing one entry each"


def _time_latents(config: RunConfig, needs: Needs) -> float:
    place, side = Processes.launched(), config.diffusion.resolution
    vae, size = _vae(config, place), pictures_at_once((3, side, side), place)
    pixels = torch.zeros(size, 3, side, side, device=place.device)
    return _seconds(lambda: vae.encode(pixels)) / size


def _time_prompts(config: RunConfig, needs: Needs) -> float:
    encoder, size = _encoder(config, Processes.launched())
    return _seconds(lambda: encoder.encode(["an image"] * size)) / size


def _time_errors(config: RunConfig, needs: Needs) -> float:
    rows = load_usable(config, needs)[0][:1]
    if config.diffusion.cache == "on":  # latents and prompts are not written yet either
        settings = config.diffusion.model_copy(update={"cache": "auto"})
        config = config.model_copy(update={"diffusion": settings})
    place, draws = Processes.launched(), config.diffusion.num_draws
    policy = _policy(config, place, rows)
    size = min(draws, config.train.eval_batch_size or config.train.batch_size)
    batch = policy.collate(rows * size, list(range(size))).to(place.device)
    return _seconds(lambda: policy(batch, Needs())) * draws / size


def _seconds(work: Callable[[], object]) -> float:
    """Of a second call; the first one also sets things up."""
    with torch.no_grad():
        for _ in range(2):
            began = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            found = time.perf_counter() - began
    return found


STAGES = {
    "latents": (_write_latents, _time_latents),
    "prompts": (_write_prompts, _time_prompts),
    "reference errors": (_write_errors, _time_errors),
}
"""A plan's parts, what writes them and what times an entry; errors are those of stored latents."""


class DiffusionTools(Tools):
    """The tools of images."""

    unit = "images"
    samples_images = True
    pipeline_tag = "text-to-image"

    def hub_library(self, *, lora: bool) -> str:
        """One library loads both."""
        return "diffusers"

    def problems(self, config: RunConfig) -> list[str]:
        """What the method, the estimator and the model's options ask of each other."""
        problems = methods.check_method(config)
        if config.model.lora is not None and config.model.lora.dropout:
            problems.append(
                f"model.lora.dropout is {config.model.lora.dropout:g}, but with dropout the errors "
                "of policy and reference cannot be compared. Remove it"
            )
        return problems

    def logp_unit(self, config: RunConfig) -> LogpUnit:
        """Errors; those of a sum are as large as an image has elements, and compare with none."""
        settings = config.diffusion
        if settings.reduction == "sum":
            return LogpUnit("errors", None)
        return LogpUnit("errors", settings.logp_scale / 0.5, "diffusion.logp_scale / 0.5")

    def score_tolerance(self, config: RunConfig) -> float:
        """Two passes agree to rounding; a cached error may come from a batch of another size."""
        half = config.model.dtype == "bfloat16" or config.train.mixed_precision == "bf16"
        return 2e-3 if half else 1e-5

    def survey(
        self, config: RunConfig, needs: Needs, parts: Sequence[Sequence[Example]]
    ) -> Surveyed:
        """Without rows whose images cannot be decoded or whose captions are too long."""
        return Surveyed([filter_examples(config, part) for part in parts])

    def eval_examples(self, config: RunConfig, examples: Sequence[Example]) -> list[Example]:
        """Every row at `eval_draws` timesteps, spread evenly over their distribution."""
        num = config.diffusion.eval_draws
        return [
            replace(row, id=f"{row.id}@{k}", meta={**row.meta, TIMESTEP_BIN: (k, num)})
            for row in examples
            for k in range(num)
        ]

    def summarise(self, config: RunConfig, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Implicit accuracy and errors by noise level."""
        return by_timestep(rows, config.diffusion.logp_scale)

    def write_samples(
        self,
        adapter: DiffusionAdapter,
        prompts: Mapping[str, Any],
        folder: Path,
        step: int,
        options: SampleConfig,
    ) -> list[dict[str, Any]]:
        """Images from the same start noise as before training, and a sheet of both."""
        asked = {row: as_text(prompt) for row, prompt in prompts.items()}
        return write_samples(adapter.inputs, adapter.policy, asked, folder, step)

    def write_cache(self, config: RunConfig, needs: Needs) -> str:
        """Store the latents, embeddings and, with reference.kind cached, errors of a run.

        Under several processes each computes the share that follows from the keys.
        """
        check_cacheable(config, needs)
        place = Processes.launched()
        folder = pictures.cache_folder(config)
        with only_writer(folder, "cache", wait=True) if place.is_main else nullcontext():
            place.wait()  # until the main process has the lock for all of them
            if place.is_main:
                sweep(folder)
            if config.diffusion.cache != "off":
                _look(config, needs, place)
            place.wait()
            rows = [row for part in load_usable(config, needs) for row in part]
            planned = plan(config, needs, rows)
            if place.is_main:
                print(planned.text(), file=sys.stderr, flush=True)
            planned.check_room()
            place.wait()  # all planned before anyone writes
            done: dict[str, int] = {}
            for part in planned.parts:
                write, _ = STAGES[part.name]
                done[part.name] = write(config, needs, rows, place)
                place.wait()
            everyone = place.gather(done)
        written = [
            f"{part.name}: {sum(one[part.name] for one in everyone)} written, "
            f"{part.total - part.missing} were there"
            for part in planned.parts
        ]
        latents = config.diffusion.cache != "off" and has_latents(config)
        train = ["diffusion.cache=on"] if latents else []
        train += ["reference.kind=cached"] if caches_errors(config, needs) else []
        advice = f" Train with {' '.join(train)}" if train else ""
        return f"{folder}: {'; '.join(written)}.{advice}"

    def plan_cache(self, config: RunConfig, needs: Needs) -> str:
        """Sizes of latents, prompt embeddings and errors, and the time they take to compute."""
        planned = plan(config, needs)
        return f"{planned.text()}\n{forecast(planned, config, needs)}"

    def show_rows(self, config: RunConfig, examples: Sequence[Example]) -> Any:
        """Captions, files, sizes, crops and labels, for a terminal."""
        from rich.text import Text

        shown = [pictures.describe_row(row, config.diffusion) for row in examples]
        return Text("\n\n".join(shown))
