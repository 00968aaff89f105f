"""Bolder strokes on handwritten digits: a base trained on the spot, Diffusion-DPO, a report.

The base learns real digits. Its own pictures are ranked by their ink, and pairs of much and little
ink align it with the project's own loop. Legibility is the guard: a second run with a far smaller
beta shows what too much looks like, and which number gives warning.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmalign import __version__
from mmalign.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import nn

    from mmalign.config import RunConfig
    from mmalign.quickstart.digits_pairs import Painter, Shown

_SEEDS = 1_000_000  # start noises apart from those of another seed
_TRAINING, _HELD_OUT, _MEASURING = 0, 100_000, 200_000  # and those of the stages
STYLED = ("light", "bold")
"""Words in a prompt that were never aligned: what moves there has leaked."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """An alignment run: full fine-tuning of the U-Net with Diffusion-DPO."""

    beta: float
    lr: float
    schedule: str
    num_steps: int
    every: int  # steps between evaluations, and between weights that are kept


ALIGNED = Recipe(beta=20000.0, lr=2e-5, schedule="linear", num_steps=100, every=20)
TOO_FAR = Recipe(beta=200.0, lr=1e-4, schedule="constant", num_steps=50, every=25)


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything; the defaults are those of the proven recipe."""

    base_steps: int = 700
    batch_size: int = 32  # pairs
    per_digit: int = 48  # pictures, of which
    kept: int = 16  # of each end become training pairs
    held_out_per_digit: int = 18
    held_out_kept: int = 6
    measured: int = 200  # pictures before and after
    watched: int = 100  # of them, on the way and with style words
    steps: int | None = None  # of every run, where not the recipe's
    denoising_steps: int = 20  # of every picture


FULL = Sizes()
FAST = Sizes(
    base_steps=6,
    batch_size=4,
    per_digit=2,
    kept=1,
    held_out_per_digit=2,
    held_out_kept=1,
    measured=20,
    watched=10,
    steps=2,
    denoising_steps=2,
)


@dataclass(frozen=True, slots=True)
class Arm:
    """An aligned model: its pictures, and those of its steps on the way."""

    folder: Path
    model: nn.Module
    after: Shown
    path: tuple[tuple[int, Shown], ...]  # from step 0 on


def run(output: Path | None = None, seed: int = 0, fast: bool = False) -> dict[str, Any]:
    """Train a base, align it, measure ink and legibility before and after, write a report.

    Args:
        output: Folder for `base/`, `pairs/`, `aligned/`, `too_far/`, `report.html` and
            `summary.json`; by default runs/quickstart-diffusion, or the first name with a number
            behind it that is free.
        seed: Decides the base, the pairs, the order of the rows and all noise.
        fast: A smoke run: a few steps, a few pictures. Its numbers mean nothing.

    Returns:
        What `summary.json` holds: `before`, `after`, `too_far`, `seconds`, and how they came about.

    Raises:
        ConfigError: scikit-learn is missing, `output` is not empty, or the run was interrupted.
    """
    from mmalign.quickstart import digits
    from mmalign.quickstart.diffusion_report import write
    from mmalign.quickstart.digits_base import make
    from mmalign.quickstart.digits_pairs import Painter, each_digit, write_pairs
    from mmalign.quickstart.folder import free_folder
    from mmalign.train.files import write_text

    began = clock = time.perf_counter()
    stages: dict[str, float] = {}
    sizes = FAST if fast else FULL

    def lap(stage: str, upcoming: str = "") -> None:
        nonlocal clock
        stages[stage], clock = round(time.perf_counter() - clock, 1), time.perf_counter()
        if upcoming:
            print(upcoming, flush=True)

    real = digits.load()
    output = free_folder(output, "quickstart-diffusion")
    one_thread()
    oracle = digits.Oracle(real)
    lap("oracle", "Training a small base model on real handwritten digits ...")
    make(output / "base", seed, sizes.base_steps)
    lap("base", "Drawing pictures and pairing those of much ink with those of little ...")
    aligned = config(output / "base", ALIGNED, output / "aligned", seed, sizes)
    painter = Painter(aligned, oracle)
    first = seed * _SEEDS
    pairs = write_pairs(
        output / "pairs" / "train", painter, first + _TRAINING, sizes.per_digit, sizes.kept
    )
    write_pairs(
        output / "pairs" / "eval",
        painter,
        first + _HELD_OUT,
        sizes.held_out_per_digit,
        sizes.held_out_kept,
    )
    lap("pairs", "Aligning ...")
    train_arm(aligned)
    lap("align", "Measuring ...")
    noise = first + _MEASURING
    before = painter.paint(painter.base, each_digit(sizes.measured), noise)
    after = measure(aligned, painter, before, sizes.watched, noise)
    leak = {
        style: {
            when: painter.paint(model, each_digit(sizes.watched), noise, style=style).numbers()
            for when, model in (("before", painter.base), ("after", after.model))
        }
        for style in STYLED
    }
    lap("measure", "Once more, with a far smaller beta and without an end in sight ...")
    too_far = config(output / "base", TOO_FAR, output / "too_far", seed, sizes)
    train_arm(too_far)
    ruined = measure(too_far, painter, before, sizes.watched, noise)
    lap("too_far")

    result: dict[str, Any] = {
        "before": before.numbers() | held_out(aligned.output, first=True),
        "after": after.after.numbers() | held_out(aligned.output),
        "too_far": ruined.after.numbers() | held_out(too_far.output),
        "real_ink": digits.ink_of_styles(real),
        "leak": leak,
        "by_step": {
            name: [{"step": step} | shown.numbers() for step, shown in arm.path]
            for name, arm in (("aligned", after), ("too_far", ruined))
        },
        "seconds": round(time.perf_counter() - began, 1),
        "stages": stages,
        "quickstart": "diffusion",
        "oracle_accuracy": round(oracle.accuracy, 4),
        "pairs": pairs,
        "num_pictures": sizes.measured,
        "num_watched": sizes.watched,
        "seed": seed,
        "fast": fast,
        "mmalign": __version__,
    }
    write(output, result, before, after, ruined)
    lap("report")
    result["seconds"] = round(time.perf_counter() - began, 1)
    write_text(output / "summary.json", json.dumps(result, indent=2) + "\n")
    print(_table(result) + f"\nReport: {output / 'report.html'}  ({result['seconds']} s)")
    return result


