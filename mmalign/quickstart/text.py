"""Short answers from a small chat model: 84 shipped pairs, LoRA preference training, a report.

Two runs of the project's own loop: preference pairs plus likelihood of the chosen answers, and, as
the control, the likelihood alone. The claim is that answers become short, not that DPO beats
fine-tuning: the control does almost the same, and the report says so.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign import __version__
from mmalign.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mmalign.config import RunConfig
    from mmalign.quickstart.answers import Answer

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
    from mmalign.quickstart import chat_model, stand_in
    from mmalign.quickstart.folder import free_folder
    from mmalign.quickstart.text_report import write
    from mmalign.train.files import write_text

    began = clock = time.perf_counter()
    stages: dict[str, float] = {}

    def lap(stage: str) -> None:
        nonlocal clock
        stages[stage], clock = round(time.perf_counter() - clock, 1), time.perf_counter()

    output = free_folder(output, "quickstart-text")
    rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").split("\n") if line]
    if fast:
        model = stand_in.make(output / "model", [row["chosen"] for row in rows])
    else:
        print(f"Looking for {chat_model.HUB_NAME}; the first time it is downloaded ...", flush=True)
        model = chat_model.fetch()
    lap("model")
    print(
        f"Model: {model.source}\nTraining on pairs, then the control without them ...", flush=True
    )

    keywords = {row["id"]: row["meta"]["keyword"] for row in rows}
    preference = config(model.path, PREFERENCE, output / "preference", seed, fast)
    before, after = train_arm(preference, keywords)
    lap("preference")
    _, control = train_arm(config(model.path, CONTROL, output / "control", seed, fast), keywords)
    lap("control")

    numbers = {
        "before": numbers_of(before, _evaluation(output / "preference", first=True)),
        "after": numbers_of(after, _evaluation(output / "preference")),
        # Scored as the other arm is: its own objective never saw a pair, and has no reference.
        "control": numbers_of(control, pair_metrics(preference, output / "control" / "final")),
    }
    lap("control_on_pairs")
    result = {
        **numbers,
        "seconds": round(time.perf_counter() - began, 1),
        "stages": stages,
        "quickstart": "text",
        "model": model.source,
        "is_dequantized": model.is_dequantized,
        "num_prompts": len(after),
        "seed": seed,
        "fast": fast,
        "mmalign": __version__,
    }
    write(output, result, {"Before": before, "Control": control, "After": after})
    write_text(output / "summary.json", json.dumps(result, indent=2) + "\n")
    print(_table(numbers) + f"\nReport: {output / 'report.html'}  ({result['seconds']} s)")
    return result


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


def train_arm(config: RunConfig, keywords: Mapping[str, str]) -> tuple[list[Answer], list[Answer]]:
    """Run one arm; its answers before the first and after the last step."""
    from transformers import AutoTokenizer

    from mmalign.quickstart.answers import measure
    from mmalign.train.loop import train
    from mmalign.train.metrics import read_json

    if train(config).stopped:
        raise ConfigError("the quickstart was interrupted; start it again, it takes a new folder")
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


def _evaluation(folder: Path, *, first: bool = False) -> dict[str, Any]:
    from mmalign.train.metrics import read_json

    return read_json(folder / "eval.jsonl")[0 if first else -1]


def numbers_of(answers: list[Answer], evaluation: Mapping[str, Any]) -> dict[str, float]:
    """What answers and held-out metrics say together; shares are between 0 and 1."""
    from mmalign.quickstart.answers import summary

    held_out = {name: evaluation[key] for key, name in _HELD_OUT.items()}
    return {name: round(value, 4) for name, value in (summary(answers) | held_out).items()}


def _table(numbers: Mapping[str, Mapping[str, float]]) -> str:
    lines = [f"{'held-out prompts':<26}" + "".join(f"{name:>10}" for name in numbers)]
    for key in numbers["before"]:
        cells = "".join(f"{values[key]:>10.2f}" for values in numbers.values())
        lines.append(f"{key.replace('_', ' '):<26}{cells}")
    return "\n".join(lines)
