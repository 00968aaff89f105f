"""Inkier digits, from pairs in which both images have little ink: nothing to imitate.

Of the base's own images of each digit the less inky half becomes pairs, in each of which the inkier
image is preferred. The preferred images have less ink than the base draws by itself, so that ink is
gained by whoever learns the comparison and by nobody who imitates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from mmalign.config import RunConfig
from mmalign.quickstart import driver
from mmalign.report import Section, blocks, figures, write_report
from mmalign.report.pictures import picture
from mmalign.stats import bootstrap_interval, share_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from mmalign.quickstart.digits import Shown

OBJECTIVES: dict[str, dict[str, Any]] = {
    "sft": {"name": "sft"},  # the control: imitation of the preferred images
    "dpo": {"name": "diffusion_dpo", "beta": 20000.0},
}
ARMS = ("base", *OBJECTIVES)
_SEEDS = 1_000_000  # start noises apart from those of another seed
_MEASURING = 200_000  # and those of measuring from those of the pairs
_PLAN = {"load": 3.0, "draw": 30.0, "train": 36.0, "measure": 17.0, "report": 2.0}


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything."""

    drawn: int = 80  # images of each digit, of which the less inky half become pairs
    held_out: int = 4  # pairs of each digit
    steps: int = 60
    batch_size: int = 32  # pairs
    measured: int = 200  # images of each model
    denoising_steps: int = 20


FULL = Sizes()
FAST = Sizes(drawn=8, held_out=1, steps=2, batch_size=4, measured=20, denoising_steps=2)


@driver.interruptible()
def run(output: Path | None = None, seed: int = 0, fast: bool = False) -> dict[str, Any]:
    """Draw pairs, train DPO and imitation on them, measure ink and legibility, write a report.

    Args:
        output: Folder for `pairs/`, `dpo/`, `sft/`, `report.html` and `summary.json`; by default
            runs/quickstart-diffusion, or the first name with a number behind it that is free.
        seed: Decides the pairs, the order of the rows and all noise.
        fast: A smoke run: a few steps, a few images. Its numbers mean nothing.

    Returns:
        What `summary.json` holds: `base`, `sft`, `dpo`, `seconds`, and how they came about.

    Raises:
        ConfigError: scikit-learn is missing, `output` is not empty, or the run was interrupted.
    """
    driver.require("sklearn", "tells digits apart")
    demo = driver.Demo("diffusion", output, seed, fast, _PLAN)
    demo.stage("load", "Loading handwritten digits, and who tells them apart")
    from mmalign.quickstart import digits

    sizes = FAST if fast else FULL
    oracle = digits.Oracle(digits.load())
    output = demo.output
    file = output / "pairs" / digits.PAIRS
    configs = {arm: config(file, arm, output / arm, seed, sizes) for arm in OBJECTIVES}

    def paint(arms: Sequence[str], each: int, first_seed: int) -> list[Shown]:
        """Images of each arm, from the same start noises."""
        asked = digits.each_digit(each)
        jobs = [
            digits.Painting(
                configs["dpo"],
                None if arm == "base" else output / arm / "final",
                asked[start : start + digits.AT_ONCE],
                range(first_seed + start, first_seed + min(each, start + digits.AT_ONCE)),
            )
            for arm in arms
            for start in range(0, each, digits.AT_ONCE)
        ]
        parts = demo.spread(digits.paint, jobs, f"sets of {len(jobs[0].digits)} images")
        pixels = np.concatenate(parts).reshape(len(arms), each, *parts[0].shape[1:])
        return [oracle.look(asked, images) for images in pixels]

    demo.stage("draw", "Drawing images and pairing the less inky half of each digit")
    noise = seed * _SEEDS
    (drawn,) = paint(["base"], sizes.drawn * len(digits.NAMES), noise)
    pairs = thin_pairs(drawn, sizes.held_out, seed)
    digits.write_pairs(file.parent, drawn, pairs)

    demo.stage("train", "Training on the pairs: Diffusion-DPO, and imitation of the preferred")
    # Imitation is held to the same pairs, which its own objective cannot rank.
    work = [(configs["dpo"], None), (configs["sft"], configs["dpo"])]
    _, imitation = demo.spread(train, work, "steps", lambda: driver.steps_of([*configs.values()]))

    demo.stage("measure", "Drawing the same prompts from the same noise with each model")
    shown = dict(zip(ARMS, paint(ARMS, sizes.measured, noise + _MEASURING), strict=True))
    held_out = {
        "base": driver.evaluation(output / "dpo", first=True),
        "sft": imitation,
        "dpo": driver.evaluation(output / "dpo"),
    }
    return demo.finish(
        {arm: numbers_of(shown[arm], shown["base"], held_out[arm]) for arm in ARMS},
        {
            "pairs": numbers_of_pairs(drawn, pairs),
            "num_images": sizes.measured,
            "num_held_out": sum(split == "eval" for *_, split in pairs),
            "oracle_accuracy": round(oracle.accuracy, 4),
        },
        lambda result: write(output, result, shown),
        lambda result: driver.table(
            "neutral prompts", {arm: _plain(result[arm]) for arm in ARMS}, ARMS, "{:.3f}".format
        ),
    )


