"""What a machine does to a run, said in one sentence; nothing half-written stays."""

from __future__ import annotations

import errno
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from mmalign.errors import CheckpointError, DataError
from mmalign.train.checkpoint import checkpoints
from mmalign.train.files import sweep

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mmalign.train.run import Run

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_TORCH_WRITER = ("PytorchStreamWriter", "inline_container")  # how torch.save names its own file
_WORKER = "DataLoader worker"


@contextmanager
def explained(run: Run) -> Iterator[None]:
    """Turn what the disk refuses, and the end of a loader worker, into an error of the input.

    Raises:
        CheckpointError: A file of the run folder cannot be written.
        DataError: A process that prepares batches was ended.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        folder = run.config.output
        if _WORKER in str(error):
            kind, what = DataError, _of_worker(str(error), run)
        elif reason := _refusal(error, folder):
            kind, what = CheckpointError, f"{folder} cannot be written to: {reason}."
        else:
            raise
        if run.accelerator.is_main_process:
            sweep(folder)
        raise kind(f"after step {run.position.step}: {what} {_how_to_go_on(folder)}") from error


def _how_to_go_on(folder: Path) -> str:
    if not (folder / "config.yaml").is_file():
        return "Then start again: nothing was saved yet"
    found = checkpoints(folder)
    kept = f"from {found[-1]}" if found else "from the start, since no checkpoint was saved yet"
    return f"Then go on {kept}, with: mmalign train {folder / 'config.yaml'} --resume"


def _refusal(error: Exception, folder: Path) -> str | None:
    """Why a file could not be written, in the system's words; None: that is not what happened."""
    if isinstance(error, OSError):
        name = error.filename if isinstance(error.filename, str) else ""
        inside = bool(name) and Path(name).is_relative_to(folder)
        if error.errno not in _DISK and not inside:
            return None
        return _in_words(error.errno or 0, folder)
    if isinstance(error, SafetensorError):
        number = re.search(r"os error (\d+)", str(error))
        return _in_words(int(number[1]), folder) if number else None
    if any(name in str(error) for name in _TORCH_WRITER):
        return f"a file could not be written to its end{_room(folder)}; make room, or raise a limit"
    return None


def _in_words(number: int, folder: Path) -> str:
    advice = {
        errno.ENOSPC: f"{_room(folder)}; make room",
        errno.EDQUOT: "; make room, or ask for a larger quota",
        errno.EFBIG: "; raise the limit on the size of files (ulimit -f)",
        errno.EROFS: "; make it writable",
    }
    return os.strerror(number) + advice.get(number, "")


def _room(folder: Path) -> str:
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return ""
    return f" ({free / 1e6:,.1f} MB are free)"


def _of_worker(text: str, run: Run) -> str:
    said = text.partition(_WORKER)[2].partition(".")[0].strip()
    return (
        f"a process that prepares batches {said}; a system without memory left does that. Lower "
        f"data.num_workers (it is {run.config.data.num_workers}), or give it more memory."
    )
