"""What a run comes to: held-out evaluations and samples on the way, at its end the trained weights
in their library's own layout, with a model card.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from accelerate.utils import broadcast_object_list, gather_object
from huggingface_hub import metadata_load, try_to_load_from_cache
from huggingface_hub.utils import HFValidationError, validate_repo_id

from mmalign.config import RunConfig, dump
from mmalign.core import Needs, Objective
from mmalign.core.terms import Preference
from mmalign.data.example import Example
from mmalign.errors import CheckpointError, ConfigError
from mmalign.evaluate import TIED, Evaluation, Tally, is_tied, score, summarise
from mmalign.models.adapter import Adapter, Saved, build_adapter, tools_of
from mmalign.train.checkpoint import publish
from mmalign.train.metrics import append_json, read_json
from mmalign.train.order import eval_batches, own_random_stream
from mmalign.train.run import Run


class HeldOut:
    """The eval rows of a run, scored by every process, written down by the main one."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._rows = run.tools.eval_examples(run.config, run.eval_rows)
        needs = run.objective.needs
        has_kl = needs.reference and run.adapter.provides(run.config).kl
        self._needs = needs | Needs(kl=True) if has_kl else needs  # reported, if not trained on
        shown = run.config.sample
        given = {f"prompt-{i}": prompt for i, prompt in enumerate(shown.prompts)}
        ask = run.tools.to_prompt
        self._prompts = given or _first_prompts(run.eval_rows, shown.num_prompts, ask)

    def evaluate(self, step: int) -> dict[str, float]:
        """Score all rows, append to eval.jsonl, and return the metrics as `eval_NAME`."""
        run = self._run
        if not self._rows:
            return {}
        result = self._score()
        if run.accelerator.is_main_process:
            record = {"step": step, **result.metrics, "intervals": result.intervals}
            append_json(run.config.output / "eval.jsonl", [{**record, "rows": result.rows}])
        return {f"eval_{name}": value for name, value in result.metrics.items()}

    def _score(self) -> Evaluation:
        run, train = self._run, self._run.config.train
        batches = eval_batches(len(self._rows), train.eval_batch_size or train.batch_size)
        here, num = run.accelerator.process_index, run.accelerator.num_processes
        tallies: list[tuple[int, Tally]] = []
        run.model.eval()
        with own_random_stream(train.seed):
            for turn in range(math.ceil(len(batches) / num)):
                index = turn * num + here
                # Every process scores as many batches: a sharded forward, and a loss that looks at
                # all processes, wait for each other. What is scored twice is counted once.
                rows = [self._rows[i] for i in batches[index % len(batches)]]
                batch = run.adapter.collate(rows).to(run.accelerator.device)
                tally = score(
                    run.model, run.objective, batch, self._needs, run.adapter.per_row_columns
                )
                if index < len(batches):
                    tallies.append((index, tally))
        run.model.train()
        gathered = sorted(gather_object(tallies), key=lambda item: item[0])
        total = sum((tally for _, tally in gathered), Tally())
        also = run.tools.summarise(run.config, total.rows)
        return summarise(total, beta=reward_beta(run.objective), also=also)

    def sample(self, step: int) -> None:
        """Generate for the first eval prompts and append to samples.jsonl."""
        run = self._run
        if not self._prompts or not self.can_sample or not run.accelerator.is_main_process:
            return
        output, options = run.config.output, run.config.sample
        run.adapter.eval()
        with own_random_stream(run.config.train.seed):
            records = run.tools.write_samples(run.adapter, self._prompts, output, step, options)
        run.adapter.train()
        append_json(output / "samples.jsonl", [{"step": step, **record} for record in records])

    @property
    def can_sample(self) -> bool:
        """Whether the adapter generates, and one process alone holds the weights to do it with."""
        return type(self._run.adapter).sample is not Adapter.sample and not self._run.is_sharded


OF_REFERENCE = ("reward_accuracy", "log_ratio_margin")
"""Held-out metrics that compare policy and reference."""


