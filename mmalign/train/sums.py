"""Whether a checkpoint is, byte for byte, what was saved."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from mmalign.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

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
        "--resume goes on from the checkpoint before it, or begins anew where there is none"
    )


def _sum(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sum_of(about: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
