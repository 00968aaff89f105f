"""What `mmalign sample` does with a model of pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image

    from mmalign.config import RunConfig
    from mmalign.data.example import Prompt

SAMPLES, GRID = "samples.jsonl", "grid.png"
_COLUMNS = 4


def sample_pictures(
    config: RunConfig,
    prompts: Sequence[Prompt],
    checkpoint: Path | None,
    out: Path | None,
    *,
    base: bool = False,
    seeds: str | None = None,
    columns: int | None = None,
) -> list[dict[str, Any]]:
    """Generate pictures with the config's `diffusion.sampling`, and write them as files.

    `out` gets ID.png for each picture, samples.jsonl with a record each, and grid.png with all.

    Args:
        config: The run's configuration.
        prompts: One picture each, or one for each seed.
        checkpoint: A `checkpoint-N` or `final` folder; None for the newest of `config.output`.
        out: Folder to write to.
        base: Use the model as it was before training.
        seeds: Numbers with commas between, for several pictures a prompt. None: one picture a
            prompt, the first with `diffusion.sampling.seed`, each next one with the next number.
        columns: Pictures in a row of the grid; by default one prompt's, or four.

    Returns:
        The records: id, prompt, seed, image (file name in `out`), weights and settings.

    Raises:
        ConfigError: No folder, seeds that are no numbers, or settings that exclude each other.
    """
    from rich.console import Console
    from rich.progress import track

    from mmalign.data.example import as_text
    from mmalign.diffusion.negative import load_negative
    from mmalign.diffusion.sheets import grid, shown, write_picture
    from mmalign.offline import trained_adapter
    from mmalign.train.files import write_text

    if out is None:
        raise ConfigError("sample: name a folder for the pictures with --out DIR")
    if columns is not None and columns < 1:
        raise ConfigError(f"sample: --grid is {columns}; it is a number of columns, 1 or more")
    spec = config.diffusion.sampling
    chosen = _numbers(seeds)
    asked = [
        (as_text(prompt), seed)
        for i, prompt in enumerate(prompts)
        for seed in (chosen or [spec.seed + i])
    ]
    adapter: Any = trained_adapter(config, checkpoint, base=base)
    negative = load_negative(spec, config.model, adapter.policy)
    weights = "base" if base else str(checkpoint or config.output)
    settings = spec.model_dump(mode="json", exclude={"seed"})
    size = config.train.eval_batch_size or config.train.batch_size
    console = Console(stderr=True)
    records: list[dict[str, Any]] = []
    small: list[Image] = []
    for start in track(
        range(0, len(asked), size), "pictures", console=console, disable=not console.is_terminal
    ):
        part = asked[start : start + size]
        images = adapter.sample(
            [prompt for prompt, _ in part],
            seeds=[seed for _, seed in part],
            negative_model=negative,
            batch_size=size,
        )
        for (prompt, seed), image in zip(part, images, strict=True):
            name = _name(len(records), len(chosen), seed)
            write_picture(image, out / f"{name}.png")
            small.append(shown(image))
            record = {"id": name, "prompt": prompt, "seed": seed, "image": f"{name}.png"}
            records.append({**record, "weights": weights, "settings": settings})
    write_picture(
        grid(small, columns or len(chosen) or _COLUMNS, [prompt for prompt, _ in asked]),
        out / GRID,
    )
    write_text(out / SAMPLES, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    return records


def _numbers(seeds: str | None) -> list[int]:
    if seeds is None:
        return []
    try:
        found = [int(part) for part in seeds.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 0 or len(set(found)) < len(found):
        raise ConfigError(
            f"sample: --seeds is {seeds!r}; write different whole numbers from 0 on, e.g. 0,1,2"
        )
    return found


def _name(index: int, num_seeds: int, seed: int) -> str:
    """Number of the prompt, and the seed where a prompt has several; the same for every model."""
    if not num_seeds:
        return f"{index:04d}"
    return f"{index // num_seeds:04d}-{seed}"
