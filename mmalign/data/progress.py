"""How far a long job is, on a terminal and nowhere else; short jobs show nothing."""

from __future__ import annotations

import os
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

    from rich.progress import Progress

T = TypeVar("T")

DELAY = 1.0  # seconds before a bar appears
_EVERY = 0.1  # seconds between two looks at how far it is

_busy = False  # whether a bar is there: a terminal shows one at a time


def track(
    items: Iterable[T], what: str, *, total: int | None = None, unit: str = "rows", size: int = 1
) -> Generator[T]:
    """The items, unchanged; where they take longer than `DELAY`, a bar on the terminal meanwhile.

    Args:
        items: Anything to go through.
        what: What is being done, e.g. "reading pairs.jsonl".
        total: How many units there are; None where nobody knows.
        unit: What is counted.
        size: Units of one item.
    """
    if not _is_watched():
        yield from items
        return
    shown: Progress | None = None
    began = looked = time.monotonic()
    done = 0
    try:
        for item in items:
            yield item
            done += size
            now = time.monotonic()
            if now - looked < _EVERY:
                continue
            looked = now
            if shown is None and now - began > DELAY and not _busy:
                shown = _start(what, total)
            if shown is not None:
                count = f"{done:,} {unit}" if total is None else f"{min(done, total):,}/{total:,}"
                shown.update(shown.task_ids[0], completed=done, count=count)
    finally:
        if shown is not None:
            _stop(shown)


@contextmanager
def waiting(what: str) -> Generator[None]:
    """Say on the terminal what is being waited for, where nothing can be counted."""
    if not _is_watched() or _busy:
        yield
        return
    shown = _start(what, None)
    try:
        yield
    finally:
        _stop(shown)


def is_main_process() -> bool:
    """Whether this is the process that reports and writes, where several train one model."""
    return os.environ.get("RANK", "0") == "0"


def _is_watched() -> bool:
    """Whether somebody looks on, and this is the process that reports."""
    return sys.stderr.isatty() and is_main_process()


def _start(what: str, total: int | None) -> Progress:
    global _busy
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    _busy = True
    middle = SpinnerColumn() if total is None else BarColumn(bar_width=20)
    columns = (
        TextColumn("{task.description}", markup=False),
        middle,
        TextColumn("{task.fields[count]}"),
    )
    shown = Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True)
    shown.add_task(what, total=total, count="")
    shown.start()
    return shown


def _stop(shown: Progress) -> None:
    global _busy
    shown.stop()
    _busy = False
