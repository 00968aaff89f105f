"""A run: everything a training is made of, built once from a config."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import torch
from accelerate.utils import set_seed

from mmalign import preflight
from mmalign.data.select import check_trainable
from mmalign.models.adapter import build_adapter
from mmalign.models.rows import say, survey_rows
from mmalign.train.launch import build_accelerator, is_sharded, ready_for_sharding
from mmalign.train.metrics import Averages, flatten
from mmalign.train.optim import build_optimizer
from mmalign.train.order import Order, batches

if TYPE_CHECKING:
    from collections.abc import Iterator

    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from torch import nn

    from mmalign.config import RunConfig
    from mmalign.core import Objective
    from mmalign.data.example import Example
    from mmalign.models.adapter import Adapter, Batch


@dataclass(slots=True)
class Position:
    """How far a run is; the next row follows from the step alone."""

    step: int = 0  # optimiser steps done
    rows: int = 0  # rows seen, over all processes
    tokens: int = 0  # scored positions seen up to the last log line, over all processes


@dataclass(frozen=True, slots=True)
class Run:
    """What the loop works on; `position` and `averages` are what changes beside the weights."""

    config: RunConfig
    objective: Objective
    accelerator: Accelerator
    adapter: Adapter  # unwrapped
    model: nn.Module  # the adapter as accelerate prepared it
    optimizer: AcceleratedOptimizer
    train_rows: list[Example]
    eval_rows: list[Example]
    order: Order
    num_steps: int
    notes: tuple[str, ...] = ()  # what is to be known of the rows, a sentence each
    position: Position = field(default_factory=Position)
    averages: Averages = field(default_factory=Averages)

    @property
    def is_sharded(self) -> bool:
        """Whether no process holds all parameters."""
        return is_sharded(self.accelerator)

    def batches(self) -> Iterator[Batch]:
        """This process's micro-batches from the current position to the end, on the CPU."""
        return batches(
            self.train_rows,
            self.adapter,
            self.order,
            process=self.accelerator.process_index,
            start=self.position.step,
            stop=self.num_steps,
            num_workers=self.config.data.num_workers,
        )


def build_run(config: RunConfig, objective: Objective) -> Run:
    """Load data and model, and let accelerate place them as it was launched."""
    train = config.train
    if train.num_threads is not None:
        torch.set_num_threads(train.num_threads)
    accelerator = build_accelerator(config)
    set_seed(train.seed)  # alike on all processes: they must start from the same weights
    with accelerator.main_process_first():  # one process fills the caches of downloads
        rows = survey_rows(config, objective.needs)
        say(rows.notes)
    train_rows, eval_rows = rows.train, rows.held_out
    names = ", ".join(source.path for source in config.data.train)
    check_trainable(train_rows, objective.needs, names)
    num_processes = accelerator.num_processes
    order = Order(len(train_rows), train.batch_size, train.accumulate, num_processes, train.seed)
    num_steps = order.num_steps(train)
    plan = preflight.Plan(config, objective.needs, num_steps, order.rows_per_step, train_rows)
    say(doubts := preflight.doubts(plan))

    adapter = build_adapter(config, objective.needs)
    ready_for_sharding(accelerator, adapter, config)
    model, optimizer = accelerator.prepare(adapter, build_optimizer(adapter, train))
    model.train()
    objective.to(accelerator.device).train()
    adapter.plan(num_steps)
    adapter.before_training([*train_rows, *eval_rows])
    set_seed(train.seed, device_specific=True)  # dropout and noise differ between processes
    return Run(
        config=config,
        objective=objective,
        accelerator=accelerator,
        adapter=adapter,
        model=model,
        optimizer=cast("AcceleratedOptimizer", optimizer),
        train_rows=train_rows,
        eval_rows=eval_rows,
        order=order,
        num_steps=num_steps,
        notes=(*rows.heard, *rows.notes, *doubts),
    )


@contextmanager
def trackers(run: Run) -> Iterator[None]:
    """Trackers open, with the configuration as their hyperparameters; closed whatever happens."""
    if run.config.train.trackers:
        values = {key: str(value) for key, value in flatten(run.config.model_dump(mode="json"))}
        run.accelerator.init_trackers(run.config.output.name, config=values)
    try:
        yield
    finally:
        for tracker in run.accelerator.trackers:
            tracker.finish()
