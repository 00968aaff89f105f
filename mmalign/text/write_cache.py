"""Writing what the reference says about every row, for runs with `reference.kind: cached`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mmalign.data.lock import only_writer
from mmalign.errors import ConfigError
from mmalign.models.adapter import load_usable
from mmalign.text import dates
from mmalign.text.cached import ReferenceCache, cache_folder, check_cacheable

if TYPE_CHECKING:
    from collections.abc import Callable

    from mmalign.config import RunConfig
    from mmalign.core import Needs
    from mmalign.text.token_adapter import TokenAdapter


def write_reference(
    config: RunConfig, needs: Needs, build: Callable[[RunConfig, Needs], TokenAdapter]
) -> str:
    """Store what the reference says about every row of a config; rows that are there stay.

    Args:
        config: The run's configuration.
        needs: Of its objective.
        build: Makes the adapter.

    Returns:
        What was done, as a sentence.

    Raises:
        ConfigError: A reference that no cache can hold.
    """
    reference = config.reference
    if not needs.reference:
        raise ConfigError("cache: the objective reads no reference, so there is nothing to store")
    if reference.kind in ("ema", "mixture") or reference.path is not None:
        raise ConfigError(
            "cache: it holds the model that training starts from as the reference; "
            f"reference.{'path' if reference.path else 'kind'} asks for another"
        )
    check_cacheable(config, needs)
    with only_writer(cache_folder(config), "cache", wait=True):
        return _write(config, needs, build)


def _write(
    config: RunConfig, needs: Needs, build: Callable[[RunConfig, Needs], TokenAdapter]
) -> str:
    from accelerate import Accelerator
    from rich.console import Console
    from rich.progress import track

    from mmalign.config import ReferenceConfig

    config = dates.settle(config, for_cache=True)
    dates.keep(config)
    rows = [row for part in load_usable(config, needs) for row in part]
    device = Accelerator().device
    live = config.model_copy(update={"reference": ReferenceConfig()})
    adapter = build(live, needs).to(device).eval()
    cache = ReferenceCache(config, adapter.encoder, needs)
    cache.store.sweep()
    absent = set(cache.store.missing(map(cache.key, rows), read=True))
    cache.store.repair()
    todo = [row for row in rows if cache.key(row) in absent]
    size = config.train.eval_batch_size or config.train.batch_size
    half = config.train.mixed_precision == "bf16"
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=half)
    console = Console(stderr=True)
    with cache.store:
        for start in track(
            range(0, len(todo), size), "reference", console=console, disable=not console.is_terminal
        ):
            part = todo[start : start + size]
            batch = adapter.collate(part).to(device)
            with autocast:  # as a run scores its policy
                values = adapter.reference_values(batch, needs)[cache.name]  # [B, K, L, ...]
            lengths = batch.inputs["response_mask"].sum(-1).amax(1).tolist()  # [B]
            for row, value, length in zip(part, values, lengths, strict=True):
                cache.put(row, value[:, :length])
    return (
        f"{cache.store.folder}: {len(todo)} rows written, {len(rows) - len(todo)} were there. "
        "Train with reference.kind=cached"
    )
