"""Whether the weights are still numbers that score rows, asked before any of them is saved."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object

from mmalign.errors import NonFiniteLoss
from mmalign.train.launch import reshard
from mmalign.train.rng import own_random_stream

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from mmalign.train.run import Run


@torch.no_grad()
def require_sound(run: Run, saved: Path | None) -> None:
    """Refuse weights that are not finite, or that score the rows of the first step so no longer.

    Args:
        run: After a step. Called by every process.
        saved: The newest checkpoint, which has been asked the same.

    Raises:
        NonFiniteLoss: With what is not finite.
    """
    problem = _broken_weights(run) or _broken_scores(run)
    problems = [found for found in gather_object([problem]) if found]
    if problems:
        kept = saved if saved is not None else "none had been written yet"
        raise NonFiniteLoss(
            f"step {run.position.step}: {problems[0]} after it, so nothing of it is saved. Try "
            "a lower train.lr, more train.warmup or model.dtype: float32. Last good checkpoint: "
            f"{kept}"
        )


def _broken_weights(run: Run) -> str | None:
    trained = {name: p for name, p in run.adapter.named_parameters() if p.requires_grad}
    others = {**run.adapter.extra_state(), **run.objective.state_dict()}
    tensors = {name: _local(value) for name, value in {**trained, **others}.items()}
    floats = {name: value for name, value in tensors.items() if value.is_floating_point()}
    if not floats or _all_finite(floats):
        return None
    bad = [name for name, value in floats.items() if not bool(value.isfinite().all())]
    return (
        f"{len(bad)} of {len(floats)} trained tensors are no longer finite (the first is {bad[0]})"
    )


def _all_finite(tensors: Mapping[str, Tensor]) -> bool:
    """One fused pass over all of them: a largest magnitude that is finite leaves nothing else."""
    largest = torch.nn.utils.get_total_norm(list(tensors.values()), norm_type=float("inf"))
    return bool(largest.isfinite())


def _broken_scores(run: Run) -> str | None:
    """Finite weights can still be so large that nothing they compute is."""
    visits = run.order.micro_batch(0, run.accelerator.process_index)
    batch = run.adapter.collate([run.train_rows[visit.row] for visit in visits])
    needs = replace(run.objective.needs, reference=False, kl=False)
    with own_random_stream(run.config.train.seed):
        logps = run.model(batch.to(run.accelerator.device), needs)
        reshard(run.model)
    if bool(logps.policy[logps.mask].isfinite().all()):
        return None
    return "the weights are so large that the scores of the first step's rows are no longer finite"


def _local(value: Tensor) -> Tensor:
    shard = getattr(value, "to_local", None)
    return value.detach() if shard is None else shard().detach()
