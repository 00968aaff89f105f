"""Trained weights outside of training: evaluation, samples, caches, and rows as models see them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmalign.config import DataSource, RunConfig
from mmalign.core import Needs, Objective
from mmalign.data.example import Example, Prompt, as_text
from mmalign.data.jobs import write_lines
from mmalign.errors import CheckpointError, ConfigError, DataError
from mmalign.evaluate import Evaluation, evaluate
from mmalign.models import cpu
from mmalign.models.adapter import Adapter, answer_seeds, build_adapter, load_usable, tools_of
from mmalign.preflight.check import check_config
from mmalign.safe import write_text

_OF_RUN = ("env.json", "metrics.jsonl", "final", "checkpoint-*")
"""What lies beside the config in a run folder."""


def evaluate_checkpoint(
    config: RunConfig,
    checkpoint: Path | None,
    *,
    data: str | None = None,
    out: Path | None = None,
    own_loss: bool = False,
) -> Evaluation:
    """Score held-out rows under trained weights.

    Args:
        config: The run's configuration; its reference is the one of before training.
        checkpoint: A `checkpoint-N` or `final` folder; None for the newest of `config.output`.
        data: A file of rows to score instead of the config's held-out ones.
        out: Also write metrics and intervals here, as JSON.
        own_loss: Import a loss of one's own from a run folder, whose code may be a stranger's.

    Raises:
        ConfigError, DataError, CheckpointError: What is missing or does not fit.
    """
    from mmalign.train.final import reward_beta
    from mmalign.train.order import eval_batches

    if not own_loss:
        _refuse_own_loss(config)
    objective = check_config(config)
    tools = tools_of(config.modality)
    config = tools.resolve_config(config)
    folder = trained_folder(config, checkpoint)
    rows = _held_out_rows(config, objective, data)
    device = device_of(config)
    adapter = build_adapter(config, objective.needs).to(device).eval()
    restore(adapter, folder, objective)
    rows = tools.eval_examples(config, rows)
    adapter.setup(rows)
    has_kl = objective.needs.reference and adapter.provides(config).kl
    size = config.train.eval_batch_size or config.train.batch_size
    result = evaluate(
        adapter,
        objective.to(device).eval(),
        (adapter.collate([rows[i] for i in b]).to(device) for b in eval_batches(len(rows), size)),
        needs=objective.needs | Needs(kl=True) if has_kl else objective.needs,
        beta=reward_beta(objective),
        columns=adapter.per_row_columns,
        summary=partial(tools.summarise, config),
    )
    if out is not None:
        record = {"checkpoint": str(folder), "rows": len(rows), "metrics": result.metrics}
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, json.dumps({**record, "intervals": result.intervals}, indent=2) + "\n")
    return result


def _refuse_own_loss(config: RunConfig) -> None:
    """A run folder may be a stranger's, and the loss of its own that it holds is code."""
    own, folder = config.objective.own, config.objective.folder
    if own and folder is not None and any(next(folder.glob(name), None) for name in _OF_RUN):
        raise ConfigError(
            f"{folder}: this run has a loss of its own, {own[0]}, which is code that its folder "
            "holds and that is not imported from there; give the config that you trained with, or "
            "add --own-loss where you trust the folder"
        )


def table(result: Evaluation) -> str:
    """Metrics and their 95 % intervals, one line each."""
    width = max(len(name) for name in result.metrics)
    lines: list[str] = []
    for name, value in result.metrics.items():
        interval = result.intervals.get(name)
        between = f"   {interval[0]:.4g} to {interval[1]:.4g}" if interval else ""
        lines.append(f"{name:<{width}}  {value:>10.4g}{between}")
    return f"{len(result.rows)} rows; behind a mean: its 95 % interval\n" + "\n".join(lines)


def sample_checkpoint(
    config: RunConfig,
    rows: Sequence[Example],
    checkpoint: Path | None,
    *,
    base: bool = False,
    out: Path | None = None,
) -> list[str]:
    """One completion a row's prompt, with the config's `sample` settings, drawn by `train.seed`.

    Args:
        config: The run's configuration.
        rows: Prompts, plain or conversational, with what they show.
        checkpoint: A `checkpoint-N` or `final` folder; None for the newest of `config.output`.
        base: Use the model as it was before training.
        out: Also write prompts, what goes with them, and completions here, as JSONL.

    Raises:
        DataError: A prompt shows what the model does not take, or what cannot be decoded.
    """
    asked = [tools_of(config.modality).to_prompt(row) for row in rows]
    adapter = trained_adapter(config, checkpoint, base=base)
    options = config.sample.model_dump(exclude={"num_prompts", "prompts"})
    size = config.train.eval_batch_size or config.train.batch_size
    seeds = answer_seeds(config.train.seed, asked)
    texts: list[str] = []
    for start in range(0, len(asked), size):
        part = slice(start, start + size)
        texts += map(str, adapter.sample(asked[part], seeds=seeds[part], **options))
    if out is not None:
        write_lines(out, ({**_asked(r), "response": t} for r, t in zip(rows, texts, strict=True)))
    return texts


def last_asked(prompt: Prompt) -> str:
    """The question as a terminal shows it: the last turn, with its role where that is no user."""
    if isinstance(prompt, str) or not prompt:
        return as_text(prompt)
    last = prompt[-1]
    return last.content if last.role == "user" and not last.extra else as_text((last,))