def one_thread() -> None:
    """A second thread makes networks this small slower, not faster."""
    import torch

    torch.set_num_threads(1)


def config(base: Path, recipe: Recipe, output: Path, seed: int, sizes: Sizes = FULL) -> RunConfig:
    """The run of a recipe.

    Args:
        base: The pipeline folder.
        recipe: Objective, learning rate, steps.
        output: Folder of the run; the pairs are in `pairs/` beside it.
        seed: Of the order of the rows and their noise.
        sizes: Rows a step, and the steps of a smoke run.
    """
    from mmalign.config import RunConfig
    from mmalign.quickstart.digits import NAMES, SIDE, prompt
    from mmalign.quickstart.digits_pairs import PAIRS, SAMPLING

    pairs = output.parent / "pairs"
    every = recipe.every if sizes.steps is None else 1
    num_steps = sizes.steps or recipe.num_steps
    return RunConfig.model_validate(
        {
            "modality": "diffusion",
            "model": {"path": str(base)},
            "data": {
                "train": {"path": str(pairs / "train" / PAIRS)},
                "eval": {"path": str(pairs / "eval" / PAIRS)},
            },
            "objective": {"name": "diffusion_dpo", "beta": recipe.beta},
            "train": {
                "batch_size": sizes.batch_size,
                "eval_batch_size": 60,
                "num_steps": num_steps,
                "lr": recipe.lr,
                "check_settings": False,  # of a model far smaller than any that was published
                "schedule": recipe.schedule,
                "warmup": min(10, num_steps - 1),
                "eval_every": every,
                "save_every": every,
                "keep_checkpoints": num_steps // every,
                "num_threads": 1,
                "seed": seed,
            },
            "sample": {"prompts": [prompt(digit) for digit in range(len(NAMES))]},
            "diffusion": {
                "resolution": SIDE,
                "eval_draws": 6,
                "cache": "off",  # of 160 pictures of 64 pixels
                "sampling": {**SAMPLING, "num_steps": sizes.denoising_steps},
            },
            "output": output,
        }
    )


def train_arm(config: RunConfig) -> None:
    """Run the project's loop to its end.

    Raises:
        ConfigError: It was interrupted.
    """
    from mmalign.train.loop import train

    if train(config).stopped:
        raise ConfigError("the quickstart was interrupted; start it again, it takes a new folder")


def measure(config: RunConfig, painter: Painter, before: Shown, count: int, noise: int) -> Arm:
    """Pictures of a run, from the start noise of `before`.

    Args:
        config: Of the finished run.
        painter: Draws them.
        before: Those of the base.
        count: How many of them at the steps before the last.
        noise: Seed of the first picture's start noise.
    """
    from mmalign.core import Needs
    from mmalign.inference import restore
    from mmalign.models.adapter import build_adapter
    from mmalign.train.checkpoint import checkpoints

    adapter: Any = build_adapter(config, Needs()).eval()
    kept = checkpoints(config.output)
    path = [(0, before.first(count))]
    shown = before
    for folder in kept:
        restore(adapter, folder)
        digits = before.digits if folder == kept[-1] else before.digits[:count]
        shown = painter.paint(adapter.policy, digits, noise)
        path.append((int(folder.name.split("-")[-1]), shown.first(count)))
    return Arm(config.output, adapter.policy, shown, tuple(path))


def held_out(run_dir: Path, *, first: bool = False) -> dict[str, float]:
    """What the run's own evaluation says of the held-out pairs."""
    from mmalign.train.metrics import read_json

    evaluation = read_json(run_dir / "eval.jsonl")[0 if first else -1]
    return {
        "held_out_accuracy": round(evaluation["reward_accuracy"], 4),
        "winner_error": float(f"{evaluation['errors/chosen_diff']:.3g}"),
    }


def _table(result: Mapping[str, Any]) -> str:
    arms = ("before", "after", "too_far")
    lines = [f"{'neutral prompts':<22}" + "".join(f"{a.replace('_', ' '):>10}" for a in arms)]
    for key in result["before"]:
        cells = "".join(f"{result[arm][key]:>10.3f}" for arm in arms)
        lines.append(f"{key.replace('_', ' '):<22}{cells}")
    return "\n".join(lines)
