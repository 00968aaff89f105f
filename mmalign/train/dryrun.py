"""What `--dry-run` prints: that everything fits together, and how large it is."""

from __future__ import annotations

import resource
import sys
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from mmalign.core import CandidateLogps, Loss
    from mmalign.models.adapter import Batch
    from mmalign.train.run import Run


def describe_dry_run(run: Run, batch: Batch, loss: Loss, logps: CandidateLogps) -> str:
    """Rows, steps, needs, shapes, parameters, gradient and memory after one micro-batch."""
    parameters = [(p.numel(), p.requires_grad) for p in run.adapter.parameters()]
    trainable = sum(size for size, is_trainable in parameters if is_trainable)
    total = sum(size for size, _ in parameters)
    gradients = [p.grad for p in run.adapter.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    values = {"loss": loss.value, **loss.metrics}
    shapes = {name: value for name, value in {**batch.inputs, "labels": batch.labels}.items()}
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
