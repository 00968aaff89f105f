"""The page of the video demonstration: what the model saw, what it said, and what that shows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from mmalign.quickstart.video_base import SHARE_OF_YES
from mmalign.quickstart.video_shown import shown_clips
from mmalign.report import Section, blocks, figures, write_report
from mmalign.report.run import read_run

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from matplotlib.axes import Axes

    from mmalign.quickstart.video_base import Course
    from mmalign.quickstart.video_exam import Marks

_ARMS = ("before", "after", "control")
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
    stages = ", ".join(f"{name.replace('_', ' ')} {s:g}" for name, s in result["stages"].items())
    worst = 100 * 0.5 / np.sqrt(count)
    return Markup().join(
        [
            blocks.paragraph(
                "A LLaVA-OneVision of 0.18 million parameters was trained from nothing on clips in "
                "which one shape does one thing. In that training "
                f"{100 * SHARE_OF_YES:.0f} % of the questions whether an event happens had the "
                "answer yes, as in data made from captions, so it says yes to whatever is asked. "
                f"Then {result['num_pairs']:,} preference pairs, made by rule, aligned its "
                "language model with RRPO: the loss weighs the word yes or no alone, and a KL term "
                "holds the rest of the chosen answers. What encodes the frames stayed frozen. The "
                "control was fine-tuned on the chosen answers of the same pairs, for as many steps."
            ),
            _smoke(result),
            blocks.note(text, "info" if passed else "warning"),
            blocks.table(
                ["held-out clips", *_ARMS],
                [[label, *(_share(result[arm][key]) for arm in _ARMS)] for key, label in _ROWS],
                f"{count} clips that were never trained on, one question of each kind a clip, "
                f"greedy answers, seed {result['seed']}. Standard error of one number, over the "
                f"clips drawn: at most {worst:.1f} points.",
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
                f"says yes to what happens in {_share(result['control']['basic'])} of the clips, "
                f"the aligned model in {_share(result['after']['basic'])}."
            ),
            blocks.paragraph(f"{result['seconds']:g} s until here; by stage: {stages}."),
        ]
    )


def _smoke(result: Mapping[str, Any]) -> Markup:
    if not result["fast"]:
        return Markup()
    text = "This was a smoke run with a base that learned next to nothing: no number here "
    return blocks.note(text + "means anything.", "warning")


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
        + ", ".join(f"{arm} {_share(result[arm][key])}" for arm in _ARMS)
        for key in _DRAWN
    )


def _sees(output: Path, result: Mapping[str, Any], course: Course) -> Markup:
    false, losses = result["false_yes"], np.array(course.losses)
    window = min(_WINDOW, max(1, len(losses) // 3))
    means = np.convolve(losses, np.ones(window) / window, "valid")

    def draw(axes: Axes) -> None:
        axes.plot(np.arange(len(means)) + window, means, color=figures.colour(0))
        axes.set_yscale("log")
        axes.set_xlabel("optimiser step")
        axes.set_ylabel("nats per token")

    text = (
        f"Before alignment {_share(false['share'])} of the questions about what does not happen "
        f"were answered yes. Asked what happens, the same model named the event in "
        f"{_share(false['named'])} of those clips, and in {_share(false['contradicted'])} it "
        "contradicted its own yes in the same breath (“does the blue bar shrink?” – “yes, the "
        "blue bar grows.”). So the knowledge is there and the word does not use it; that is what "
        "preference pairs can mend. What a model cannot see they cannot teach it."
    )
    ranking = read_run(output / "preference").evals[0]["ranking_accuracy"]
    parts = [
        blocks.paragraph(text),
        blocks.paragraph(
            f"Already before alignment it found the chosen answer at least as likely as the "
            f"rejected one in {_share(ranking)} of the held-out pairs: over a whole answer the "
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
        f"true in {_share(result['before']['explanation_true'])} of the answers before, "
        f"{_share(result['after']['explanation_true'])} after and "
        f"{_share(result['control']['explanation_true'])} under the control, which learned whole "
        f"answers; {_share(1 - result['after']['explanation_whole'])} are no sentences any more.",
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
    return Markup("<ul>{}</ul>").format(
        Markup().join(Markup("<li>{}</li>").format(text) for text in notes)
    )


def _share(value: float) -> str:
    return f"{100 * value:.1f}".removesuffix(".0") + " %"


def _change(gain: Mapping[str, float], key: str) -> str:
    change = f"{100 * gain[key]:+.1f}".replace("-", "−")
    return f"{change} ± {100 * gain[f'{key}_error']:.1f} points"
