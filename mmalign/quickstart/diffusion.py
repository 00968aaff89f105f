"""Bolder strokes on handwritten digits: a base trained on the spot, Diffusion-DPO, a report."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from mmalign.quickstart import driver
from mmalign.quickstart.digits import STYLES, ink, prompt, write_means, write_same_noise
from mmalign.quickstart.driver import share
from mmalign.report import Section, blocks, figures, write_report
from mmalign.report.pictures import picture
from mmalign.report.run import read_run

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from matplotlib.axes import Axes
    from torch import nn

    from mmalign.config import RunConfig
    from mmalign.quickstart.digits import Painter, Shown


# Bolder strokes on handwritten digits: a base trained on the spot, Diffusion-DPO, a report.
#
# The base learns real digits. Its own images are ranked by their ink, and pairs of much and
# little ink align it with the project's own loop. Legibility is the guard: a second run with a far
# smaller beta shows what too much looks like, and which number gives warning.

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
    per_digit: int = 48  # images, of which
    kept: int = 16  # of each end become training pairs
    held_out_per_digit: int = 18
    held_out_kept: int = 6
    measured: int = 200  # images before and after
    watched: int = 100  # of them, on the way and with style words
    steps: int | None = None  # of every run, where not the recipe's
    denoising_steps: int = 20  # of every image


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
    """An aligned model: its images, and those of its steps on the way."""

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
        fast: A smoke run: a few steps, a few images. Its numbers mean nothing.

    Returns:
        What `summary.json` holds: `before`, `after`, `too_far`, `seconds`, and how they came about.

    Raises:
        ConfigError: scikit-learn is missing, `output` is not empty, or the run was interrupted.
    """
    from mmalign.quickstart import digits
    from mmalign.quickstart.digits import Painter, each_digit, make, write_pairs

    sizes = FAST if fast else FULL
    real = digits.load()
    demo = driver.Demo("diffusion", output, seed, fast)
    output = demo.output
    driver.one_thread()
    oracle = digits.Oracle(real)
    demo.lap("oracle", "Training a small base model on real handwritten digits ...")
    make(output / "base", seed, sizes.base_steps)
    demo.lap("base", "Drawing images and pairing those of much ink with those of little ...")
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
    demo.lap("pairs", "Aligning ...")
    driver.train_arm(aligned)
    demo.lap("align", "Measuring ...")
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
    demo.lap("measure", "Once more, with a far smaller beta and without an end in sight ...")
    too_far = config(output / "base", TOO_FAR, output / "too_far", seed, sizes)
    driver.train_arm(too_far)
    ruined = measure(too_far, painter, before, sizes.watched, noise)
    demo.lap("too_far")

    return demo.finish(
        {
            "before": before.numbers() | held_out(aligned.output, first=True),
            "after": after.after.numbers() | held_out(aligned.output),
            "too_far": ruined.after.numbers() | held_out(too_far.output),
            "real_ink": digits.ink_of_styles(real),
            "leak": leak,
            "by_step": {
                name: [{"step": step} | shown.numbers() for step, shown in arm.path]
                for name, arm in (("aligned", after), ("too_far", ruined))
            },
        },
        {
            "oracle_accuracy": round(oracle.accuracy, 4),
            "pairs": pairs,
            "num_pictures": sizes.measured,
            "num_watched": sizes.watched,
        },
        lambda result: write(output, result, before, after, ruined),
        lambda result: driver.table("neutral prompts", result, _ARMS, "{:.3f}".format),
    )


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
    from mmalign.quickstart.digits import NAMES, PAIRS, SAMPLING, SIDE, prompt

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
                "cache": "off",  # of 160 images of 64 pixels
                "sampling": {**SAMPLING, "num_steps": sizes.denoising_steps},
            },
            "output": output,
        }
    )


