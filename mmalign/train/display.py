"""What a person sees of a running training: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Self

from mmalign.safe import escaped

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from types import TracebackType

    from rich.progress import Progress, TaskID

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
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )
            from rich.table import Column

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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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
            if text:
                self._bar.update(self._task, completed=step, values=text)
            else:
                self._bar.update(self._task, completed=step)
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
