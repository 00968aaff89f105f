"""Checkpoints that are either whole or not there, and a resume that changes no bit.

    checkpoint-40/
        run.json              step, rows and tokens seen, what the run is made of, sums of all files
        weights.safetensors   trainable parameters by name
        optimizer.pt          the optimizer's state
        state.safetensors     buffers of the objective (BCO's shift) and of the adapter (EMA)
        process-0.pt          random streams and running averages, one file a process
        sharded/              instead of the first two where parameters are sharded

It is written under another name, flushed to the disk, and renamed, in this order. So whatever
moment the machine dies at, a folder with this name is complete.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import save_file
from torch import nn

from mmalign.core import Objective
from mmalign.data.jobs import first_few
from mmalign.errors import CheckpointError
from mmalign.models.adapter import Adapter
from mmalign.models.files import put_tensors, read_tensors, usual_mode
from mmalign.train.files import Table, changed_files, differences, sweep, touched
from mmalign.train.metrics import flatten, keep_until
from mmalign.train.order import rng_state, set_rng_state
from mmalign.train.run import Run

ABOUT = "run.json"


def write_about(folder: Path, about: Mapping[str, Any]) -> None:
    """Write `run.json`: `about`, size and sum of every other file, and the sum of itself."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sum": _sum(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    whole = {**about, "files": files}
    text = json.dumps({**whole, "sum": _sum_of(whole)}, indent=1)
    (folder / ABOUT).write_text(text, encoding="utf-8")


def read_about(folder: Path, *, only: tuple[str, ...] = ()) -> dict[str, Any]:
    """What `run.json` of a checkpoint says, after looking at every file that it names.

    Args:
        folder: A `checkpoint-N`.
        only: The files that are wanted; (): all.

    Raises:
        CheckpointError: A file is missing, cut or changed, or the folder has another step's name.
    """
    about = _about(folder)
    for name, expected in about["files"].items():
        if only and name not in only:
            continue
        path = folder / name
        if not path.is_file():
            raise _damaged(folder, f"{name} is missing")
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise _damaged(folder, f"{name} has {size:,} bytes of {expected['bytes']:,}")
        if _sum(path) != expected["sum"]:
            raise _damaged(folder, f"{name} holds other bytes than were saved")
    return about


def _about(folder: Path) -> dict[str, Any]:
    try:
        about: Any = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        found = about.pop("sum")
        step = about["position"]["step"]
    except FileNotFoundError:
        raise _damaged(folder, f"{ABOUT} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise _damaged(folder, f"{ABOUT} is damaged, or an older mmalign wrote it") from None
    if found != _sum_of(about):
        raise _damaged(folder, f"{ABOUT} says something else than was saved")
    if folder.name.startswith("checkpoint-") and folder.name != f"checkpoint-{step}":
        raise _damaged(folder, f"{ABOUT} is of step {step}")
    return about


def _damaged(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{folder} is not as it was saved: {what}. Copy it again, or delete this folder: then "
        "--resume goes on from the checkpoint before it, or starts again where there is none"
    )


def _sum(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sum_of(about: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


log = logging.getLogger(__name__)

_NAME = re.compile(r"checkpoint-(\d+)")
_ROWS = "data.train_hash"


def checkpoints(run_dir: Path) -> list[Path]:
    """All checkpoints of a run folder, oldest first."""
    found = [
        (int(match[1]), path)
        for path in run_dir.glob("checkpoint-*")
        if (match := _NAME.fullmatch(path.name)) and path.is_dir()
    ]
    return [path for _, path in sorted(found)]


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
        write_about(temporary, {"position": asdict(run.position), "identity": identity})
        publish(temporary, target)
        for old in checkpoints(run_dir)[: -run.config.train.keep_checkpoints]:
            discard(old)
    accelerator.wait_for_everyone()
    return target


def publish(temporary: Path, target: Path) -> None:
    """Flush a finished folder to the disk and give it its name in one step."""
    usual_mode(temporary)
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


def resume(run: Run, identity: Mapping[str, Any], made_of: Table) -> Path | None:
    """Continue from the newest checkpoint, or from the start where there is none yet.

    Args:
        run: As it was built; its weights, position and random streams are set.
        identity: What it must have in common with the run that saved.
        made_of: Its files, to name those that have changed.

    Raises:
        CheckpointError: The checkpoint is damaged; or config, model, data, media or number of
            processes changed: lists every difference.
    """
    run_dir = run.config.output
    found = checkpoints(run_dir)
    newest = found[-1] if found else None
    if newest is not None:
        about = _looked_through(newest, run)
        _require_same_run(newest, about["identity"], identity, made_of)
        load(newest, run)
        for name, value in about["position"].items():
            setattr(run.position, name, value)
    if run.accelerator.is_main_process:
        if again := touched(run_dir, made_of):
            named = ", ".join(first_few(again))
            log.warning("%s: written again since the run began, alike in what was looked at", named)
        sweep(run_dir)
        for name in ("metrics.jsonl", "samples.jsonl", "eval.jsonl"):
            keep_until(run_dir / name, run.position.step if newest else -1)
    run.accelerator.wait_for_everyone()
    return newest


def _looked_through(path: Path, run: Run) -> dict[str, Any]:
    """What a checkpoint says of itself, once the main process has compared all of its sums."""
    problem: CheckpointError | None = None
    about: dict[str, Any] = {}
    if run.accelerator.is_main_process:
        try:
            about = read_about(path)
        except CheckpointError as error:
            problem = error
    problem, about = broadcast_object_list([problem, about])
    if problem is not None:
        raise problem
    return about


def _require_same_run(
    path: Path, then: Mapping[str, Any], now: Mapping[str, Any], made_of: Table
) -> None:
    before, after = (dict(flatten({**said, "inputs": {}})) for said in (then, now))
    changes = [
        f"{key}: {before.get(key)!r} in the checkpoint, {after.get(key)!r} now"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]
    if before.get(_ROWS) != after.get(_ROWS):
        changes += changed_files(path.parent, made_of, "data")
    changes += differences(then.get("inputs", {}), now.get("inputs", {}), made_of, path.parent)
    if changes:
        raise CheckpointError(
            f"{path}: cannot resume, because this run would not continue that one:\n  "
            + "\n  ".join(first_few(changes))
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
    file = path / "weights.safetensors"
    put_tensors(dict(_trainable(adapter)), read_tensors(file)[0], file)


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