def trained_adapter(config: RunConfig, checkpoint: Path | None, *, base: bool = False) -> Adapter:
    """The policy with trained weights, on its device and ready to sample; it has no reference.

    Args:
        config: The run's configuration.
        checkpoint: A `checkpoint-N` or `final` folder; None for the newest of `config.output`.
        base: As it was before training.
    """
    if base and checkpoint is not None:
        raise ConfigError("sample: --base is the untrained model, so it has no --checkpoint")
    # Without a reference; learned position weights are built because checkpoints hold them. A loss
    # of one's own is not asked: it would have to be imported, and the run may be a stranger's.
    masked = config.text.masks is not None
    weight = masked if config.objective.own else check_config(config).needs.weight
    config = tools_of(config.modality).resolve_config(config)
    folder = None if base else trained_folder(config, checkpoint)
    torch.manual_seed(config.train.seed)
    adapter = build_adapter(config, Needs(weight=weight)).to(device_of(config)).eval()
    if folder is not None:
        restore(adapter, folder)
    return adapter


def trained_folder(config: RunConfig, checkpoint: Path | None) -> Path:
    """The folder of trained weights that is meant: a path, or a name within `config.output`.

    Raises:
        CheckpointError: There is none.
    """
    from mmalign.train.checkpoint import checkpoints

    if checkpoint is not None:
        for folder in (checkpoint, config.output / checkpoint):
            if folder.is_dir():
                return folder
        raise CheckpointError(
            f"--checkpoint {checkpoint}: there is no such folder, here or in {config.output}"
        )
    found = checkpoints(config.output)  # the end of a run is one of them, with all of its state
    if found:
        return found[-1]
    if (config.output / "final").is_dir():
        return config.output / "final"
    raise CheckpointError(
        f"{config.output}: has neither a complete checkpoint nor final/; train first, or name "
        "trained weights with --checkpoint DIR"
    )


def restore(adapter: Adapter, folder: Path, objective: Objective | None = None) -> None:
    """Put trained weights into an adapter that is as it was before training.

    Args:
        adapter: As `build_adapter` made it.
        folder: A `checkpoint-N`, or weights in the layout of peft or transformers.
        objective: Its running state is restored too, where the folder holds one.

    Raises:
        CheckpointError: The folder holds no weights of this model, or they are damaged.
    """
    from mmalign.train import checkpoint

    if (folder / "sharded").is_dir():
        raise CheckpointError(
            f"{folder}: is a checkpoint in parts; only `mmalign train --resume` can read it. Use "
            "the final/ folder of the run"
        )
    if (folder / "run.json").is_file() or (folder / "weights.safetensors").is_file():
        checkpoint.read_about(folder, only=("weights.safetensors", "state.safetensors"))
        checkpoint.load_weights(folder, adapter)
        if objective is not None:
            checkpoint.load_state(folder, adapter, objective)
        return
    policy = adapter.restore(folder)
    own = {id(parameter) for parameter in policy.parameters()}
    others = [n for n, p in adapter.named_parameters() if p.requires_grad and id(p) not in own]
    others += list(adapter.extra_state())
    if objective is not None and others:
        raise CheckpointError(
            f"{folder}: holds the model only, but the loss of this config also reads {others[0]}. "
            "Name a checkpoint-N of the run, which has it"
        )


def _held_out_rows(config: RunConfig, objective: Objective, data: str | None) -> list[Example]:
    if data is not None:
        source = DataSource(path=data)
        changes = {"train": [source], "eval": [], "eval_fraction": 0.0}
        config = config.model_copy(update={"data": config.data.model_copy(update=changes)})
    train, held_out = load_usable(config, objective.needs)
    rows = held_out if data is None else train + held_out
    if not rows:
        raise DataError(
            "the config holds out no rows: set data.eval or data.eval_fraction, or "
            "name a file with --data"
        )
    return rows


def device_of(config: RunConfig) -> torch.device:
    """The device of a run; its CPU threads and memory are set up as it says."""
    from accelerate import Accelerator

    if config.train.num_threads is not None:
        torch.set_num_threads(config.train.num_threads)
    cpu.keep_memory()
    return Accelerator().device


def _asked(row: Example) -> dict[str, Any]:
    """A row's prompt and what goes with it, by the names of its columns."""
    prompt = row.prompt if isinstance(row.prompt, str) else [turn.as_dict() for turn in row.prompt]
    texts = {"tools": row.template.tools, "chat_template_kwargs": row.template.options}
    template = {name: json.loads(text) for name, text in texts.items() if text}
    media = list(map(str, row.media.files()))
    return {"prompt": prompt, **template, **({"media": media} if media else {})}


def write_cache(config: RunConfig) -> str:
    """Store what training would compute again and again; what already exists stays.

    Returns:
        What was done, as a sentence.

    Raises:
        ConfigError: What no cache can hold.
    """
    needs = check_config(config).needs
    device_of(config)  # sets the number of threads
    return tools_of(config.modality).write_cache(config, needs)


def plan_cache(config: RunConfig) -> str:
    """What `write_cache` would write, in words, bytes and time."""
    device_of(config)  # sets the number of threads
    return tools_of(config.modality).plan_cache(config, check_config(config).needs)


def show_rows(config: RunConfig, count: int) -> Any:
    """The first training rows as the model will see them, for a rich console."""
    objective = check_config(config)
    config = tools_of(config.modality).resolve_config(config)
    rows, _ = load_usable(config, objective.needs, first=count)
    return tools_of(config.modality).show_rows(config, rows)
