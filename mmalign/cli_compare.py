"""`mmalign compare`, and what it shares with `mmalign data score`: scorers and how far they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmalign.cli_parts import argument, option, say
from mmalign.errors import ConfigError

if TYPE_CHECKING:
    from mmalign.diffusion.scorers import Scorer

Scorers = Annotated[
    list[str],
    option(
        "--scorer",
        metavar="NAME[=DIR]",
        text="clip, pickscore, hps-v2, hps-v2.1, aesthetic or image-reward; repeat it; "
        "weights come from the hub, or from DIR",
    ),
]
BatchSize = Annotated[
    int, typer.Option("--batch-size", metavar="N", min=1, help="rows or prompts at one time")
]
Device = Annotated[
    str | None, option("--device", metavar="NAME", text="by default the GPU where there is one")
]
DTYPES = ("float32", "bfloat16", "float16")
Dtype = Annotated[
    str, typer.Option("--dtype", metavar="NAME", help="of the networks: " + ", ".join(DTYPES))
]


def register(app: typer.Typer) -> None:
    """Add the command to the one that has commands."""
    app.command("compare", short_help="Win rate of two folders of same-seed pictures.")(compare)


def compare(
    folder_a: Annotated[Path, argument("DIR_A", "pictures of the one model")],
    folder_b: Annotated[Path, argument("DIR_B", "of the other, with the same file names")],
    scorer: Scorers,
    out: Annotated[
        Path | None,
        option("--out", metavar="FILE", text="write a summary as JSON, rows beside it as JSONL"),
    ] = None,
    prompts: Annotated[
        Path | None,
        option(
            "--prompts",
            metavar="FILE",
            text="JSONL with `image` and `prompt`, for folders without samples.jsonl",
        ),
    ] = None,
    batch_size: BatchSize = 16,
    device: Device = None,
    dtype: Dtype = "float32",
) -> None:
    """Score the pictures of two models for the same prompts and seeds, and say who wins.

    For example: mmalign compare samples/dpo samples/base --scorer pickscore --out compare.json
    """
    from mmalign.diffusion import compare as comparing
    from mmalign.diffusion.sampled import same_samples

    if out is not None and out.suffix != ".json":
        raise ConfigError(f"--out {out}: must end in .json; the rows go beside it, to .jsonl")
    # What is wrong with the command is told before weights of gigabytes are read.
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
        CheckpointError: Weights that are not to be had.
    """
    import torch

    from mmalign.diffusion.scorers import load_scorer

    parsed = parse_scorers(asked, dtype)
    kind = getattr(torch, dtype)
    return {name: load_scorer(name, path, device, kind) for name, path in parsed.items()}


@contextmanager
def shown(what: str) -> Iterator[Callable[[int, int], Any]]:
    """A progress bar on a terminal, nothing elsewhere; told how many more are done, of how many."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, advance=done, total=total)
