"""Which rows a step sees, a pure function of seed and step; and the random streams of a process.

So a resumed run replays nothing.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch.utils.data import DataLoader

from mmalign.config import TrainConfig
from mmalign.data.example import Example
from mmalign.errors import MmalignError
from mmalign.models.adapter import Adapter
from mmalign.models.batch import Batch


@lru_cache(maxsize=2)
def _permutation(num_rows: int, seed: int, epoch: int) -> np.ndarray:  # [num_rows]
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


@dataclass(frozen=True, slots=True)
class Order:
    """An endless stream of epochs, each in its own order, cut into full micro-batches.

    Every micro-batch holds `batch_size` rows on every process and every step `rows_per_step`: the
    last step of an epoch is filled with the first rows of the next one. So no row is dropped, no
    batch is short (KTO pairs rows of a batch with each other), and no accumulation window is
    incomplete. Two processes with batch b see the rows of one process with batch 2 b.

    Attributes:
        num_rows: Rows of the training set.
        batch_size: Rows of one micro-batch on one process.
        accumulate: Micro-batches of one optimizer step.
        num_processes: Processes that share a step.
        seed: Decides the order of every epoch.
    """

    num_rows: int
    batch_size: int
    accumulate: int
    num_processes: int
    seed: int

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimizer step over all processes."""
        return self.batch_size * self.accumulate * self.num_processes

    def num_steps(self, train: TrainConfig) -> int:
        """Optimizer steps of a run: `num_steps`, or as many as `num_epochs` passes take."""
        if train.num_steps is not None:
            return train.num_steps
        return max(1, math.ceil(train.num_epochs * self.num_rows / self.rows_per_step))

    def epoch(self, step: int) -> float:
        """Passes over the data after `step` optimizer steps."""
        return step * self.rows_per_step / self.num_rows

    def micro_batch(self, index: int, process: int) -> list[Visit]:
        """The run's micro-batch `index` (counted from 0) on one process."""
        first = (index * self.num_processes + process) * self.batch_size
        positions = (divmod(first + i, self.num_rows) for i in range(self.batch_size))
        rows = ((e, int(_permutation(self.num_rows, self.seed, e)[at])) for e, at in positions)
        return [Visit(row, seed_of(self.seed, epoch, row)) for epoch, row in rows]


class Visit(NamedTuple):
    """A row in a micro-batch, and the seed of what is drawn at random for it this time."""

    row: int
    draw: int


def seed_of(*numbers: int) -> int:
    """63 bits that depend on nothing else: not on the process, the batch size, or a resume."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


@dataclass(frozen=True, slots=True)
class _Visited:
    """The rows as a map-style dataset over visits."""

    rows: Sequence[Example]

    def __getitem__(self, visit: Visit) -> tuple[Example, int]:
        return self.rows[visit.row], visit.draw

    def __len__(self) -> int:
        return len(self.rows)


def batches(
    rows: Sequence[Example],
    adapter: Adapter,
    order: Order,
    *,
    process: int,
    start: int,
    stop: int,
    num_workers: int,
) -> Iterator[Batch]:
    """Collated micro-batches of the steps `start` to `stop` on one process, on the CPU."""
    numbers = range(start * order.accumulate, stop * order.accumulate)
    loader = iter(
        DataLoader(
            _Visited(rows),  # type: ignore[arg-type]  # all that a map-style dataset has to be
            batch_sampler=(order.micro_batch(i, process) for i in numbers),  # type: ignore[arg-type]
            collate_fn=partial(_collate, adapter),
            num_workers=num_workers,
            # A private generator: opening the loader must not move the run's own random stream,
            # or a resumed run would differ from an unbroken one.
            generator=torch.Generator().manual_seed(order.seed),
        )
    )
    return _raising(loader)


def _raising(loader: Iterator[Batch | MmalignError]) -> Iterator[Batch]:
    for item in loader:
        if isinstance(item, MmalignError):
            raise item
        yield item


def _collate(adapter: Adapter, visits: Sequence[tuple[Example, int]]) -> Batch | MmalignError:
    """The batch, or what is wrong with it: a worker that raised would add its own traceback."""
    rows, draws = zip(*visits, strict=True)
    try:
        return adapter.collate(rows, draws)
    except MmalignError as error:
        return error


def eval_batches(num_rows: int, batch_size: int) -> list[range]:
    """Row numbers of evaluation batches, in order; no batch of one row where that can be helped.

    A single left-over row joins the batch before it: KTO's mismatched response comes from another
    row of the batch.
    """
    starts = list(range(0, num_rows, batch_size))
    if len(starts) > 1 and num_rows - starts[-1] == 1:
        starts.pop()
    return [range(a, b) for a, b in pairwise([*starts, num_rows])]


# The random streams of one process, to be saved, restored and set aside.


def rng_state() -> dict[str, Any]:
    """State of the Python, NumPy, CPU and current GPU generators, in plain types and tensors."""
    numpy = cast("tuple[str, np.ndarray, int, int, float]", np.random.get_state(legacy=True))
    name, keys, position, has_gauss, cached = numpy
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put all generators where `rng_state` found them."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def own_random_stream(seed: int) -> Iterator[None]:
    """Everything inside draws from `seed`; outside nothing has happened.

    Evaluation and sampling run in it: they use the same noise every time, and how often they run
    does not change the training.
    """
    before = rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # of every device
    try:
        yield
    finally:
        set_rng_state(before)
