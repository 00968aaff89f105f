"""What an annotator knows, without what he gets wrong: RRPO on the words yes and no, beside SFT.

The base names what happens in a clip when asked openly, and answers yes whenever it is asked for
yes or no. The pairs mend that; but the annotator who wrote them takes red for green and green for
red. RRPO weighs the marked word alone and holds the rest near the base; fine-tuning on the same
chosen responses learns the confusion as well.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from mmalign.config import RunConfig, VideoConfig
from mmalign.data.example import Clip
from mmalign.quickstart import clips, driver, video_pairs
from mmalign.quickstart.clips import Clips, Scene
from mmalign.quickstart.driver import share
from mmalign.quickstart.video_pairs import Marks
from mmalign.report import Section, blocks, figures, write_report
from mmalign.report.pictures import picture
from mmalign.stats import bootstrap_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Scores = NDArray[np.float64]  # [N], between 0 and 1

BASE = Path(__file__).with_name("video_model")
OBJECTIVES: dict[str, dict[str, Any]] = {
    "SFT": {"name": "sft"},
    "RRPO": {"name": "rrpo", "beta": 0.5, "alpha": 0.05},
}
ARMS = ("base", *OBJECTIVES)
_PLAN = {
    "clips": 5.0,
    "asking base": 12.0,
    "training": 45.0,
    "asking SFT": 5.0,
    "asking RRPO": 5.0,
    "report": 6.0,
}


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything."""

    pair_clips: int = 400  # with two pairs each
    held_out_clips: int = 200
    batch_size: int = 32  # pairs
    steps: int = 100
    shown: int = 8  # held-out clips on the page


FULL = Sizes()
FAST = Sizes(pair_clips=8, held_out_clips=16, batch_size=4, steps=2, shown=2)


@driver.interruptible()
def run(output: Path | None = None, seed: int = 0, fast: bool = False) -> dict[str, Any]:
    """Train both arms, examine them and the base on held-out clips, write a report.

    Args:
        output: Folder for `clips/`, a run for each arm, `report.html` and `summary.json`; by
            default runs/quickstart-video, or the first name with a number behind it that is free.
        seed: Decides the clips, what is asked, and the order of the rows.
        fast: A smoke run: a few steps, a few clips. Its numbers mean nothing.

    Returns:
        What `summary.json` holds: the shares of `base`, `SFT` and `RRPO`, their `intervals`,
        `verdict`, `seconds`, and how they came about.

    Raises:
        ConfigError: `output` is not empty, or the run was interrupted.
    """
    sizes = FAST if fast else FULL
    demo = driver.Demo("video", output, seed, fast, _PLAN)
    demo.stage("clips", "Drawing clips in which one thing happens")
    drawn = clips.make(
        demo.output / "clips",
        sizes.pair_clips + sizes.held_out_clips,
        seed,
        partial(demo.track, unit="clips"),
    )
    paired, held_out = drawn[: sizes.pair_clips], drawn[sizes.pair_clips :]
    for name, part in (("pairs", paired), ("held_out", held_out)):
        video_pairs.write(demo.output / "clips" / f"{name}.jsonl", part, seed)
    paper = video_pairs.write_paper(held_out, seed)

    def examine(arm: str, folder: Path) -> Marks:
        demo.stage(f"asking {arm}", f"Asking {arm} about held-out clips")
        track = partial(demo.track, unit="kinds of questions")
        return video_pairs.sit(*load(folder), paper, track)

    driver.one_thread()
    marks = {"base": examine("base", BASE)}
    configs = {arm: config(demo.output, arm, seed, sizes) for arm in OBJECTIVES}
    demo.stage("training", f"Training {' and '.join(configs)} side by side")
    demo.train_arms(list(configs.values()))
    marks |= {arm: examine(arm, each.output / "final") for arm, each in configs.items()}
    return demo.finish(
        {**numbers(marks), "verdict": verdict(marks)},
        {"num_pairs": 2 * len(paired), "num_clips": len(held_out), "steps": sizes.steps},
        lambda result: write_page(demo.output, result, marks, paired, sizes.shown),
        lambda result: (
            driver.table("held-out clips, %", result, ARMS, lambda value: f"{100 * value:.0f}")
            + f"\n{result['verdict']['text']}"
        ),
    )


