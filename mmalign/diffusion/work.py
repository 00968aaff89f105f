"""Long work in stages: its share for each process, and what a person sees of it."""

from __future__ import annotations

import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from concurrent.futures import Future

    import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

FIRST_LINE, NEXT_LINE = 5.0, 30.0
"""Seconds of work before the first line of progress, and between two, where there is no bar."""


def is_mine(key: str, process: int, num_processes: int) -> bool:
    """Whether an entry falls to a process: by its key alone, so that all agree on it."""
    return int(key[:12], 16) % num_processes == process


class Processes:
    """Where this process works, what falls to it, and how it waits for the others.

    Waiting has a group of its own: the one of training gives up after some minutes, and shares of
    hours of work do not end so close together.

    Args:
        device: Of this process.
        number: Of this process, from 0.
        total: Of processes.
    """

    def __init__(self, device: torch.device, number: int = 0, total: int = 1) -> None:
        self.device, self.number, self.total = device, number, total
        self._group: Any = None
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(days=30))

    @classmethod
    def launched(cls) -> Self:
        """As accelerate or torchrun started it."""
        from accelerate import PartialState

        state = PartialState()
        return cls(cast("torch.device", state.device), state.process_index, state.num_processes)

    @property
    def is_main(self) -> bool:
        """Whether it is the one that speaks."""
        return self.number == 0

    def is_mine(self, key: str) -> bool:
        """Whether an entry falls to this process."""
        return is_mine(key, self.number, self.total)

    def wait(self) -> None:
        """Until all are here."""
        if self._group is not None:
            dist.barrier(group=self._group)

    def gather(self, value: Result) -> list[Result]:
        """The values of all processes."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.total
        dist.all_gather_object(values, value, group=self._group)
        return values


def ahead(
    items: Iterable[Item], load: Callable[[Item], Result], *, threads: int, depth: int
) -> Iterator[Result]:
    """`load` of every item, in order, by threads that are at most `depth` items ahead."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(load, item))
                if len(waiting) >= depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def progress(what: str, total: int, *, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, elsewhere a line now and then; both with the time that is left.

    Args:
        what: Name of the stage.
        total: Of what is counted; at 0 nothing is shown.
        shown: Whether this process shows anything.

    Yields:
        A function to call with the number of things done since the last call.
    """
    if not shown or not total:
        yield lambda _: None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True)) as bars:
            task = bars.add_task(what, total=total)
            yield lambda number: bars.advance(task, number)
    else:
        yield _Lines(what, total)


class _Lines:
    """Writes a line to stderr after some seconds of work, and then at times."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done = what, total, 0
        self.began = time.monotonic()
        self.due = self.began + FIRST_LINE

    def __call__(self, number: int) -> None:
        self.done += number
        now = time.monotonic()
        if now < self.due or not self.done:
            return
        self.due = now + NEXT_LINE
        speed = self.done / (now - self.began)
        left = duration((self.total - self.done) / speed)
        line = f"{self.what}: {self.done} of {self.total}, {speed:.3g} a second, {left} left"
        print(line, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Seconds for people: 40 s, 12 min, 3 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
