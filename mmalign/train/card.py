"""The model card: what was trained, on what, with what result."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.config import dump

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mmalign.config import RunConfig

_SHOWN = {
    "loss": "loss",
    "ranking_accuracy": "ranking accuracy (log-probability)",
    "ranking_accuracy_per_token": "ranking accuracy (per token)",
    "reward_accuracy": "reward accuracy (log-ratio)",
    "separation": "separation of desirable and undesirable",
    "log_ratio_margin": "log-ratio margin, nats",
    "drift/chosen": "log-ratio of the chosen response, nats",
    "drift/rejected": "log-ratio of the rejected response, nats",
    "drift/desirable": "log-ratio of desirable responses, nats",
    "drift/undesirable": "log-ratio of undesirable responses, nats",
    "kl_per_token": "KL(reference, policy) per token, nats",
    "errors/chosen_diff": "error of the preferred pictures, policy minus reference",
    "errors/rejected_diff": "error of the rejected pictures, policy minus reference",
}

_TEMPLATE = """\
---
{front_matter}
---

# {name}

`{model}`, trained with the preference objective `{objective}` for {steps:,} steps by
mmalign {version}.

## Held-out numbers

{numbers}

## Data

{train_rows:,} training rows (content hash `{train_hash}`),
{eval_rows:,} held-out rows (`{eval_hash}`).

## Configuration

```yaml
{config}```

Versions: {versions}.
"""


def model_card(
    config: RunConfig,
    environment: Mapping[str, Any],
    evaluations: Sequence[Mapping[str, Any]],
    step: int,
) -> str:
    """The text of README.md.

    Args:
        config: The full configuration.
        environment: What env.json holds.
        evaluations: The records of eval.jsonl, in order of the step.
        step: Optimiser steps done.
    """
    objective = config.objective.name or " + ".join(config.objective.mix or {})
    versions = {"mmalign": environment["mmalign"], **environment["packages"]}
    return _TEMPLATE.format(
        front_matter=_front_matter(config),
        name=config.output.name,
        model=Path(config.model.path).name if _is_local(config) else config.model.path,
        objective=objective,
        steps=step,
        version=environment["mmalign"],
        numbers=_numbers(evaluations),
        config=dump(config),
        versions=", ".join(f"{name} {value}" for name, value in versions.items() if value),
        **environment["data"],
    )


def _front_matter(config: RunConfig) -> str:
    lines = ["tags: [mmalign, preference-alignment]"]
    if not _is_local(config):
        lines.insert(0, f"base_model: {config.model.path}")
    return "\n".join(lines)


def _is_local(config: RunConfig) -> bool:
    """Whether the model is a folder, whose place means nothing on another machine."""
    return Path(config.model.path).exists()


def _numbers(evaluations: Sequence[Mapping[str, Any]]) -> str:
    if not evaluations:
        return "None: the run had no held-out rows."
    first, last = evaluations[0], evaluations[-1]
    rows = [
        f"| {label} | {_number(first, key)} | {_number(last, key)} |"
        for key, label in _SHOWN.items()
        if last.get(key) is not None
    ]
    head = [f"| | step {first['step']} | step {last['step']} |", "| --- | --- | --- |"]
    note = "\n\nIn brackets: 95 % bootstrap interval over rows."
    return "\n".join(head + rows) + note


def _number(record: Mapping[str, Any], key: str) -> str:
    value = record.get(key)
    if value is None:
        return "-"
    low, high = record["intervals"].get(key, (None, None))
    return f"{value:.4g}" if low is None else f"{value:.4g} [{low:.4g}, {high:.4g}]"
