"""One micro-batch to gradients: all candidates at once, or one candidate at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import zip_longest

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from mmalign.core import CandidateLogps, Loss, Needs, Objective
from mmalign.errors import ConfigError
from mmalign.models.adapter import Adapter
from mmalign.models.batch import Batch
from mmalign.train.order import rng_state, set_rng_state

Backward = Callable[..., tuple[Loss, CandidateLogps]]  # as `backward_joint`

# The fields of CandidateLogps through which a loss may reach the parameters.
_DIFFERENTIABLE = ("policy", "kl", "weight", "kl_weight", "prompt")


def step_positions(adapter: Adapter, window: Sequence[Batch], needs: Needs) -> Tensor | None:
    """Positions of response and prompt that a row of a step has on average: [K, 2].

    Over all micro-batches of a step and all processes, before the first of them is scored: with
    it, a mean over tokens is that of one large batch. None where the adapter cannot know.
    """
    counts = [adapter.num_positions(batch, needs) for batch in window]
    if any(count is None for count in counts):
        return None
    own = [count.sum(0).tolist() for count in counts if count is not None]  # [K, 2] each
    parts = gather_object([(sum(len(batch.ids) for batch in window), own)])
    rows = sum(num for num, _ in parts)
    every = (candidates for _, batches in parts for candidates in batches)
    # Lists may have more candidates in one micro-batch than in another.
    columns = zip_longest(*every, fillvalue=(0, 0))
    total = [[sum(part) for part in zip(*column, strict=True)] for column in columns]
    return torch.tensor(total, dtype=torch.float64) / rows


def _counted(logps: CandidateLogps, positions: Tensor | None) -> CandidateLogps:
    if positions is None:
        return logps
    num_rows, num_candidates = logps.labels.shape
    known = positions[:num_candidates].to(logps.policy).expand(num_rows, -1, -1)
    return logps.replace(step_positions=known)


def backward_joint(
    accelerator: Accelerator,
    model: nn.Module,
    objective: Objective,
    batch: Batch,
    positions: Tensor | None = None,
    *,
    share: float = 1.0,
) -> tuple[Loss, CandidateLogps]:
    """Score all candidates, then one backward pass; of the loss's `share` in its micro-batch."""
    logps = model(batch, objective.needs)
    loss = objective(_counted(logps, positions))
    accelerator.backward(loss.value * share)
    return loss, logps


@contextmanager
def synchronised(accelerator: Accelerator, model: nn.Module, *, last: bool) -> Iterator[None]:
    """For one of several backward passes of a micro-batch: none but the `last` ends a step.

    Gradients travel between processes once a step, with its very last backward pass; DeepSpeed
    takes the step itself then. `accumulate` holds back earlier micro-batches.
    """
    sync = accelerator.sync_gradients
    accelerator.sync_gradients = sync and last
    with nullcontext() if last or not sync else accelerator.no_sync(model):
        yield
    accelerator.sync_gradients = sync


def backward_per_candidate(
    accelerator: Accelerator,
    model: nn.Module,
    objective: Objective,
    batch: Batch,
    positions: Tensor | None = None,
    *,
    tolerance: float,
    share: float = 1.0,
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
        positions: What `step_positions` gave.
        share: Of the micro-batch's rows.
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
    loss = objective(_counted(logps.replace(**leaves), positions))
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
    num_candidates, gaps = logps.policy.shape[1], list[Tensor]()
    for k in range(num_candidates):
        with synchronised(accelerator, model, last=k == num_candidates - 1):
            set_rng_state(before)
            again = dict(model(batch.select(k), needs).tensors())
            gaps.append(_gap(logps, again["policy"], k))
            parts = [
                (grad[:, k : k + 1] * again[name]).sum()
                for name, grad in gradients.items()
                if again[name].requires_grad
            ]
            accelerator.backward(torch.stack(parts).sum() * share)
    set_rng_state(after)
    _require_same_scores(torch.stack(gaps), tolerance)
    return loss, logps


def _gap(first: CandidateLogps, again: Tensor, k: int) -> Tensor:  # []
    """Mean difference of a candidate's log-probabilities in the second pass, a position."""
    mask = first.mask[:, k : k + 1]
    gap = (again.detach() - first.policy[:, k : k + 1]).abs()
    return gap.where(mask, 0.0).sum() / mask.sum().clamp(min=1)


def _require_same_scores(gaps: Tensor, tolerance: float) -> None:  # [K]
    for k, gap in enumerate(gaps.tolist()):  # the device is waited for once
        if gap > tolerance:
            raise ConfigError(
                f"train.backward is per_candidate, but scoring candidate {k} a second time gave "
                f"other log-probabilities: {gap:.3g} nats a position on average, at most "
                f"{tolerance:g} allowed. Dropout does that: set it to 0 (model.lora.dropout), or "
                "use train.backward: joint"
            )