class Best:
    """The best held-out value so far by `train.best_metric`, of the evaluations after step 0."""

    def __init__(self, run: Run) -> None:
        """Of the evaluations that the run folder knows already, if their best weights are there.

        Raises:
            ConfigError: The run has no held-out rows, or no reference for what asks for one.
        """
        self.metric, self.patience = run.config.train.best_metric, run.config.train.patience
        self._values: list[float] = []
        if self.metric is None:
            return
        if not run.eval_rows:
            raise self._missing("it has no held-out rows")
        if self.metric in OF_REFERENCE and not run.objective.needs.reference:
            raise self._missing("its objective has no reference")
        output = run.config.output
        known = read_json(output / "eval.jsonl") if (output / "best").is_dir() else []
        for record in broadcast_object_list([known])[0]:
            self.add(record["step"], {f"eval_{self.metric}": record.get(self.metric)})

    def add(self, step: int, values: Mapping[str, float | None]) -> bool:
        """Note what an evaluation gave; whether it is the best so far.

        Raises:
            ConfigError: The run has no such metric.
        """
        if self.metric is None:
            return False
        value = values.get(f"eval_{self.metric}")
        if value is None:
            names = ", ".join(name.removeprefix("eval_") for name in values)
            raise self._missing(f"its evaluations give {names}")
        if step == 0:
            return False
        self._values.append(-value if self.metric == "loss" else value)
        return self._values[-1] > max(self._values[:-1], default=-math.inf)

    def _missing(self, why: str) -> ConfigError:
        return ConfigError(f"train.best_metric is {self.metric}, which this run lacks: {why}")

    @property
    def is_stale(self) -> bool:
        """Whether the run is to end: `train.patience` evaluations since the best one."""
        if self.patience is None or not self._values:
            return False
        return len(self._values) - 1 - self._values.index(max(self._values)) >= self.patience


def reward_beta(objective: Objective) -> float | None:
    """The first preference term's beta, in 1/nats, where one number with a reference exists."""
    for term in objective.terms.values():
        if isinstance(term, Preference):
            beta = term.score.beta
            plain = term.score.needs.reference and term.score.reduce == "sum"
            return beta if plain and not isinstance(beta, tuple) else None
    return None


def _first_prompts(
    rows: Sequence[Example], count: int, ask: Callable[[Example], Hashable]
) -> Mapping[str, Any]:
    """Row id to what is asked in it, for the first `count` different questions."""
    seen: dict[Hashable, str] = {}
    for row in rows:
        if len(seen) == count:
            break
        seen.setdefault(ask(row), row.id)
    return {row: prompt for prompt, row in seen.items()}


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
    "errors/chosen_diff": "error of the preferred images, policy minus reference",
    "errors/rejected_diff": "error of the rejected images, policy minus reference",
}

_TEMPLATE = """\
---
{front_matter}
---

# {name}

`{model}`, trained with the preference objective `{objective}` for {steps:,} steps by
mmalign {version}.
{files}
## Held-out numbers

{numbers}

## Data

{train_rows:,} training rows (content hash `{train_hash}`),
{eval_rows:,} held-out rows (`{eval_hash}`).
{found}
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
    saved: Saved | None = None,
) -> str:
    """The text of README.md.

    Args:
        config: The full configuration.
        environment: What env.json holds.
        evaluations: The records of eval.jsonl, in order of the step.
        step: Optimizer steps done.
        saved: The files beside it.
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
        files=_files(saved),
        numbers=_numbers(evaluations),
        found=_found(environment["data"].get("notes") or ()),
        config=dump(config),
        versions=", ".join(f"{name} {value}" for name, value in versions.items() if value),
        **environment["data"],
    )


