"""The files of a run folder that do not change while it trains."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import mmalign
from mmalign.config import dump
from mmalign.core.presets import source
from mmalign.data.example import Picture
from mmalign.data.jobs import LOCK
from mmalign.errors import CheckpointError, ConfigError
from mmalign.train.inputs import TABLE, files_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mmalign.config import RunConfig
    from mmalign.data.example import Example
    from mmalign.train.run import Run

_PACKAGES = ("torch", "transformers", "diffusers", "peft", "accelerate", "datasets", "safetensors")


_BEGINNING = ("env.json", TABLE)  # written before config.yaml, which makes a folder a run
_LEFT = re.compile(
    r"\.(checkpoint-\d+|final)\.(tmp|old)|\.(env\.json|inputs\.json|config\.yaml|report\.html|"
    r"(metrics|eval|samples)\.jsonl)\.tmp"
)


def require_output(run_dir: Path, *, resume: bool) -> None:
    """Refuse to mix two runs in one folder, or to resume where there is none.

    A run that ended before it had written its config.yaml can be begun again, by either way.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"output {run_dir} is a file; give a folder")
    found = sorted(path.name for path in run_dir.iterdir()) if run_dir.exists() else []
    found = [name for name in found if name != LOCK]
    if resume and "config.yaml" in found:
        return
    foreign = [name for name in found if not _is_left_over(run_dir / name)]
    if resume and (foreign or not found):
        raise CheckpointError(
            f"{run_dir}: there is no run to resume; check `output`, or start one without --resume"
        )
    if foreign:
        some = ", ".join(found[:4]) + (", ..." if len(found) > 4 else "")
        raise ConfigError(
            f"output {run_dir} is not empty (it holds {some}). Continue that run with --resume, "
            "choose another output, or delete the folder"
        )


def _is_left_over(path: Path) -> bool:
    """Whether a run that never began has left this file."""
    if path.name not in _BEGINNING:
        return _LEFT.fullmatch(path.name) is not None
    try:
        said: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(said, dict):
        return False
    return not said or "mmalign" in said or path.name == TABLE


def sweep(run_dir: Path) -> None:
    """Remove what a run that was killed has left half-written; nothing that is not its own."""
    for path in run_dir.glob(".*"):
        if _LEFT.fullmatch(path.name):
            is_folder = path.is_dir() and not path.is_symlink()
            shutil.rmtree(path, ignore_errors=True) if is_folder else path.unlink(missing_ok=True)


def rows_hash(rows: Sequence[Example]) -> str:
    """A hash of what the rows say, in their order; 16 hexadecimal digits.

    A file counts by its number among those that the rows show: the rows are the same where they lie
    in another place. Noise is drawn by the names of pictures and of their folders, so these count.
    Ids count for nothing, since those that are made up name the file.
    """
    digest = hashlib.sha256()
    numbers: dict[Path, int] = {}
    for row in rows:
        said = (row.kind, row.prompt, row.template, row.candidates, row.labels, row.weight)
        text = repr((*said, row.media) if row.media else said)
        for picture in (c.response for c in row.candidates if isinstance(c.response, Picture)):
            path = picture.path
            text = text.replace(repr(path), f"{path.parent.name}/{path.name}")
        for file in files_of(row):
            text = text.replace(repr(file), f"file {numbers.setdefault(file, len(numbers))}")
        digest.update(text.encode())
    return digest.hexdigest()[:16]


def describe_environment(run: Run) -> dict[str, Any]:
    """Versions, device and data: what one needs to know to run the same again elsewhere."""
    accelerator = run.accelerator
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "mmalign": mmalign.__version__,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "system": platform.system(),
        "packages": {package: _version(package) for package in _PACKAGES},
        "device": device.type,
        "device_name": name,
        "distributed": accelerator.distributed_type.value,
        "num_processes": accelerator.num_processes,
        "num_threads": torch.get_num_threads(),
        "losses": {
            name: hashlib.sha256(text.encode()).hexdigest()[:16]
            for name, text in own_losses(run.config).items()
        },
        "data": {
            "train_rows": len(run.train_rows),
            "train_hash": rows_hash(run.train_rows),
            "eval_rows": len(run.eval_rows),
            "eval_hash": rows_hash(run.eval_rows),
            "notes": list(run.notes),
        },
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of mmalign itself where it runs from a checkout."""
    root = Path(mmalign.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        told = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return told.stdout.strip()


def fixed_facts(environment: Mapping[str, Any]) -> dict[str, Any]:
    """What of it must be the same when a run resumes."""
    facts = {
        "data": {"train_hash": environment["data"]["train_hash"]},
        "num_processes": environment["num_processes"],
    }
    return facts | ({"losses": environment["losses"]} if environment["losses"] else {})


def own_losses(config: RunConfig) -> dict[str, str]:
    """The text of each module with losses of the user's own, by its path beside the config.

    Modules that are installed are not among them.
    """
    objective = config.objective
    found = [source(name, objective.folder) for name in objective.own]
    return {
        file.as_posix(): (folder / file).read_text(encoding="utf-8")
        for folder, file in filter(None, found)
    }


def begin(run: Run, environment: Mapping[str, Any], made_of: Mapping[str, Any]) -> None:
    """Open the run folder with config.yaml, env.json and inputs.json."""
    if run.accelerator.is_main_process:
        output = run.config.output
        output.mkdir(parents=True, exist_ok=True)
        write_text(output / TABLE, json.dumps(made_of, indent=1) + "\n")
        write_text(output / "env.json", json.dumps(environment, indent=2) + "\n")
        write_text(output / "config.yaml", dump(run.config))
        for name, text in own_losses(run.config).items():  # so that the folder stands alone
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            write_text(output / name, text)
    run.accelerator.wait_for_everyone()


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is whole or not there."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