def train(job: tuple[RunConfig, RunConfig | None]) -> dict[str, Any]:
    """Train an arm, and measure it as another's evaluation measures.

    Args:
        job: The arm's config, and that of the other.

    Returns:
        Metrics and `intervals` of the evaluation; empty without one.
    """
    from mmalign.inference import evaluate_checkpoint

    folder, judge = driver.train_arm(job[0]), job[1]
    if judge is None:
        return {}
    found = evaluate_checkpoint(judge, folder / "final")
    return found.metrics | {"intervals": found.intervals}


def config(pairs: Path, arm: str, output: Path, seed: int, sizes: Sizes = FULL) -> RunConfig:
    """The run of an arm: full fine-tuning of the base's U-Net.

    Args:
        pairs: The file of records.
        arm: Of OBJECTIVES.
        output: Folder of the run.
        seed: Of the order of the rows and their noise.
        sizes: Pairs a step, and the number of steps.
    """
    from mmalign.quickstart.digits import BASE, SAMPLING, SIDE

    data: dict[str, Any] = {"train": {"path": str(pairs), "split": "train"}}
    if arm == "dpo":
        data["eval"] = {"path": str(pairs), "split": "eval"}
    return RunConfig.model_validate(
        {
            "modality": "diffusion",
            "model": {"path": str(BASE)},
            "data": data,
            "objective": OBJECTIVES[arm],
            "train": {
                "batch_size": sizes.batch_size,
                "eval_batch_size": 40,
                "num_steps": sizes.steps,
                "lr": 5e-5,
                "check_settings": False,  # of a model far smaller than any that was published
                "warmup": min(10, sizes.steps - 1),
                "eval_every": -(-sizes.steps // 3) if arm == "dpo" else None,
                "save_every": None,  # it takes a minute
                "num_threads": 1,
                "seed": seed,
            },
            "sample": {"num_prompts": 0},
            "diffusion": {
                "resolution": SIDE,
                "eval_draws": 6,
                "cache": "off",  # of images of 64 pixels
                "sampling": {**SAMPLING, "num_steps": sizes.denoising_steps},
            },
            "output": output,
        }
    )


def thin_pairs(drawn: Shown, held_out: int, seed: int) -> list[tuple[int, int, str]]:
    """Pairs by chance among the less inky half of each digit: the inkier, the other, the split.

    Args:
        drawn: As many images of each digit.
        held_out: Pairs of each digit that are not trained on.
        seed: Of the pairing.
    """
    random, amount, digit = np.random.default_rng(seed), drawn.ink, np.asarray(drawn.digits)
    pairs: list[tuple[int, int, str]] = []
    for number in sorted(set(drawn.digits)):
        own = np.flatnonzero(digit == number)
        thin = own[amount[own].argsort(kind="stable")][: len(own) // 4 * 2]
        for index, (a, b) in enumerate(random.permutation(thin).reshape(-1, 2).tolist()):
            more, less = (a, b) if amount[a] > amount[b] else (b, a)
            pairs.append((more, less, "eval" if index < held_out else "train"))
    return pairs


def numbers_of_pairs(drawn: Shown, pairs: list[tuple[int, int, str]]) -> dict[str, Any]:
    """Ink of the preferred images and of the others that were trained on, with intervals."""
    trained = [(more, less) for more, less, split in pairs if split == "train"]
    (preferred, rejected), digits = np.transpose(trained), np.asarray(drawn.digits)
    return {
        "pairs": len(trained),
        "ink_preferred": _mean(drawn.ink[preferred], digits[preferred]),
        "ink_rejected": _mean(drawn.ink[rejected], digits[rejected]),
    }


def numbers_of(shown: Shown, base: Shown, held_out: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of an arm; lists are a value and the ends of its 95 % interval."""
    count, legible = len(shown.digits), int(shown.legible.sum())
    ranked = (held_out["reward_accuracy"], *held_out["intervals"]["reward_accuracy"])
    digits, gain = np.asarray(shown.digits), shown.ink - base.ink
    return {
        "ink": _mean(shown.ink, digits),
        "ink_change": _mean(gain, digits),
        "legibility": [round(x, 4) for x in (legible / count, *share_interval(legible, count))],
        "held_out_accuracy": [round(x, 4) for x in ranked],
        "winner_error": float(f"{held_out['errors/chosen_diff']:.3g}"),
        "pixel_change": round(float(abs(shown.pixels - base.pixels).mean()), 4),
        "ink_change_by_digit": [
            _mean(gain[digits == d], digits[digits == d]) for d in sorted(set(shown.digits))
        ],
    }


def _mean(values: NDArray[np.float32], digits: NDArray[np.int64]) -> list[float]:
    """Mean over images, and the ends of its 95 % interval.

    Every model draws as many of each digit, so that digits with more ink than others do not widen
    the interval: each image counts by its distance from its own digit's mean.
    """
    rows, mean = values.astype(np.float64), float(values.mean(dtype=np.float64))
    for digit in set(digits.tolist()):
        rows[digits == digit] += mean - rows[digits == digit].mean()
    return [round(x, 4) for x in (mean, *bootstrap_interval(rows))]


def _plain(numbers: Mapping[str, Any]) -> dict[str, float]:
    """The values alone, for a terminal."""
    named = {key: numbers[key] for key in numbers if key != "ink_change_by_digit"}
    return {key: v[0] if isinstance(v, list) else v for key, v in named.items()}


_NAMES = {"base": "base", "sft": "SFT", "dpo": "DPO"}
_COLOURS = {"base": 0, "sft": 1, "dpo": 2}
_BESIDE, _IN_ROW = 12, 2  # images of each model


def _ink(value: list[float]) -> str:
    return _with_interval("{:.3f}", value)


def _change(value: list[float]) -> str:
    return _with_interval("{:+.3f}", value) if any(value) else blocks.MISSING


def _share(value: list[float]) -> str:
    return _with_interval("{:.1f}", [100 * x for x in value]).replace(" [", " % [")


def _with_interval(form: str, value: list[float]) -> str:
    mean, low, high = (form.format(x).replace("-", "−") for x in value)
    return f"{mean} [{low}, {high}]"


def _small(value: float) -> str:
    return f"{value:+.2g}".replace("-", "−") if value else blocks.MISSING


_ROWS: tuple[driver.Row, ...] = (  # key, what the reader sees, how it is written
    ("ink", "ink, mean of the pixels", _ink),
    ("ink_change", "change of ink, from the same noise", _change),
    ("legibility", "legible, says the oracle", _share),
    ("held_out_accuracy", "held-out pairs ranked right", _share),
    ("winner_error", "error on preferred images, against the base's", _small),
    ("pixel_change", "mean change of a pixel, up or down", "{:.3f}".format),
)


def write(output: Path, result: Mapping[str, Any], shown: Mapping[str, Shown]) -> Path:
    """Write `report.html` about the DPO run in `output`, with the control beside it.

    Args:
        output: Folder of the demonstration.
        result: What `summary.json` will hold.
        shown: Images of each arm, from the same start noise.
    """
    from mmalign.quickstart.digits import write_changes, write_same_noise

    named = {_NAMES[arm]: shown[arm] for arm in ARMS}
    beside, changes = output / "side_by_side.png", output / "changes.png"
    write_same_noise(beside, _BESIDE, _IN_ROW, named)
    write_changes(changes, _IN_ROW, shown["base"], {n: named[n] for n in ("SFT", "DPO")})
    pairs = result["pairs"]
    happened = [
        blocks.paragraph(
            "A diffusion model of a million parameters that learned real handwritten digits drew "
            "images. Of each digit the less inky half became pairs, put together by chance; in "
            f"each the inkier image is preferred. The {pairs['pairs']} preferred images hold "
            f"{pairs['ink_preferred'][0]:.3f} of ink, the model by itself draws "
            f"{result['base']['ink'][0]:.3f}: there is nothing to imitate. Only the comparison "
            "says that more is better."
        ),
        blocks.paragraph(
            "Diffusion-DPO learns the comparison. The control, SFT, is supervised fine-tuning on "
            "the same preferred images, with the same steps and learning rate. No prompt speaks "
            "of ink."
        ),
        driver.smoke(result, "two steps of training"),
        _number_line(result),
        driver.arm_table(
            {_NAMES[arm]: result[arm] for arm in ARMS},
            list(named),
            _ROWS,
            f"{result['num_images']} images of each model, {result['num_held_out']} held-out "
            f"pairs; 95 % intervals; seed {result['seed']}",
        ),
        picture(beside, "Same prompt and start noise under each model, the first few; their ink"),
        driver.took(result),
    ]
    where = [
        blocks.paragraph(
            "In the mean over all images of a digit chance is gone, and what is left is what was "
            "learned: red is where ink was gained, blue where it was lost."
        ),
        picture(changes, "Mean of the base's images of each digit, and its change"),
        _by_digit(result),
    ]
    sections = [
        Section("What happened", Markup().join(happened)),
        Section("Where the ink went", Markup().join(where)),
        Section("What this does not show", _limits(result)),
    ]
    title = "Inkier digits, from pairs of thin ones"
    return write_report([output / "dpo"], output / "report.html", title=title, sections=sections)


def _number_line(result: Mapping[str, Any]) -> Markup:
    """Ink of what was trained on and of what each model draws, one above the other."""
    lines = [
        ("rejected images", result["pairs"]["ink_rejected"], 5),
        ("preferred images", result["pairs"]["ink_preferred"], 3),
        *((f"{_NAMES[arm]} draws", result[arm]["ink"], _COLOURS[arm]) for arm in ARMS),
    ]

    def draw(axes: Axes) -> None:
        for place, (_, value, index) in enumerate(lines):
            _point(axes, value, place, figures.colour(index))
        axes.axvline(
            result["base"]["ink"][0],
            color=figures.colour(_COLOURS["base"]),
            linewidth=1.0,
            linestyle=(0, (2, 2)),
        )
        axes.set_yticks(range(len(lines)), [name for name, *_ in lines])
        axes.set_ylim(len(lines) - 0.5, -0.5)
        axes.set_xlabel("ink, mean of the pixels")
        axes.grid(False, axis="y")

    told = ", ".join(f"{name} {_ink(value)}" for name, value, _ in lines)
    return blocks.figure(
        figures.svg(draw, alt=f"Ink: {told}", size=(5.6, 2.4)),
        "Ink of the images trained on, and of what each model draws",
        "Bars are 95 % intervals over images.",
    )


def _by_digit(result: Mapping[str, Any]) -> Markup:
    """Change of ink of each digit under both arms."""

    def draw(axes: Axes) -> None:
        for shift, arm in ((-0.13, "sft"), (0.13, "dpo")):
            for digit, value in enumerate(result[arm]["ink_change_by_digit"]):
                _point(axes, value, digit + shift, figures.colour(_COLOURS[arm]), upright=True)
            axes.plot([], [], "o", color=figures.colour(_COLOURS[arm]), label=_NAMES[arm])
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.2 * (high - low))  # room for the legend
        axes.set_xticks(range(len(result["dpo"]["ink_change_by_digit"])))
        axes.set_xlabel("digit")
        axes.set_ylabel("change of ink")
        axes.grid(False, axis="x")
        axes.legend(loc="upper left", ncols=2)

    told = "; ".join(
        f"{_NAMES[arm]} " + ", ".join(f"{v[0]:+.3f}" for v in result[arm]["ink_change_by_digit"])
        for arm in OBJECTIVES
    )
    return blocks.figure(
        figures.svg(draw, alt=f"Change of ink by digit: {told}", size=(5.6, 2.7)),
        "Change of ink of each digit against the base's, from the same noise",
    )


def _point(
    axes: Axes, value: list[float], place: float, colour: str, *, upright: bool = False
) -> None:
    """A mean and its interval."""
    mean, low, high = value
    reach = [[mean - low], [high - mean]]
    if upright:
        axes.errorbar([place], [mean], yerr=reach, fmt="o", color=colour)
    else:
        axes.errorbar([mean], [place], xerr=reach, fmt="o", color=colour)


def _limits(result: Mapping[str, Any]) -> Markup:
    notes = [
        "That DPO beats fine-tuning in general. These pairs were chosen so that imitation has "
        "nothing to imitate. Where the preferred images are better than what the model draws by "
        "itself, imitation gets nearly as far (docs/diffusion_methods.md).",
        "What other learning rates or more steps would do to either run.",
        "What people like. Ink is counted, not judged. People choose less consistently, and what "
        "they want is not one number.",
        "Beauty. The oracle is a support vector machine that names "
        f"{100 * result['oracle_accuracy']:.1f} % of unseen real digits. It says whether an image "
        "looks like its digit, and learned from the images that the base learned from.",
        "New prompts. There are ten, all trained on; images are held out, prompts are not.",
        f"How much seeds differ: the intervals are over {result['num_images']} images of one run.",
        "Large models. This one draws 8 x 8 pixels without latents; its learning rate is its own.",
    ]
    return blocks.bullets(notes)
