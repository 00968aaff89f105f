"""One micro-batch to gradients: all candidates at once, or one candidate at a time."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from mmalign.errors import ConfigError
from mmalign.train.rng import rng_state, set_rng_state

if TYPE_CHECKING:
    from collections.abc import Callable

    from accelerate import Accelerator
    from torch import Tensor, nn

    from mmalign.core import CandidateLogps, Loss, Objective
    from mmalign.models.adapter import Batch

    Backward = Callable[[Accelerator, nn.Module, Objective, Batch], tuple[Loss, CandidateLogps]]

# The fields of CandidateLogps through which a loss may reach the parameters.
_DIFFERENTIABLE = ("policy", "kl", "weight", "kl_weight", "prompt")


def backward_joint(
    accelerator: Accelerator, model: nn.Module, objective: Objective, batch: Batch
) -> tuple[Loss, CandidateLogps]:
    """Score all candidates, then one backward pass."""
    logps = model(batch, objective.needs)
    loss = objective(logps)
    accelerator.backward(loss.value)
    return loss, logps


def backward_per_candidate(
    accelerator: Accelerator,
    model: nn.Module,
    objective: Objective,
    batch: Batch,
    *,
    tolerance: float,
) -> tuple[Loss, CandidateLogps]:
    """The same gradient with the activations of one candidate in memory.

    With s the scores [B, K, L] that the loss reads,
        d loss / d theta = sum_k (d loss / d s_k) (d s_k / d theta).
    The first factor needs the values of all scores but no graph behind them; the second is computed
    for one k at a time. Costs one more forward pass.

    The random stream is set back before each candidate, so that what an adapter draws once a row
    (a timestep, its noise) is the same in every pass. Noise drawn for each position (dropout) would
    not be, and the gradient would belong to another model: refused by comparing the scores.

    Args:
        accelerator: Prepared `model`.
        model: The adapter, wrapped or not.
        objective: Decides the loss and what the adapter has to supply.
        batch: One micro-batch on the device.
        tolerance: Largest mean difference of the two passes' log-probabilities, in nats a position.
    """
    before = rng_state()
    with torch.no_grad():
        logps = model(batch, objective.needs)
    after = rng_state()

    # One leaf for each tensor, not for each name: a common mask is both `weight` and `kl_weight`.
    names: dict[int, str] = {}
    leaves: dict[str, Tensor] = {}
    for name, value in logps.tensors():
        if name in _DIFFERENTIABLE:
            first = names.setdefault(id(value), name)
            leaves[name] = leaves[first] if first in leaves else value.detach().requires_grad_()
    loss = objective(logps.replace(**leaves))
    distinct = list(names.values())
    found = torch.autograd.grad(loss.value, [leaves[n] for n in distinct], allow_unused=True)
    gradients = {n: grad for n, grad in zip(distinct, found, strict=True) if grad is not None}

    needs = replace(
        objective.needs,
        reference=False,  # it carries no gradient, so the second pass does without
        kl="kl" in gradients,
        weight=objective.needs.weight and not gradients.keys().isdisjoint({"weight", "kl_weight"}),
        log_sum_p2=False,
        prompt="prompt" in gradients,
        candidates=1,
    )
    num_candidates = logps.policy.shape[1]
    sync = accelerator.sync_gradients  # whether this is the step's last micro-batch
    for k in range(num_candidates):
        # Gradients travel between processes once a step, with its very last backward pass;
        # DeepSpeed takes the step itself then. `accumulate` holds back earlier micro-batches.
        hold = sync and k < num_candidates - 1
        accelerator.sync_gradients = sync and not hold
        with accelerator.no_sync(model) if hold else nullcontext():
            set_rng_state(before)
            again = dict(model(batch.select(k), needs).tensors())
            _require_same_scores(logps, again, k, tolerance)
            parts = [
                (grad[:, k : k + 1] * again[name]).sum()
                for name, grad in gradients.items()
                if again[name].requires_grad
            ]
            accelerator.backward(torch.stack(parts).sum())
    set_rng_state(after)
    return loss, logps


def _require_same_scores(
    first: CandidateLogps, again: dict[str, Tensor], k: int, tolerance: float
) -> None:
    mask = first.mask[:, k : k + 1]
    gap = (again["policy"].detach() - first.policy[:, k : k + 1])[mask].abs()
    if gap.numel() and float(gap.mean()) > tolerance:
        raise ConfigError(
            f"train.backward is per_candidate, but scoring candidate {k} a second time gave other "
            f"log-probabilities: {float(gap.mean()):.3g} nats a position on average, at most "
            f"{tolerance:g} allowed. Dropout does that: set it to 0 (model.lora.dropout), or use "
            "train.backward: joint"
        )
