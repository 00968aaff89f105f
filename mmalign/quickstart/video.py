"""No where nothing of the kind happens: a base that sees and says yes, RRPO, a report.

The base is trained on the spot with answers that are mostly yes. It names what happens in a clip
when asked openly, and says yes to whatever else is asked. Preference pairs with spans on the word
yes or no align it with the project's own loop; fine-tuning on the same chosen answers is the
control. Held-out clips are asked about before and after.
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

    from mmalign.config import RunConfig
    from mmalign.quickstart.video_exam import Marks, Paper

PREFERENCE: dict[str, Any] = {"name": "rrpo", "beta": 0.5, "alpha": 0.02}
CONTROL: dict[str, Any] = {"name": "sft"}
LEAST_GAIN, MOST_LOST = 0.15, 0.05
"""A run shows an effect from this gain of pairs on, unless it lost more of the rest than that."""

SEES = 0.85
"""Share of events the base must name: alignment mends what is said, not what is seen."""

_BASE_SECONDS = 125.0  # the base gets fewer steps on a machine that needs longer
_BASE, _PAIRS, _HELD_OUT = 1000, 2000, 3000  # seeds of the clips, added to the run's


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything; the defaults are those of the proven recipe."""

    base_clips: int = 960
    base_steps: int = 800
    pair_clips: int = 400  # with four pairs each
    held_out_clips: int = 200
    held_out_pairs: int = 200  # of theirs, for the run's own evaluation
    batch_size: int = 32  # pairs
    steps: int = 300
    eval_every: int = 100
    shown: int = 8  # clips on the page


FULL = Sizes()
FAST = Sizes(
    base_clips=16,
    base_steps=3,
    pair_clips=4,
    held_out_clips=8,
    held_out_pairs=4,
    batch_size=4,
    steps=2,
    eval_every=1,
    shown=2,
)


def run(output: Path | None = None, seed: int = 0, fast: bool = False) -> dict[str, Any]:
    """Train a base, align it, examine it on held-out clips before and after, write a report.

    Args:
        output: Folder for `base/`, `clips/`, `preference/`, `control/`, `report.html` and
            `summary.json`; by default runs/quickstart-video, or the first name with a number
            behind it that is free.
        seed: Decides the clips, the start of the base, what is asked, and the order of the rows.
        fast: A smoke run: a few steps, a few clips. Its numbers mean nothing.

    Returns:
        What `summary.json` holds: `before`, `after`, `control`, `verdict`, `seconds`, and how they
        came about.

    Raises:
        ConfigError: `output` is not empty, or the run was interrupted.
    """
    import torch

    from mmalign.quickstart import clips, video_base, video_pairs
    from mmalign.quickstart.clip_model import make_model, make_processor, save
    from mmalign.quickstart.folder import free_folder
    from mmalign.quickstart.video_exam import sit, write_paper
    from mmalign.quickstart.video_report import write
    from mmalign.train.files import write_text

    began = clock = time.perf_counter()
    stages: dict[str, float] = {}
    sizes = FAST if fast else FULL

    def lap(stage: str, upcoming: str = "") -> None:
        nonlocal clock
        stages[stage], clock = round(time.perf_counter() - clock, 1), time.perf_counter()
        if upcoming:
            print(upcoming, flush=True)

    output = free_folder(output, "quickstart-video")
    torch.set_num_threads(1)  # a second one makes a model this small slower
    print("Drawing clips in which one thing happens ...", flush=True)
    learned, paired, held_out = (
        clips.make(output / "clips" / name, count, first + seed)
        for name, count, first in (
            ("base", sizes.base_clips, _BASE),
            ("pairs", sizes.pair_clips, _PAIRS),
            ("held_out", sizes.held_out_clips, _HELD_OUT),
        )
    )
    video_pairs.write(paired, seed)
    video_pairs.write(held_out, seed)
    paper = write_paper(held_out, seed)
    lap("clips", "Training a small base, nine in ten of whose yes-or-no events are true ...")
    processor = make_processor()
    base = make_model(processor, seed)
    course = video_base.train(base, processor, learned, seed, sizes.base_steps, _BASE_SECONDS)
    save(output / "base", base, processor)
    lap("base", "Asking it about held-out clips ...")
    before = sit(base, processor, paper)
    lap("before", "Aligning with preference pairs ...")
    after = train_arm(config(output, PREFERENCE, "preference", seed, sizes), processor, paper)
    lap("preference", "Once more without their rejected halves, as the control ...")
    control = train_arm(config(output, CONTROL, "control", seed, sizes), processor, paper)
    lap("control")

    marks = {"before": before, "after": after, "control": control}
    result: dict[str, Any] = {
        **{arm: one.numbers() for arm, one in marks.items()},
        "gain": gain(before, after),
        "gain_of_control": gain(before, control),
        "false_yes": false_yes(before),
        "verdict": verdict(before, after),
        "seconds": round(time.perf_counter() - began, 1),
        "stages": stages,
        "quickstart": "video",
        "base_steps": len(course.losses),
        "base_steps_skipped": course.num_skipped,
        "num_pairs": video_pairs.PAIRS_A_CLIP * len(paired),
        "num_clips": len(held_out),
        "seed": seed,
        "fast": fast,
        "mmalign": __version__,
    }
    write(output, result, marks, course, sizes.shown)
    lap("report")
    result["seconds"] = round(time.perf_counter() - began, 1)
    write_text(output / "summary.json", json.dumps(result, indent=2) + "\n")
    print(_table(result))
    print(f"{result['verdict']['text']}\nReport: {output / 'report.html'}  ({result['seconds']} s)")
    return result


