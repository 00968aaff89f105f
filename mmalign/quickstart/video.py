"""No where nothing of the kind happens: a base that sees and says yes, RRPO, a report."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from mmalign.quickstart import clips as questions
from mmalign.quickstart import driver
from mmalign.quickstart.clips import EVENTS, NUM_FRAMES
from mmalign.quickstart.driver import share
from mmalign.quickstart.video_pairs import SHARE_OF_YES
from mmalign.report import Section, blocks, figures, write_report
from mmalign.report.pictures import picture
from mmalign.report.run import read_run

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from matplotlib.axes import Axes

    from mmalign.config import RunConfig
    from mmalign.quickstart.video_pairs import Course, Marks, Paper


# No where nothing of the kind happens: a base that sees and says yes, RRPO, a report.
#
# The base is trained on the spot with answers that are mostly yes. It names what happens in a clip
# when asked openly, and answers yes to any other question. Preference pairs with spans on the word
# yes or no align it with the project's own loop; fine-tuning on the same chosen answers is the
# control. Held-out clips are asked about before and after.

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
    from mmalign.quickstart import clips, video_pairs
    from mmalign.quickstart.clips import make_model, make_processor, save
    from mmalign.quickstart.video_pairs import sit, write_paper

    sizes = FAST if fast else FULL
    demo = driver.Demo("video", output, seed, fast)
    output = demo.output
    driver.one_thread()
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
    demo.lap("clips", "Training a small base, nine in ten of whose yes-or-no events are true ...")
    processor = make_processor()
    base = make_model(processor, seed)
    course = video_pairs.train(base, processor, learned, seed, sizes.base_steps, _BASE_SECONDS)
    save(output / "base", base, processor)
    demo.lap("base", "Asking it about held-out clips ...")
    before = sit(base, processor, paper)
    demo.lap("before", "Aligning with preference pairs ...")
    after = examined(config(output, PREFERENCE, "preference", seed, sizes), processor, paper)
    demo.lap("preference", "Once more without their rejected halves, as the control ...")
    control = examined(config(output, CONTROL, "control", seed, sizes), processor, paper)
    demo.lap("control")

    marks = {"before": before, "after": after, "control": control}
    return demo.finish(
        {
            **{arm: one.numbers() for arm, one in marks.items()},
            "gain": gain(before, after),
            "gain_of_control": gain(before, control),
            "false_yes": false_yes(before),
            "verdict": verdict(before, after),
        },
        {
            "base_steps": len(course.losses),
            "base_steps_skipped": course.num_skipped,
            "num_pairs": video_pairs.PAIRS_A_CLIP * len(paired),
            "num_clips": len(held_out),
        },
        lambda result: write(output, result, marks, course, sizes.shown),
        _lines,
    )


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


def examined(config: RunConfig, processor: Any, paper: Paper) -> Marks:
    """Train an arm, and examine what came out."""
    from mmalign.quickstart.video_pairs import sit

    return sit(load(driver.train_arm(config) / "final"), processor, paper)


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

    from mmalign.quickstart.video_pairs import NO_QUESTIONS

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


def _lines(result: dict[str, Any]) -> str:
    shares = driver.table("held-out clips, %", result, _ARMS, lambda value: f"{100 * value:.0f}")
    return f"{shares}\n{result['verdict']['text']}"


# Held-out clips on the page: the frames the model saw, and what it said before and after.

_ARMS = ("before", "after", "control")
_SHOWN = ("event", "basic", "no_reversed", "no_other")  # kinds of questions
_TABLE = Markup(
    '<div class="scroll"><table><thead><tr><th>question</th>{}</tr></thead>'
    "<tbody>{{}}</tbody></table></div>"
).format(Markup().join(Markup('<th class="text">{}</th>').format(arm) for arm in _ARMS))


def shown_clips(output: Path, marks: Mapping[str, Marks], count: int) -> Markup:
    """For the first clips, the frames, and below them questions and answers."""
    paper = marks["before"].paper
    parts = [
        blocks.paragraph(
            f"The first {min(count, len(paper.clips))} held-out clips, one of each of the "
            f"{len(EVENTS)} events; none was chosen. These are the {NUM_FRAMES} frames of 32 x 32 "
            "pixels that the model gets. Below them one open question and three that ask for yes "
            "or no."
            if count >= len(EVENTS)
            else f"The first {count} held-out clips and the {NUM_FRAMES} frames of each that the "
            "model gets."
        )
    ]
    for index in range(min(count, len(paper.clips))):
        rows: list[Markup] = []
        for kind in _SHOWN:
            asked = paper.asked[kind][index]
            said = [
                _answer(marks[arm].answers[kind][index], right=bool(marks[arm].right[kind][index]))
                for arm in _ARMS
            ]
            rows.append(
                Markup().join([Markup("<tr><th>{}</th>").format(_plain(asked.question)), *said])
            )
        file = output / "shown" / f"{index}.webp"
        _write_frames(paper.clips.files[index], file)
        truth = _plain(questions.sentence(paper.clips.scenes[index]))
        parts.append(
            blocks.article(
                picture(file, f"{paper.clips.files[index].name}: {truth}"),
                _TABLE.format(Markup().join(rows)),
            )
        )
    return Markup().join(parts)


def _write_frames(clip: Path, file: Path) -> None:
    from mmalign.config import VideoConfig
    from mmalign.data.example import Clip
    from mmalign.video import samples
    from mmalign.video.media import read_frames
    from mmalign.video.processing import DecodedMedia

    frames = read_frames(Clip(clip), VideoConfig(num_frames=NUM_FRAMES))
    image = samples.sheet(DecodedMedia(clips=[(frames, None)], starts=[0.0]))
    assert image is not None
    samples.write(image, file)


def _answer(text: str, *, right: bool) -> Markup:
    """A cell: an answer with a sign in front, so that not colour alone tells right from wrong.

    Where yes or no was said that word alone is coloured: it is what was asked for.
    """
    word = text.partition(" ")[0]
    told, rest = _plain(text), ""
    if word in (questions.YES, questions.NO):
        told, rest = word, told.removeprefix(word)
    sign, name = ("✓", "good") if right else ("✗", "bad")
    shown = Markup('<td class="text"><span class="{}">{} {}</span>{}</td>')
    return shown.format(name, sign, told, rest)


def _plain(text: str) -> str:
    """As people write it; to the model every mark is a word of its own."""
    return re.sub(r" ([.,?])", r"\1", text)


# The page of the video demonstration: what the model saw, what it said, and what that shows.

_ROWS = (  # key, what the reader sees
    ("pair", "yes and no both right"),
    ("basic", "says yes to what happens"),
    ("no_reversed", "says no to the reverse of it"),
    ("no_other", "says no to another event"),
    ("explanation_true", "what follows yes or no is true"),
    ("explanation_whole", "what follows yes or no is a sentence"),
    ("event_word", "names the event when asked what happens"),
    ("general", "general: mean of the four below"),
    ("event", "the whole sentence on what happens"),
    ("colour", "colour"),
    ("shape", "shape"),
    ("static", "yes or no about the colour"),
)
_DRAWN = ("pair", "basic", "no_reversed", "no_other", "event_word", "general")
_TICKS = ("both\nright", "yes,\nhappens", "no,\nreverse", "no,\nanother", "names\nevent", "general")
_WINDOW = 20  # steps of the base that a point of its curve is the mean of


def write(
    output: Path, result: Mapping[str, Any], marks: Mapping[str, Marks], course: Course, shown: int
) -> Path:
    """Write `report.html` about the preference run in `output`, with the control beside it.

    Args:
        output: Folder of the demonstration.
        result: What `summary.json` will hold.
        marks: The three exams: before, after, control.
        course: How the base learned.
        shown: Clips whose frames and answers stand on the page.
    """
    sections = [
        Section("What happened", _what_happened(result)),
        Section("What it saw and what it said", shown_clips(output, marks, shown)),
        Section("It sees the event and says yes", _sees(output, result, course)),
        Section("What this does not show", _limits(result)),
    ]
    title = "A small video model learns to say no"
    return write_report(
        [output / "preference"], output / "report.html", title=title, sections=sections
    )


def _what_happened(result: Mapping[str, Any]) -> Markup:
    passed, text = result["verdict"]["passed"], result["verdict"]["text"]
    gain, control, count = result["gain"], result["gain_of_control"], result["num_clips"]
    worst = 100 * 0.5 / np.sqrt(count)
    return Markup().join(
        [
            blocks.paragraph(
                "A LLaVA-OneVision of 0.18 million parameters was trained from nothing on clips in "
                "which one shape does one thing. In that training "
                f"{100 * SHARE_OF_YES:.0f} % of the questions whether an event happens had the "
                "answer yes, as in data made from captions, so it answers yes to every question. "
                f"Then {result['num_pairs']:,} preference pairs, made by rule, aligned its "
                "language model with RRPO: the loss weighs the word yes or no alone, and a KL term "
                "holds the rest of the chosen answers. What encodes the frames stayed frozen. The "
                "control was fine-tuned on the chosen answers of the same pairs, for as many steps."
            ),
            driver.smoke(result, "a base that learned next to nothing"),
            blocks.note(text, "info" if passed else "warning"),
            driver.arm_table(
                result,
                _ARMS,
                [(key, label, share) for key, label in _ROWS],
                f"{count} clips that were never trained on, one question of each kind a clip, "
                f"greedy answers, seed {result['seed']}. Standard error of one number, over the "
                f"clips drawn: at most {worst:.1f} points.",
                of="held-out clips",
            ),
            blocks.figure(
                figures.svg(lambda axes: _bars(axes, result), alt=_alt(result), size=(7.2, 2.9)),
                "Share of right answers, %",
                "Lines: one standard error, over the clips drawn.",
            ),
            blocks.paragraph(
                f"Pairs gained {_change(gain, 'pair')} by preference pairs and "
                f"{_change(control, 'pair')} by the control; the general questions changed by "
                f"{_change(gain, 'general')} and {_change(control, 'general')}. The control "
                f"says yes to what happens in {share(result['control']['basic'])} of the clips, "
                f"the aligned model in {share(result['after']['basic'])}."
            ),
            driver.took(result),
        ]
    )


def _bars(axes: Axes, result: Mapping[str, Any]) -> None:
    places, width = np.arange(len(_DRAWN)), 0.26
    for index, arm in enumerate(_ARMS):
        shares = np.array([result[arm][key] for key in _DRAWN])
        errors = np.sqrt(shares * (1 - shares) / result["num_clips"])
        axes.bar(
            places + (index - 1) * width,
            100 * shares,
            width * 0.92,
            yerr=100 * errors,
            color=figures.colour(index),
            ecolor="#010101",  # the page's ink
            error_kw={"linewidth": 0.9},
            label=arm,
        )
    axes.set_xticks(places, _TICKS)
    axes.set_ylim(0, 119)
    axes.set_yticks(range(0, 101, 25))
    axes.grid(visible=False, axis="x")
    axes.legend(loc="upper center", ncols=3)


def _alt(result: Mapping[str, Any]) -> str:
    return "; ".join(
        f"{key.replace('_', ' ')}: "
        + ", ".join(f"{arm} {share(result[arm][key])}" for arm in _ARMS)
        for key in _DRAWN
    )


def _sees(output: Path, result: Mapping[str, Any], course: Course) -> Markup:
    false, losses = result["false_yes"], np.array(course.losses)
    window = min(_WINDOW, max(1, len(losses) // 3))
    means = np.convolve(losses, np.ones(window) / window, "valid")

    def draw(axes: Axes) -> None:
        axes.plot(np.arange(len(means)) + window, means, color=figures.colour(0))
        axes.set_yscale("log")
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("nats per token")

    text = (
        f"Before alignment {share(false['share'])} of the questions about what does not happen "
        f"were answered yes. Asked what happens, the same model named the event in "
        f"{share(false['named'])} of those clips, and in {share(false['contradicted'])} it "
        "contradicted its own yes in the same breath (“does the blue bar shrink?” – “yes, the "
        "blue bar grows.”). So the knowledge is there and the word does not use it; that is what "
        "preference pairs can mend. What a model cannot see they cannot teach it."
    )
    ranking = read_run(output / "preference").evals[0]["ranking_accuracy"]
    parts = [
        blocks.paragraph(text),
        blocks.paragraph(
            f"Already before alignment it found the chosen answer at least as likely as the "
            f"rejected one in {share(ranking)} of the held-out pairs: over a whole answer the "
            "false event weighs more than the false yes. But yes comes first, and is what gets "
            "said. Ranking accuracy, further down, is no headline here; nor is the fall of the "
            "rejected answers, which the marked words alone make."
        ),
        blocks.figure(
            figures.svg(draw, alt=f"Loss of the base from {means[0]:.2g} to {means[-1]:.2g}"),
            "The base learns: loss on its training answers",
            f"Mean of {window} steps. {result['base_steps']} steps in all.",
        ),
    ]
    if result["base_steps_skipped"]:
        parts.append(
            blocks.note(
                f"The machine was too slow for {result['base_steps_skipped']} of the base's steps, "
                "which were left out; the base may see less than it could.",
                "warning",
            )
        )
    return Markup().join(parts)


def _limits(result: Mapping[str, Any]) -> Markup:
    notes = [
        "One run is one draw. The errors in the table are over clips, not over trainings, which "
        "differ more. With seeds 0, 1 and 2 pairs went from 2.5, 6.5 and 0 % to 71, 64 and 69 %; "
        "where the base saw less (82 % of the events, after 555 of its steps on a busy machine) "
        "they stopped at 47 %.",
        "The control does as well on pairs: 74, 66 and 76 % with those seeds. It says yes to what "
        "happens in 92, 86 and 92 % of the clips, the aligned model in 99, 98 and 96 %. So the "
        "claim is that preferences on one word mend a bias, not that they beat fine-tuning on "
        "true answers.",
        "Only the word yes or no was weighed, and that is what the exam marks. What follows it is "
        f"true in {share(result['before']['explanation_true'])} of the answers before, "
        f"{share(result['after']['explanation_true'])} after and "
        f"{share(result['control']['explanation_true'])} under the control, which learned whole "
        f"answers; {share(1 - result['after']['explanation_whole'])} are no sentences any more.",
        "Held-out clips are other draws of the same eight events, three shapes and four colours: "
        "nothing here is about real videos, or questions in other words.",
        "The bias was planted. Models in the wild say yes for many reasons, and pairs made by rule "
        "from what a generator knows are cleaner than any that people or models write.",
        "Pairs about colour and shape were mixed in. In a trial without them the general "
        "questions fell from 97 to 37 %: the KL term guards only what is asked in the pairs.",
        "DPO over whole answers, and spans that hold the event too, do little here: the margin is "
        "won on event words that the model knows already.",
        f"With {result['num_clips']} clips one is {100 / result['num_clips']:.1f} points. Read the "
        "direction, not the decimals.",
    ]
    return driver.bullets(notes)


def _change(gain: Mapping[str, float], key: str) -> str:
    change = f"{100 * gain[key]:+.1f}".replace("-", "−")
    return f"{change} ± {100 * gain[f'{key}_error']:.1f} points"