def measure(config: RunConfig, painter: Painter, before: Shown, count: int, noise: int) -> Arm:
    """Images of a run, from the start noise of `before`.

    Args:
        config: Of the finished run.
        painter: Draws them.
        before: Those of the base.
        count: How many of them at the steps before the last.
        noise: Seed of the first image's start noise.
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
    found = driver.evaluation(run_dir, first=first)
    return {
        "held_out_accuracy": round(found["reward_accuracy"], 4),
        "winner_error": float(f"{found['errors/chosen_diff']:.3g}"),
    }


# The page of the diffusion demonstration: ink and legibility together, and what went too far.

_BEFORE, _AFTER, _LEGIBLE, _TOO_FAR = 0, 1, 2, 5  # series colours


def _ink(value: float) -> str:
    return f"{value:.3f}"


def _tiny(value: float) -> str:
    return f"{value:+.2g}".replace("-", "−") if value else "0"


_ROWS = (  # key, what the reader sees, how it is written
    ("ink", "ink of neutral prompts", _ink),
    ("legibility", "legible, says the oracle", share),
    ("winner_error", "winner error minus the reference's, held out", _tiny),
    ("held_out_accuracy", "held-out implicit accuracy", share),
)
_ARMS = ("before", "after", "too_far")


def write(output: Path, result: Mapping[str, Any], before: Shown, after: Arm, ruined: Arm) -> Path:
    """Write `report.html` about the aligned run in `output`, with the ruined one beside it.

    Args:
        output: Folder of the demonstration.
        result: What `summary.json` will hold.
        before: Images of the base.
        after: The aligned model.
        ruined: The same with a beta that is far too small.
    """
    sections = [
        Section("What happened", _what_happened(output, result, before, after)),
        Section("Ink and legibility, step by step", _steps(result, after, ruined)),
        Section("Ink of every image", _histogram(result, before, after)),
        Section("What leaks", _leak(result)),
        Section("Too far", _too_far(output, result, before, after, ruined)),
        Section("What this does not show", _limits(result)),
    ]
    title = "Bolder strokes for a small diffusion model"
    return write_report([after.folder], output / "report.html", title=title, sections=sections)


def _what_happened(output: Path, result: Mapping[str, Any], before: Shown, after: Arm) -> Markup:
    real = result["real_ink"]
    way = (result["after"]["ink"] - result["before"]["ink"]) / (
        result["leak"]["bold"]["before"]["ink"] - result["before"]["ink"]
    )
    file, means = output / "before_after.png", output / "means.png"
    write_same_noise(file, 20, 5, {"before": before, "after": after.after})
    write_means(means, before, after.after)
    error = 100 * math.sqrt(0.04 * 0.96 / result["num_pictures"])
    return Markup().join(
        [
            blocks.paragraph(
                "A diffusion model of 1 million parameters learned real handwritten digits. It "
                f"then drew digits itself, and {result['pairs']['pairs']} pairs of its own "
                "images, much ink (preferred) against little (rejected), aligned it with "
                "Diffusion-DPO: every weight of the U-Net, reference and text encoder frozen. "
                "The prompts say nothing of strokes."
            ),
            driver.smoke(result, "a base that learned next to nothing"),
            picture(file, "Same prompt, same start noise, before and after; below each its ink"),
            blocks.paragraph(
                "In the mean over all images of a digit chance is gone, and what is left is what "
                "was learned: red is where ink was gained, blue where it was lost."
            ),
            picture(means, "Mean of all images of a digit, before and after, and the change"),
            driver.arm_table(
                result,
                _ARMS,
                _ROWS,
                f"{result['num_pictures']} images of neutral prompts from the same start noise "
                f"each, seed {result['seed']}. Standard error of a legibility near 96 %: "
                f"{error:.1f} points.",
            ),
            blocks.paragraph(
                f"Real digits have {real['light']:.3f} of ink in their lightest third, "
                f"{real['medium']:.3f} in the middle and {real['bold']:.3f} in the boldest. "
                "Aligned, neutral prompts went "
                f"{100 * way:.0f} % of the way to what the base draws when the prompt says "
                "“bold”."
            ),
            driver.took(result),
        ]
    )


def _steps(result: Mapping[str, Any], after: Arm, ruined: Arm) -> Markup:
    return Markup().join(
        [
            blocks.paragraph(
                "More ink is what was asked for; legibility is the guard, measured by an oracle "
                f"that names {100 * result['oracle_accuracy']:.1f} % of unseen real digits. "
                "Below them is the winner error: how much worse than the reference the model "
                "explains the preferred images. In the red band it explains them worse than "
                "before training, and legibility falls soon after. Thin: training batches, each at "
                "other noise levels; points: held-out pairs."
            ),
            blocks.figures(
                [
                    blocks.figure(_path(after), "Aligned: beta 20000, learning rate falling"),
                    blocks.figure(_path(ruined), "Too far: beta 200, learning rate 1e-4"),
                ]
            ),
        ]
    )


def _path(arm: Arm) -> Markup:
    """Ink, legibility and winner error of one run over its steps, in one image."""
    run = read_run(arm.folder)
    steps = [step for step, _ in arm.path]
    inks = [shown.ink for _, shown in arm.path]
    legible = [100 * shown.legibility for _, shown in arm.path]
    train, held = (run.series("errors/chosen_diff", held_out=out) for out in (False, True))

    def draw(axes: Axes) -> None:
        figure: Any = axes.figure
        axes.remove()
        top, middle, low = figure.subplots(3, 1, sharex=True, height_ratios=(1, 1, 1.2))
        top.plot(steps, inks, marker="o", color=figures.colour(_AFTER))
        top.set_ylabel("ink")
        top.set_ylim(0.3, 0.42)
        middle.plot(steps, legible, marker="o", color=figures.colour(_LEGIBLE))
        middle.set_ylabel("legible, %")
        middle.set_ylim(min(50.0, *legible) - 3, 103)
        low.plot(*train, color=figures.colour(_BEFORE), linewidth=0.8, alpha=0.6)
        low.plot(*held, "o", color=figures.colour(_BEFORE))
        low.set_ylabel("winner error")
        bottom, height = low.get_ylim()
        height = max(height, 0.2 * (height - bottom))
        low.axhspan(0.0, height, color=figures.colour(_TOO_FAR), alpha=0.13, linewidth=0)
        low.set_ylim(bottom, height)
        low.set_xlabel("optimizer step")
        figure.align_ylabels()

    return figures.svg(
        draw,
        alt=f"Ink from {inks[0]:.3f} to {inks[-1]:.3f}, legibility from {legible[0]:.0f} to "
        f"{legible[-1]:.0f} %, held-out winner error ending at {held[1][-1]:.2g}",
        size=(4.7, 4.6),
    )


def _histogram(result: Mapping[str, Any], before: Shown, after: Arm) -> Markup:
    amounts = {"before": ink(before.pixels), "after": ink(after.after.pixels)}
    both = np.concatenate(list(amounts.values()))
    bins = np.linspace(both.min(), both.max() + 1e-6, 22).tolist()

    def draw(axes: Axes) -> None:
        for index, (label, amount) in enumerate(amounts.items()):
            colour = figures.colour((_BEFORE, _AFTER)[index])
            axes.hist(
                amount, bins=bins, histtype="stepfilled", alpha=0.25, color=colour, linewidth=0
            )
            axes.hist(amount, bins=bins, histtype="step", linewidth=1.8, color=colour, label=label)
        _, height = axes.get_ylim()
        axes.set_ylim(0, 1.18 * height)
        for style in STYLES:
            mean = result["real_ink"][style]
            axes.axvline(mean, color=figures.colour(_LEGIBLE), linestyle=(0, (2, 2)), linewidth=1.2)
            axes.text(mean, 1.1 * height, style, ha="center", color=figures.colour(_LEGIBLE))
        axes.set_xlabel("ink, mean of the pixels")
        axes.set_ylabel("images")
        axes.legend(loc="upper right")

    means = ", ".join(f"{label} {amount.mean():.3f}" for label, amount in amounts.items())
    return blocks.figure(
        figures.svg(draw, alt=f"Histogram of ink; means: {means}", size=(5.6, 2.9)),
        "Ink of the images of neutral prompts",
        "Dashed: mean ink of real digits in each third of their kind. Digits differ in ink by "
        "themselves (a one has little), so both histograms are wide.",
    )


def _leak(result: Mapping[str, Any]) -> Markup:
    kinds = {"neutral": {"before": result["before"], "after": result["after"]}, **result["leak"]}
    rows: list[list[object]] = []
    for kind, arms in kinds.items():
        example = prompt(7, "" if kind == "neutral" else kind)
        rows.append(
            [
                Markup("{} <small>{}</small>").format(kind, example),
                *(
                    form(arms[arm][key])
                    for key, form in (("ink", _ink), ("legibility", share))
                    for arm in ("before", "after")
                ),
            ]
        )
    return Markup().join(
        [
            blocks.paragraph(
                "Only neutral prompts were trained on. Prompts with a style word move too: "
                "alignment is not confined to the prompts of the pairs."
            ),
            blocks.table(
                ["prompts", "ink before", "ink after", "legible before", "legible after"],
                rows,
                f"{result['num_watched']} images for each style word, the same start noise "
                "everywhere.",
            ),
        ]
    )


def _too_far(
    output: Path, result: Mapping[str, Any], before: Shown, after: Arm, ruined: Arm
) -> Markup:
    file = output / "too_far.png"
    write_same_noise(
        file, 9, 3, {"before": before, "aligned": after.after, "too far": ruined.after}
    )
    good, bad = result["after"], result["too_far"]
    accuracies, errors = (
        f"{form(good[key])} in the good run, {form(bad[key])} in this one"
        for key, form in (("held_out_accuracy", share), ("winner_error", _tiny))
    )
    return Markup().join(
        [
            blocks.paragraph(
                "The same pairs with beta 200 in place of 20000 and a learning rate of 1e-4 that "
                f"does not fall, for {ruined.path[-1][0]} steps. The ink is {bad['ink']:.3f} "
                f"(aligned {good['ink']:.3f}), but {100 * (1 - bad['legibility']):.0f} % of the "
                f"images are no longer legible. Implicit accuracy ({accuracies}) does not tell "
                f"the two apart. The winner error does: {errors}."
            ),
            picture(file, "Same prompt, same start noise, under all three models"),
        ]
    )


def _limits(result: Mapping[str, Any]) -> Markup:
    notes = [
        "Ink is counted, not judged: no person preferred anything here. Pairs of people's choices "
        "are less consistent, and what they want is not one number.",
        "The oracle learned from the same 1,797 images as the base. It says whether an image "
        "looks like its digit to a support vector machine, not whether it is beautiful.",
        "There are ten neutral prompts, all trained on: images are held out, prompts are not.",
        f"With {result['num_pictures']} images one is {100 / result['num_pictures']:.1f} points "
        "of legibility. Read the direction, not the decimals.",
        "The base can draw bold digits already when asked to. Alignment changed what it draws when "
        "nobody asks; it taught it nothing new.",
        "The winner error is a mean over noise levels. By level, further down, it can be below 0 "
        "where little noise is and above 0 where much is. The held-out loss rises early and says "
        "little: with a large beta a few pairs that are still ranked wrongly outweigh all others.",
        "Imitation alone, of the inky images and without the others, gets nearly as far with no "
        "loss of legibility: ink +0.024 against +0.026 in three other runs, 99.5 % legible against "
        "97.3 % (docs/diffusion_methods.md). The claim is that preferences move the model where "
        "they point, not that DPO beats fine-tuning on images that are good already.",
        "It is a model of 8 x 8 pixels without latents. Learning rates, and how soon it breaks, "
        "are its own; the signs to watch are not.",
    ]
    return driver.bullets(notes)