def config(
    output: Path, objective: Mapping[str, Any], arm: str, seed: int, sizes: Sizes = FULL
) -> RunConfig:
    """One arm: six passes over the pairs; the language model is trained, what it sees is not.

    Args:
        output: Folder of the demonstration.
        objective: Of the arm.
        arm: Name of its folder.
        seed: Of the order of the rows.
        sizes: Rows a step, and steps.
    """
    from mmalign.config import RunConfig
    from mmalign.quickstart.clips import NUM_FRAMES
    from mmalign.quickstart.video_pairs import PAIRS

    paired = objective["name"] != "sft"
    return RunConfig.model_validate(
        {
            "modality": "video",
            "model": {"path": str(output / "base")},
            "data": {
                "train": {"path": str(output / "clips" / "pairs" / PAIRS)},
                "eval": {"path": str(output / "clips" / "held_out" / PAIRS)},
                "max_eval_samples": sizes.held_out_pairs,
            },
            "objective": dict(objective),
            "reference": {"kind": "frozen-copy" if paired else "none"},
            "text": {"masks": {"kind": "spans"}} if paired else {},
            "train": {
                "batch_size": sizes.batch_size,
                "eval_batch_size": 100,
                "num_steps": sizes.steps,
                "lr": 1e-3,
                "check_settings": False,  # of a model far smaller than any that was published
                "schedule": "cosine",
                "warmup": max(1, sizes.steps // 20),
                "eval_every": sizes.eval_every,
                "num_threads": 1,
                "seed": seed,
            },
            "sample": {"num_prompts": 0},  # the exam asks them all
            "video": {"num_frames": NUM_FRAMES, "train": ["language"]},
            "output": output / arm,
        }
    )


def train_arm(config: RunConfig, processor: Any, paper: Paper) -> Marks:
    """Run the project's loop to its end, and examine what came out.

    Raises:
        ConfigError: It was interrupted.
    """
    from mmalign.quickstart.video_exam import sit
    from mmalign.train.loop import train

    if train(config).stopped:
        raise ConfigError("the quickstart was interrupted; start it again, it takes a new folder")
    return sit(load(config.output / "final"), processor, paper)


def load(folder: Path) -> Any:
    """A trained model, as anybody would load it."""
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder)


def gain(before: Marks, after: Marks) -> dict[str, float]:
    """What changed, with the standard errors of the changes, over the clips drawn."""
    import numpy as np

    found: dict[str, float] = {}
    for name, change in (
        ("pair", after.pair - before.pair),
        ("general", after.general - before.general),
    ):
        found[name] = round(float(change.mean()), 4)
        found[f"{name}_error"] = round(float(np.std(change) / np.sqrt(len(change))), 4)
    return found


def false_yes(before: Marks) -> dict[str, float]:
    """Of all no-questions the share answered yes; of those, how often the base knew better.

    `named` when asked openly, `contradicted` by the words behind that very yes.
    """
    import numpy as np

    from mmalign.quickstart.video_exam import NO_QUESTIONS

    wrong = np.array([~before.right[kind] for kind in NO_QUESTIONS])  # [2, N]
    named = np.broadcast_to(before.names_event("event"), wrong.shape)
    told = np.array([before.names_event(kind) for kind in NO_QUESTIONS])
    shares = {
        "share": wrong.mean(),
        "named": named[wrong].mean() if wrong.any() else 0.0,
        "contradicted": told[wrong].mean() if wrong.any() else 0.0,
    }
    return {name: round(float(share), 4) for name, share in shares.items()}


def verdict(before: Marks, after: Marks) -> dict[str, Any]:
    """Whether this run shows an effect, and in words."""
    change = gain(before, after)
    passed = change["pair"] >= LEAST_GAIN and change["general"] >= -MOST_LOST
    pair, general = (round(100 * change[name]) for name in ("pair", "general"))  # no -0
    points = f"pairs {pair:+d}, general {general:+d} points"
    text = f"Pass: {points}." if passed else f"No clear effect on this run: {points}."
    named = float(before.names_event("event").mean())
    if named < SEES:
        text += (
            f" The base names only {100 * named:.0f} % of the events; alignment mends what is "
            "said, not what is seen."
        )
    return {"passed": passed, "text": text.replace("-", "−")}


def _table(result: Mapping[str, Any]) -> str:
    arms = ("before", "after", "control")
    lines = [f"{'held-out clips, %':<22}" + "".join(f"{arm:>10}" for arm in arms)]
    for key in result["before"]:
        cells = "".join(f"{100 * result[arm][key]:>10.0f}" for arm in arms)
        lines.append(f"{key.replace('_', ' '):<22}{cells}")
    return "\n".join(lines)
