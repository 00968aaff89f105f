"""`mmalign sample` and `mmalign compare` for image models, and the scorers that both name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mmalign.cli.parts import argument, option, say, setting, shown
from mmalign.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image

    from mmalign.config import RunConfig
    from mmalign.data.example import Prompt
    from mmalign.diffusion.scorers import Scorer


_SCORER = option(
    "--scorer NAME[=DIR]",
    "clip, pickscore, hps-v2, hps-v2.1, aesthetic or image-reward; repeat it; "
    "weights come from the hub, or from DIR",
)
Scorers = Annotated[list[str], _SCORER]
ScorersIfAny = Annotated[list[str] | None, _SCORER]
BatchSize = Annotated[int, setting("--batch-size N", "rows or prompts at one time", min=1)]
Device = Annotated[str | None, option("--device NAME", "by default the GPU where there is one")]
DTYPES = ("float32", "bfloat16", "float16")
Dtype = Annotated[str, setting("--dtype NAME", "of the networks: " + ", ".join(DTYPES))]


def compare(
    folder_a: Annotated[Path, argument("DIR_A", "images of the one model")],
    folder_b: Annotated[Path, argument("DIR_B", "of the other, with the same file names")],
    scorer: Scorers,
    out: Annotated[
        Path | None, option("--out FILE", "write a summary as JSON, rows beside it as JSONL")
    ] = None,
    prompts: Annotated[
        Path | None,
        option(
            "--prompts FILE", "JSONL with `image` and `prompt`, for folders without samples.jsonl"
        ),
    ] = None,
    batch_size: BatchSize = 16,
    device: Device = None,
    dtype: Dtype = "float32",
) -> None:
    """Score the images of two models for the same prompts and seeds, and say who wins.

    For example: mmalign compare samples/dpo samples/base --scorer pickscore --out compare.json
    """
    from mmalign.diffusion import compare as comparing
    from mmalign.diffusion.compare import same_samples

    if out is not None and out.suffix != ".json":
        raise ConfigError(f"--out {out}: must end in .json; the rows go beside it, to .jsonl")
    # Errors of the command are reported before gigabytes of weights are read.
    parse_scorers(scorer, dtype)
    same_samples(folder_a, folder_b, prompts)
    with shown("compare") as progress:
        found = comparing.compare(
            folder_a,
            folder_b,
            load_scorers(scorer, device, dtype),
            prompts=prompts,
            batch_size=batch_size,
            progress=progress,
        )
    say(found.text())
    if out is not None:
        say(f"summary: {out}\nrows:    {found.write(out)}")


def parse_scorers(asked: list[str], dtype: str) -> dict[str, str | None]:
    """The scorers of `--scorer` as name to local weights, in the order they were given.

    Raises:
        ConfigError: An unknown scorer or dtype, or a scorer twice.
    """
    from mmalign.diffusion.scorers import parse_scorer

    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: must be one of {', '.join(DTYPES)}")
    parsed = dict(map(parse_scorer, asked))
    if len(parsed) < len(asked):
        raise ConfigError(f"--scorer: {', '.join(asked)} names one scorer twice")
    return parsed


def load_scorers(asked: list[str], device: str | None, dtype: str) -> dict[str, Scorer]:
    """The scorers of `--scorer` with their weights.

    Raises:
        ConfigError: As `parse_scorers`.
        CheckpointError: Weights are unavailable.
    """
    import torch

    from mmalign.diffusion.scorers import load_scorer

    parsed = parse_scorers(asked, dtype)
    kind = getattr(torch, dtype)
    return {name: load_scorer(name, path, device, kind) for name, path in parsed.items()}


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
    """Generate images with the config's `diffusion.sampling`, and write them as files.

    `out` gets ID.png for each image, samples.jsonl with a record each (id, prompt, seed, image,
    weights and settings; they are returned too), and grid.png with all. With `seeds`, numbers with
    commas between, each prompt has an image for each; else its number is added to
    `diffusion.sampling.seed`. A row of the grid has `columns`, by default one prompt's or four.

    Raises:
        ConfigError: No folder, seeds that are no numbers, or settings that exclude each other.
    """
    from mmalign.data.example import as_text
    from mmalign.data.jobs import write_lines
    from mmalign.data.sheet import fitted, grid, write_image
    from mmalign.diffusion.sample import load_negative
    from mmalign.inference import trained_adapter

    if out is None:
        raise ConfigError("sample: name a folder for the images with --out DIR")
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
    records: list[dict[str, Any]] = []
    small: list[Image] = []
    with shown("images") as progress:
        for start in range(0, len(asked), size):
            part = asked[start : start + size]
            texts, numbers = map(list, zip(*part, strict=True))
            images = adapter.sample(texts, seeds=numbers, negative_model=negative, batch_size=size)
            for (prompt, seed), image in zip(part, images, strict=True):
                name = _name(len(records), len(chosen), seed)
                write_image(image, out / f"{name}.png")
                small.append(fitted(image))
                record = {"id": name, "prompt": prompt, "seed": seed, "image": f"{name}.png"}
                records.append({**record, "weights": weights, "settings": settings})
            progress(len(part), len(asked))
    write_image(
        grid(small, columns or len(chosen) or _COLUMNS, [prompt for prompt, _ in asked]),
        out / GRID,
    )
    write_lines(out / SAMPLES, records)
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