def config(output: Path, arm: str, seed: int, sizes: Sizes = FULL) -> RunConfig:
    """One arm; the language model is trained, what it sees is not.

    Args:
        output: Folder of the demonstration.
        arm: A key of `OBJECTIVES`.
        seed: Of the order of the rows.
        sizes: Rows a step, and steps.
    """
    by_words = arm == "RRPO"
    return RunConfig.model_validate(
        {
            "modality": "video",
            "model": {"path": str(BASE)},
            "data": {
                "train": {"path": str(output / "clips" / "pairs.jsonl")},
                "eval": {"path": str(output / "clips" / "held_out.jsonl")},
                "max_eval_samples": 100,
            },
            "objective": OBJECTIVES[arm],
            "reference": {"kind": "frozen-copy" if by_words else "none"},
            "text": {"masks": {"kind": "spans"}} if by_words else {},
            "train": {
                "batch_size": sizes.batch_size,
                "eval_batch_size": 100,
                "num_steps": sizes.steps,
                "lr": 5e-4,
                "check_settings": False,  # of a model far smaller than any that was published
                "schedule": "cosine",
                "warmup": max(1, sizes.steps // 20),
                "eval_every": None,
                "save_every": None,
                "num_threads": 1,
                "seed": seed,
            },
            "sample": {"num_prompts": 0},  # the exam asks them all
            "video": {"num_frames": clips.NUM_FRAMES, "train": ["language"]},
            "output": output / arm.lower(),
        }
    )


def load(folder: Path) -> tuple[Any, Any]:
    """A model and the processor of all, as anybody would load them."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder)
    return model, AutoProcessor.from_pretrained(BASE)


LEAST, MOST_LOST = 0.15, 0.10
"""A run shows an effect from these gains on, unless it lost more of the general questions."""


def numbers(marks: Mapping[str, Marks]) -> dict[str, Any]:
    """Means of every arm's scores, and their 95 % intervals over the clips drawn."""
    scores = {arm: each.scores for arm, each in marks.items()}

    def each(number: Callable[[Scores], object]) -> dict[str, dict[str, Any]]:
        return {arm: {n: number(v) for n, v in one.items()} for arm, one in scores.items()}

    return {**each(lambda values: round(float(values.mean()), 4)), "intervals": each(_interval)}


def verdict(marks: Mapping[str, Marks]) -> dict[str, Any]:
    """Whether this run shows an effect, and in words.

    It does where RRPO mended yes and no, says what is true more often than SFT, and kept the
    general questions.
    """
    base, sft, rrpo = (marks[arm].scores for arm in ARMS)
    changes = {
        "yes and no both right, RRPO less base": rrpo["yes_no"] - base["yes_no"],
        "what is said is true, RRPO less SFT": rrpo["said"] - sft["said"],
        "general questions, RRPO less base": rrpo["general"] - base["general"],
    }
    gained, truer, kept = (float(each.mean()) for each in changes.values())
    passed = min(gained, truer) >= LEAST and kept >= -MOST_LOST
    told = "; ".join(f"{what} {_points(each)}" for what, each in changes.items())
    return {"passed": passed, "text": f"{'Pass' if passed else 'No clear effect'}: {told}."}


def _interval(values: Scores) -> list[float]:
    return [round(bound, 4) for bound in bootstrap_interval(values)]


def _points(change: Scores) -> str:
    mean, low, high = (
        f"{round(100 * value):+d}".replace("-", "−")
        for value in (change.mean(), *_interval(change))
    )
    return f"{mean} points [{low}, {high}]"


_ROWS = (  # key, what the reader sees
    ("yes_no", "yes and no both right"),
    ("yes", "yes to what happens"),
    ("no", "no to what does not"),
    ("said", "what is said after yes or no is true"),
    ("said_red_green", "the same, of red and green shapes"),
    ("said_other", "the same, of blue and yellow shapes"),
    ("general", "general questions, mean of the four below"),
    ("event", "what happens"),
    ("colour", "which colour"),
    ("shape", "which shape"),
    ("static", "is it this colour, the whole answer"),
)
_DRAWN = {
    "yes_no": "yes and no\nboth right",
    "said": "what is said\nis true",
    "general": "general\nquestions",
}
_SHOWN = ("yes", "no", "event")  # kinds of questions
_SIDES = ("chosen", "rejected")


def write_page(
    output: Path, result: Mapping[str, Any], marks: Mapping[str, Marks], paired: Clips, shown: int
) -> Path:
    """Write `report.html` about both runs.

    Args:
        output: Folder of the demonstration.
        result: What `summary.json` will hold.
        marks: What every arm answered.
        paired: The clips of the pairs.
        shown: Held-out clips whose frames and answers stand on the page.
    """
    sections = [
        Section("What happened", _what_happened(result)),
        Section("What the annotator wrote", _annotations(output, paired)),
        Section("What each model says", _answers(output, marks, shown)),
        Section("What this does not show", blocks.bullets(_limits(result))),
    ]
    return write_report(
        [output / arm.lower() for arm in OBJECTIVES],
        output / "report.html",
        title="A small video model learns yes and no, and not its annotator's red for green",
        sections=sections,
    )


def _what_happened(result: Mapping[str, Any]) -> Markup:
    count = result["num_clips"]
    cells = [[label, *(_with_interval(result, arm, key) for arm in ARMS)] for key, label in _ROWS]
    return Markup().join(
        [
            blocks.paragraph(
                "The base, a LLaVA-OneVision of 0.18 million parameters, sees what happens in a "
                "clip and says yes to every question whether something happens. "
                f"{result['num_pairs']:,} preference pairs correct that. Their annotator judges "
                "yes and no well and confuses red and green, in the chosen and the rejected "
                "response alike. RRPO rewards the marked word alone and holds the other words to "
                "the base by a KL term. SFT learns the chosen responses whole. Both took "
                f"{result['steps']} steps from the same base, with the same batches and rate."
            ),
            driver.smoke(result, "two steps"),
            blocks.note(
                result["verdict"]["text"], "info" if result["verdict"]["passed"] else "warning"
            ),
            blocks.figure(
                figures.svg(lambda axes: _bars(axes, result), alt=_alt(result), size=(6.4, 2.9)),
                "Share of held-out clips, %",
                "Lines: 95 % intervals.",
            ),
            blocks.table(
                ["", *ARMS],
                cells,
                f"{count} clips that were never trained on, one question of each kind a clip, "
                f"greedy answers, seed {result['seed']}. In brackets 95 % intervals over the clips "
                "drawn (bootstrap).",
            ),
            driver.took(result),
        ]
    )


def _with_interval(result: Mapping[str, Any], arm: str, key: str) -> Markup:
    low, high = (f"{100 * bound:.0f}" for bound in result["intervals"][arm][key])
    return Markup("{} <small>[{}, {}]</small>").format(share(result[arm][key]), low, high)


def _bars(axes: Axes, result: Mapping[str, Any]) -> None:
    places, width = np.arange(len(_DRAWN)), 0.26
    for index, arm in enumerate(ARMS):
        shares = np.array([result[arm][key] for key in _DRAWN])
        bounds = np.array([result["intervals"][arm][key] for key in _DRAWN])
        axes.bar(
            places + (index - 1) * width,
            100 * shares,
            width * 0.92,
            yerr=100 * np.abs(bounds.T - shares),
            color=figures.colour(index),
            ecolor="#010101",  # the page's ink
            error_kw={"linewidth": 0.9},
            label=arm,
        )
    axes.set_xticks(places, list(_DRAWN.values()))
    axes.set_ylim(0, 119)
    axes.set_yticks(range(0, 101, 25))
    axes.grid(visible=False, axis="x")
    axes.legend(loc="upper center", ncols=3)


def _alt(result: Mapping[str, Any]) -> str:
    return "; ".join(
        f"{label.replace(chr(10), ' ')}: "
        + ", ".join(f"{arm} {share(result[arm][key])}" for arm in ARMS)
        for key, label in _DRAWN.items()
    )


def _annotations(output: Path, paired: Clips) -> Markup:
    """The first clip of each colour, with its two pairs."""
    colours = [scene.colour for scene in paired.scenes]
    confused = float(np.mean([colour in video_pairs.CONFUSED for colour in colours]))
    parts = [
        blocks.paragraph(
            "Two pairs a clip: one where yes is true, one where no is. The marked words are all "
            "that RRPO compares. What follows them is what the annotator saw: in "
            f"{share(confused)} of the pairs with the wrong colour (✗), on both sides. Below, the "
            "first clip of each colour."
        )
    ]
    for index in (colours.index(colour) for colour in clips.COLOURS if colour in colours):
        scene = paired.scenes[index]
        pairs = [video_pairs.pair(scene, e) for e in (scene.event, clips.REVERSED[scene.event])]
        rows = [
            [
                _plain(pair["prompt"]),
                *(_response(pair[side], scene, Markup("<mark>{}</mark>")) for side in _SIDES),
            ]
            for pair in pairs
        ]
        parts.append(_clip(output, paired, index, ["question", *_SIDES], rows))
    return Markup().join(parts)


def _answers(output: Path, marks: Mapping[str, Marks], shown: int) -> Markup:
    """The first held-out clips, with what each arm answers."""
    paper = marks["base"].paper
    count = min(shown, len(paper.clips))
    parts = [
        blocks.paragraph(
            f"The first {count} held-out clips, none chosen: the {clips.NUM_FRAMES} frames of "
            f"{clips.SIDE} x {clips.SIDE} pixels that the model gets, two questions for yes or no, "
            "and an open one that is in no pair."
        )
    ]
    for index in range(count):
        scene, rows = paper.clips.scenes[index], []
        for kind in _SHOWN:
            asked = paper.asked[kind][index]
            told = (each.answers[kind][index] for each in marks.values())
            word = asked.answer.partition(" , ")[0]
            rows.append([_plain(asked.question), *(_response(t, scene, word) for t in told)])
        parts.append(_clip(output, paper.clips, index, ["question", *marks], rows))
    return Markup().join(parts)


def _clip(
    output: Path, shown: Clips, index: int, header: Sequence[str], rows: Sequence[Sequence[object]]
) -> Markup:
    """A clip's frames and the truth, above a table of questions."""
    file = output / "shown" / f"{shown.files[index].stem}.webp"
    _write_frames(shown.files[index], file)
    caption = f"{shown.files[index].name}: {_plain(clips.sentence(shown.scenes[index]))}"
    told = Markup().join(_row("td", row) for row in rows)
    table = Markup('<div class="scroll"><table><thead>{}</thead><tbody>{}</tbody></table></div>')
    return blocks.article(picture(file, caption), table.format(_row("th", header), told))


def _row(cell: str, texts: Sequence[object]) -> Markup:
    """Responses are text, and start at the left although they are marked up."""
    cells = (Markup('<{0} class="text">{1}</{0}>').format(Markup(cell), text) for text in texts)
    return Markup("<tr>{}</tr>").format(Markup().join(cells))


def _write_frames(clip: Path, file: Path) -> None:
    from mmalign.video import samples
    from mmalign.video.media import read_frames
    from mmalign.video.processing import DecodedMedia

    frames = read_frames(Clip(clip), VideoConfig(num_frames=clips.NUM_FRAMES))
    image = samples.sheet(DecodedMedia(clips=[(frames, None)], starts=[0.0]))
    assert image is not None
    samples.write(image, file)


def _response(text: str, scene: Scene, word: Markup | str) -> Markup:
    """A response, with a sign before each part that says whether it is true.

    Args:
        text: Yes or no and a sentence, or the sentence alone.
        scene: What is true.
        word: How yes or no is shown, or which of them is right.
    """
    before, comma, rest = text.rpartition(" , ")
    if isinstance(word, Markup):
        before = word.format(before)
    elif comma:
        before = _signed(before, before == word)
    return Markup("{}{}{}").format(
        before, ", " if comma else "", _signed(_plain(rest), rest == clips.sentence(scene))
    )


def _signed(text: str, right: bool) -> Markup:
    """Not colour alone tells right from wrong."""
    kind, sign = ("good", "✓") if right else ("bad", "✗")
    return Markup('<span class="{}">{} {}</span>').format(kind, sign, text)


def _plain(text: str) -> str:
    """As people write it; to the model every mark is a word of its own."""
    return re.sub(r" ([.,?])", r"\1", text)


def _limits(result: Mapping[str, Any]) -> Sequence[str]:
    return [
        "One run is one draw, and all runs start from the same stored base: intervals are over "
        "clips, not over trainings, and other seeds differ.",
        "The error was planted, and the spans leave it out exactly. Where nobody knows which words "
        "of an annotator are sound, spans cannot be set like this.",
        "SFT is told nothing of spans here. Fine-tuning on the marked words alone might leave the "
        "error out as well; it was not tried.",
        "Held-out clips are other draws of the same eight events, three shapes and four colours: "
        "nothing here is about real videos, or questions in other words.",
        "A higher rate corrects more words and costs more of the general questions: in a trial at "
        "1e-3 with 150 steps yes and no were right in 76 %, the general questions in 75 %.",
        "The base sees most events. What a model cannot see, no pair teaches it.",
        f"With {result['num_clips']} clips one is {100 / result['num_clips']:.1f} points. Read the "
        "direction, not the decimals.",
    ]
