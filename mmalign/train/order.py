"""Which rows a step sees: a pure function of seed and step, so a resumed run replays nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import DataLoader

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mmalign.config import TrainConfig
    from mmalign.data.example import Example
    from mmalign.models.adapter import Adapter, Batch


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
        accumulate: Micro-batches of one optimiser step.
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
        """Rows of one optimiser step over all processes."""
        return self.batch_size * self.accumulate * self.num_processes

    def num_steps(self, train: TrainConfig) -> int:
        """Optimiser steps of a run: `num_steps`, or as many as `num_epochs` passes take."""
        if train.num_steps is not None:
            return train.num_steps
        return max(1, math.ceil(train.num_epochs * self.num_rows / self.rows_per_step))

    def epoch(self, step: int) -> float:
        """Passes over the data after `step` optimiser steps."""
        return step * self.rows_per_step / self.num_rows

    def micro_batch(self, index: int, process: int) -> list[int]:
        """Row numbers of the run's micro-batch `index` (counted from 0) on one process."""
        first = (index * self.num_processes + process) * self.batch_size
        positions = (divmod(first + i, self.num_rows) for i in range(self.batch_size))
        return [int(_permutation(self.num_rows, self.seed, e)[at]) for e, at in positions]


@dataclass(frozen=True, slots=True)
class _MicroBatches:
    """Row numbers of every micro-batch from `start` to `stop` steps on one process."""

    order: Order
    process: int
    start: int
    stop: int

    def __iter__(self) -> Iterator[list[int]]:
        for index in range(self.start * self.order.accumulate, self.stop * self.order.accumulate):
            yield self.order.micro_batch(index, self.process)


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
    return iter(
        DataLoader(
            rows,  # type: ignore[arg-type]  # a sequence is all a map-style dataset has to be
            batch_sampler=_MicroBatches(order, process, start, stop),  # type: ignore[arg-type]
            collate_fn=adapter.collate,
            num_workers=num_workers,
            # A private generator: opening the loader must not move the run's own random stream,
            # or a resumed run would differ from an unbroken one.
            generator=torch.Generator().manual_seed(order.seed),
        )
    )


def held_out(num_rows: int, batch_size: int) -> list[range]:
    """Row numbers of evaluation batches, in order; no batch of one row where that can be helped.

    A single left-over row joins the batch before it: KTO's mismatched response comes from another
    row of the batch.
    """
    starts = list(range(0, num_rows, batch_size))
    if len(starts) > 1 and num_rows - starts[-1] == 1:
        starts.pop()
    return [range(a, b) for a, b in pairwise([*starts, num_rows])]