def _front_matter(config: RunConfig) -> str:
    """What a hub reads of a card: the base, its license, what loads the weights, the data."""
    tools = tools_of(config.modality)
    lora = config.model.lora is not None or config.model.adapter is not None
    base = _hub_name(config.model.path)
    about = {
        "base_model": base,
        "base_model_relation": base and ("adapter" if lora else "finetune"),
        "library_name": tools.hub_library(lora=lora),
        "pipeline_tag": tools.pipeline_tag,
        "license": _license(config),
        "datasets": list(filter(None, (_hub_name(s.path) for s in config.data.train))),
        "tags": ["mmalign", "preference-alignment"],
    }
    return yaml.safe_dump({k: v for k, v in about.items() if v}, sort_keys=False).strip()


def _hub_name(path: str) -> str | None:
    """A path that is a name on a hub, and no file or folder of this machine."""
    try:
        validate_repo_id(path)
    except HFValidationError:
        return None
    return None if Path(path).exists() else path


def _license(config: RunConfig) -> str | None:
    """What the card of the base says, where that lies on this machine."""
    path = config.model.path
    found = Path(path) / "README.md" if _is_local(config) else None
    if _hub_name(path):
        found = try_to_load_from_cache(path, "README.md", revision=config.model.revision)
    if not isinstance(found, str | Path) or not Path(found).is_file():
        return None
    try:
        said = (metadata_load(found) or {}).get("license")
    except (OSError, ValueError, yaml.YAMLError):  # a card of a stranger's
        return None
    return said if isinstance(said, str) else None


def _is_local(config: RunConfig) -> bool:
    """Whether the model is a folder, whose place means nothing on another machine."""
    return Path(config.model.path).exists()


def _files(saved: Saved | None) -> str:
    """Which program reads which file, and what is missing."""
    if saved is None or not saved.readers:
        return ""
    rows = [f"| `{file}` | {readers} |" for file, readers in saved.readers.items()]
    table = "\n".join(["| file | read by |", "| --- | --- |", *rows])
    notes = "".join(f"\n{note}.\n" for note in saved.notes)
    return f"\n## Files\n\n{table}\n{notes}"


def _found(notes: Sequence[str]) -> str:
    """What was found in the rows before the first step: what was cut, what was left out."""
    lines = [f"\n- {' '.join(note.split())}" for note in notes]
    return "".join([*lines, "\n"] if lines else lines)


def _numbers(evaluations: Sequence[Mapping[str, Any]]) -> str:
    if not evaluations:
        return "None: the run had no held-out rows."
    first, last = evaluations[0], evaluations[-1]
    tied = is_tied(first)
    rows = [
        f"| {label} | {'all tied' if tied and key == TIED else _number(first, key)} "
        f"| {_number(last, key)} |"
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


def save_final(run: Run, environment: Mapping[str, Any], name: str = "final") -> Path:
    """Write `final/`, or `best/`; it appears complete or not at all. Called by every process."""
    output = run.config.output
    target, temporary = output / name, output / f".{name}.tmp"
    adapter = run.adapter
    if run.is_sharded:
        whole = run.accelerator.get_state_dict(run.model)  # every process gives its part
        if run.accelerator.is_main_process:
            adapter = build_adapter(run.config, run.objective.needs)
            _take_over(adapter, whole)
    if run.accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        saved = adapter.save(temporary) or Saved()
        evaluations = read_json(output / "eval.jsonl")
        card = model_card(run.config, environment, evaluations, run.position.step, saved)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        publish(temporary, target)
        for note in saved.notes:
            run.accelerator.print(note)
    run.accelerator.wait_for_everyone()
    return target


def _take_over(adapter: Adapter, whole: Mapping[str, Any]) -> None:
    """Put the parts of all processes, gathered, into a model that is not sharded."""
    missing = set(adapter.load_state_dict(whole, strict=False).missing_keys)
    lost = [name for name, p in adapter.named_parameters() if p.requires_grad and name in missing]
    if lost:
        raise CheckpointError(
            f"{len(lost)} trained tensors were not gathered from the processes, e.g. {lost[0]}, so "
            "final/ would hold their start; the checkpoints are whole"
        )
