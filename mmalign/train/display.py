"""Console output of a training run: its size, its progress, and in one sentence what stopped it."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from safetensors import SafetensorError

from mmalign.core import CandidateLogps, Loss
from mmalign.errors import CheckpointError, DataError
from mmalign.models.batch import Batch
from mmalign.safe import escaped
from mmalign.train.checkpoint import checkpoints
from mmalign.train.files import sweep
from mmalign.train.run import Run

_SHOWN = (  # metric, label, format
    ("loss", "loss", ".4f"),
    ("rewards/margins", "margin", "+.3f"),
    ("rewards/accuracies", "accuracy", ".2f"),
    ("rows_per_second", "rows/s", ".1f"),
    ("tokens_per_second", "tokens/s", ".0f"),
    ("images_per_second", "images/s", ".1f"),
)
_HELD_OUT = (
    ("eval_loss", "loss", ".4f"),
    ("eval_reward_accuracy", "reward accuracy", ".2f"),
    ("eval_ranking_accuracy", "ranking accuracy", ".2f"),
    ("eval_separation", "separation", ".2f"),
    ("eval_log_ratio_margin", "log-ratio margin", "+.2f"),
)
_SECONDS_BETWEEN_LINES = 5.0
_WIDTH_FOR_A_BAR = 120  # columns of a terminal that hold the numbers beside a bar


class Display:
    """Progress of a run on stderr; silent on all but the main process."""

    def __init__(self, run: Run) -> None:
        self._num_steps = run.num_steps
        self._start = run.position.step
        self._rows_per_step = run.order.rows_per_step
        self._is_main = run.accelerator.is_main_process
        self._began = time.perf_counter()
        self._last_line = -_SECONDS_BETWEEN_LINES
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        if self._is_main and sys.stderr.isatty():
            # Only the numbers wrap where a line is too long: rich would drop step and time left.
            whole = Column(no_wrap=True)
            console = Console(stderr=True)
            columns = (
                TextColumn("step"),
                MofNCompleteColumn(table_column=whole),
                *([BarColumn(bar_width=20)] if console.width >= _WIDTH_FOR_A_BAR else []),
                TimeElapsedColumn(table_column=whole),
                TextColumn("left"),
                TimeRemainingColumn(table_column=whole),
                TextColumn("{task.fields[values]}", table_column=Column()),
            )
            bar = Progress(*columns, console=console)
            self._bar = self._stack.enter_context(bar)
            self._task = bar.add_task(
                "train", total=self._num_steps, completed=self._start, values=""
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def say(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        text = escaped(text)
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
        elif self._is_main:
            print(text, file=sys.stderr, flush=True)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Show how far the run is; `values` is empty between two log lines."""
        text = _line(_SHOWN, values)
        if self._bar is not None and self._task is not None:
            shown: dict[str, Any] = {"values": text} if text else {}
            self._bar.update(self._task, completed=step, **shown)
            return
        elapsed = time.perf_counter() - self._began
        due = step == self._num_steps or elapsed - self._last_line >= _SECONDS_BETWEEN_LINES
        if text and due:
            self._last_line = elapsed
            rows = (self._num_steps - step) * self._rows_per_step
            left = round(rows / values["rows_per_second"])  # of training alone
            self.say(f"step {step}/{self._num_steps}  {text}  left {left // 60}:{left % 60:02d}")

    def held_out(self, step: int, values: Mapping[str, float]) -> None:
        """Show a held-out evaluation."""
        self.say(f"held out at step {step}: {_line(_HELD_OUT, values)}")


def _line(wanted: Iterable[tuple[str, str, str]], values: Mapping[str, float]) -> str:
    return "  ".join(f"{label} {values[key]:{how}}" for key, label, how in wanted if key in values)


def describe_dry_run(run: Run, batch: Batch, loss: Loss, logps: CandidateLogps) -> str:
    """What `--dry-run` prints of one micro-batch: that all fits together, and how large it is."""
    parameters = [(p.numel(), p.requires_grad) for p in run.adapter.parameters()]
    trainable = sum(size for size, is_trainable in parameters if is_trainable)
    total = sum(size for size, _ in parameters)
    gradients = [p.grad for p in run.adapter.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    values = {"loss": loss.value, **loss.metrics}
    shapes = {**batch.inputs.flat(), "labels": batch.labels}
    return "\n".join(
        [
            f"rows        {len(run.train_rows):,} to train on, {len(run.eval_rows):,} held out",
            f"steps       {run.num_steps:,} of {run.order.rows_per_step:,} rows",
            f"objective   needs {run.objective.needs.describe()}",
            f"parameters  {trainable:,} of {total:,} are trained",
            *_section("batch", {name: _shape(value) for name, value in shapes.items()}),
            *_section("scores", {name: _shape(value) for name, value in logps.tensors()}),
            *_section("metrics", {name: f"{float(value):.6g}" for name, value in values.items()}),
            f"gradient    norm {float(norm):.6g}",
            f"memory      {_peak_memory(run.accelerator.device) / 2**20:,.0f} MiB at most",
        ]
    )


def _section(title: str, lines: dict[str, str]) -> list[str]:
    width = max(len(name) for name in lines)
    return [title, *(f"  {name:<{width}}  {text}" for name, text in lines.items())]


def _shape(value: torch.Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


def _peak_memory(device: torch.device) -> float:
    """Bytes: of the accelerator's memory where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# What a machine does to a run, said in one sentence; nothing half-written stays.

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
