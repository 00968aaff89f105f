"""Checkpoints that are either whole or not there, and a resume that changes no bit.

    checkpoint-40/
        run.json              step, rows and tokens seen, config, data hash, size of every file
        weights.safetensors   trainable parameters by name
        optimizer.pt          the optimiser's state
        state.safetensors     buffers of the objective (BCO's shift) and of the adapter (EMA)
        process-0.pt          random streams and running averages, one file a process
        sharded/              instead of the first two where parameters are sharded

It is written under another name, flushed to the disk, and renamed, in this order. So whatever
moment the machine dies at, a folder with this name is complete.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from mmalign.errors import CheckpointError
from mmalign.models.files import read_tensors
from mmalign.train.metrics import flatten, keep_until
from mmalign.train.rng import rng_state, set_rng_state

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import nn

    from mmalign.core import Objective
    from mmalign.models.adapter import Adapter
    from mmalign.train.run import Run

_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoints(run_dir: Path) -> list[Path]:
    """All complete checkpoints of a run folder, oldest first."""
    found = [
        (int(match[1]), path)
        for path in run_dir.glob("checkpoint-*")
        if (match := _NAME.fullmatch(path.name)) and _is_complete(path)
    ]
    return [path for _, path in sorted(found)]


def _is_complete(path: Path) -> bool:
    """Whether every file is there in its full size; false for a copy that was interrupted."""
    try:
        sizes = json.loads((path / "run.json").read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError):
        return False
    return all(
        (path / name).is_file() and (path / name).stat().st_size == size
        for name, size in sizes.items()
    )


def save(run: Run, identity: Mapping[str, Any]) -> Path:
    """Write `checkpoint-STEP`, then delete the oldest ones. Called by every process.

    Args:
        run: What to save.
        identity: What a run that resumes from here must have in common with this one.
    """
    accelerator, run_dir = run.accelerator, run.config.output
    target = run_dir / f"checkpoint-{run.position.step}"
    temporary = run_dir / f".{target.name}.tmp"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)  # left over from a run that died here
        temporary.mkdir()
    accelerator.wait_for_everyone()

    if run.is_sharded:
        accelerator.save_state(str(temporary / "sharded"))
    process = {"rng": rng_state(), "averages": run.averages.state()}
    torch.save(process, temporary / f"process-{accelerator.process_index}.pt")
    accelerator.wait_for_everyone()

    if accelerator.is_main_process:
        if not run.is_sharded:
            weights = {name: p.detach().contiguous() for name, p in _trainable(run.adapter)}
            save_file(weights, temporary / "weights.safetensors")
            torch.save(run.optimizer.state_dict(), temporary / "optimizer.pt")
        save_file(_other_tensors(run), temporary / "state.safetensors")
        files = {
            path.relative_to(temporary).as_posix(): path.stat().st_size
            for path in sorted(temporary.rglob("*"))
            if path.is_file()
        }
        about = {"position": asdict(run.position), "identity": identity, "files": files}
        (temporary / "run.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
        publish(temporary, target)
        for old in checkpoints(run_dir)[: -run.config.train.keep_checkpoints]:
            discard(old)
    accelerator.wait_for_everyone()
    return target


def publish(temporary: Path, target: Path) -> None:
    """Flush a finished folder to the disk and give it its name in one step."""
    for path in [*temporary.rglob("*"), temporary]:
        _flush(path)
    if target.exists():
        discard(target)
    os.replace(temporary, target)
    _flush(target.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def discard(path: Path) -> None:
    """Delete a folder; from the first moment on it no longer has its name."""
    doomed = path.with_name(f".{path.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(path, doomed)
    shutil.rmtree(doomed)


def resume(run: Run, identity: Mapping[str, Any]) -> Path | None:
    """Continue from the newest complete checkpoint, or from the start where there is none yet.

    Raises:
        CheckpointError: Config, data or number of processes changed; lists every difference.
    """
    run_dir = run.config.output
    found = checkpoints(run_dir)
    newest = found[-1] if found else None
    if newest is not None:
        about = json.loads((newest / "run.json").read_text(encoding="utf-8"))
        _require_same_run(newest, about["identity"], identity)
        load(newest, run)
        for name, value in about["position"].items():
            setattr(run.position, name, value)
    if run.accelerator.is_main_process:
        for path in [*run_dir.glob(".*.tmp"), *run_dir.glob(".*.old")]:  # a killed run's leftovers
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name in ("metrics.jsonl", "samples.jsonl", "eval.jsonl"):
            keep_until(run_dir / name, run.position.step if newest else -1)
    run.accelerator.wait_for_everyone()
    return newest


def _require_same_run(path: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    before, after = dict(flatten(then)), dict(flatten(now))
    changes = [
        f"{key}: {before.get(key)!r} in the checkpoint, {after.get(key)!r} now"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]
    if changes:
        raise CheckpointError(
            f"{path}: cannot resume, because this run would not continue that one:\n  "
            + "\n  ".join(changes)
            + "\nRestore these values, or start a new run in another output folder"
        )


def load(path: Path, run: Run) -> None:
    """Put everything but the position back as `save` found it. Called by every process."""
    if run.is_sharded:
        run.accelerator.load_state(str(path / "sharded"))
    else:
        load_weights(path, run.adapter)
        optimizer = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
        run.optimizer.load_state_dict(optimizer)  # moves it to where the parameters are
    load_state(path, run.adapter, run.objective)

    own = f"process-{run.accelerator.process_index}.pt"
    process = torch.load(path / own, map_location="cpu", weights_only=True)
    run.averages.load(process["averages"])
    set_rng_state(process["rng"])  # last: what came before may have drawn


def load_weights(path: Path, adapter: Adapter) -> None:
    """Put the trained parameters of a checkpoint that is not sharded into an adapter."""
    weights = read_tensors(path / "weights.safetensors")[0]
    parameters = dict(_trainable(adapter))
    if weights.keys() != parameters.keys():
        odd = sorted(weights.keys() ^ parameters.keys())
        raise CheckpointError(
            f"{path / 'weights.safetensors'}: its parameters are not those of the model; "
            f"{len(odd)} are only in one of them, e.g. {odd[0]}"
        )
    for name, parameter in parameters.items():
        if weights[name].shape != parameter.shape:
            raise CheckpointError(
                f"{path / 'weights.safetensors'}: {name} is {list(weights[name].shape)} there and "
                f"{list(parameter.shape)} in the model"
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def load_state(path: Path, adapter: Adapter, objective: Objective) -> None:
    """Put back what changes in a run beside the weights: running statistics, an EMA reference."""
    parts: dict[str, dict[str, torch.Tensor]] = {"objective": {}, "adapter": {}}
    for key, value in read_tensors(path / "state.safetensors")[0].items():
        owner, name = key.split("/", 1)
        parts[owner][name] = value
    objective.load_state_dict(parts["objective"])
    adapter.load_extra_state(parts["adapter"])


def _trainable(adapter: Adapter) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in adapter.named_parameters() if p.requires_grad]


def _other_tensors(run: Run) -> dict[str, torch.Tensor]:
    objective = {f"objective/{key}": value for key, value in run.objective.state_dict().items()}
    adapter = {f"adapter/{key}": value for key, value in run.adapter.extra_state().items()}
    return {key: value.contiguous().clone() for key, value in (objective | adapter).items()}
