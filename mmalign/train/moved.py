"""Whether the first steps move the weights at all, said once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mmalign.train.bfloat16 import Bfloat16Optimizer
from mmalign.train.launch import reshard

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mmalign.train.run import Run

STEPS = 20
_SAMPLED = 1 << 20  # weights looked at
_FEW = 0.01  # a smaller share of them than this does not train


class Movement:
    """The trainable weights at the start of a run, against those `STEPS` steps on."""

    def __init__(self, run: Run) -> None:
        """Keep a sample of them: every nth, all where there are few."""
        optimizer: Any = run.optimizer.optimizer
        self._optimizer = optimizer if isinstance(optimizer, Bfloat16Optimizer) else None
        reshard(run.model)  # as they are after a step
        self._parameters = [p for p in run.adapter.parameters() if p.requires_grad]
        total = sum(p.numel() for p in self._parameters)
        self._every = max(1, total // _SAMPLED)
        first = run.position.step
        self._due = first + STEPS if first else min(STEPS, run.num_steps)
        self._steps = self._due - first
        self._start = [self._sample(p).clone() for p in self._parameters]
        self._lr, self._norm = 0.0, torch.zeros(())

    def after_step(self, step: int, lr: float, grad_norm: Tensor) -> str | None:
        """What to say after a step; None where the weights move, and at any other step."""
        if step > self._due or not self._start:
            return None
        self._lr = max(self._lr, lr)
        self._norm = torch.maximum(self._norm.to(grad_norm.device), grad_norm.detach().float())
        if step < self._due:
            return None
        pairs = zip(self._parameters, self._start, strict=True)
        moved = sum(int((self._sample(p) != start).sum()) for p, start in pairs)
        looked_at = sum(start.numel() for start in self._start)
        self._start = []
        # Rounded at random, few weights move in a step, and enough of them.
        rounded = self._optimizer is not None and not self._optimizer.master
        if moved >= (1 if rounded else _FEW * looked_at):
            return None
        return (
            f"after {self._steps} steps {moved:,} of {looked_at:,} weights have moved, with a "
            f"learning rate of at most {self._lr:.3g}: {self._why()}"
        )

    def _why(self) -> str:
        if float(self._norm) == 0.0:
            return "every gradient was 0, so nothing of the loss reaches them"
        halves = any(p.dtype == torch.bfloat16 for p in self._parameters)
        if halves and self._optimizer is None:
            return (
                "such steps are below half of bfloat16's spacing and rounded away. Set "
                "train.bf16_weights: stochastic or master, or train model.dtype: float32 with "
                "train.mixed_precision: bf16"
            )
        return (
            f"the steps are too small for their precision (gradient norm {float(self._norm):.3g}); "
            "raise train.lr"
        )

    def _sample(self, weight: nn.Parameter) -> Tensor:
        held = weight.detach() if self._optimizer is None else self._optimizer.held(weight)
        local = getattr(held, "to_local", None)  # a shard
        return (held if local is None else local()).float().flatten()[:: self._every]
