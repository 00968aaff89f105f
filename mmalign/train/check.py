"""What must be true before the first step, after the first ones, and before weights are saved."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from mmalign.config import RunConfig
from mmalign.core import CandidateLogps, Loss, Needs, Objective
from mmalign.core.divergence import ReverseKL
from mmalign.core.links import Logistic
from mmalign.core.score import Score
from mmalign.core.terms import Preference
from mmalign.data.jobs import first_few, waiting
from mmalign.errors import ConfigError, NonFiniteLoss
from mmalign.models.batch import Batch
from mmalign.train.order import own_random_stream
from mmalign.train.run import Bfloat16Optimizer, Run, reshard

log = logging.getLogger(__name__)


def require_sensible(config: RunConfig, needs: Needs) -> None:
    """Refuse settings that would be ignored or give a wrong loss."""
    train = config.train
    if train.optimizer in ("adafactor", "sgd") and "betas" in train.model_fields_set:
        raise ConfigError(
            f"train.betas is {list(train.betas)}, but {train.optimizer} has no betas; "
            "remove train.betas, or use train.optimizer: adamw"
        )
    if train.bf16_weights != "stochastic" and (
        config.model.dtype != "bfloat16" or config.model.lora or config.model.adapter
    ):
        raise ConfigError(
            f"train.bf16_weights is {train.bf16_weights}, but no weight is trained in bfloat16: "
            "that takes model.dtype: bfloat16 without a LoRA, whose factors are float32; remove it"
        )
    if "mismatched" in needs.roles and min(train.batch_size, train.eval_batch_size or 2) < 2:
        raise ConfigError(
            "train.batch_size and train.eval_batch_size must be at least 2 for this objective: its "
            "mismatched response comes from another row of the micro-batch"
        )


def why_unequal(config: RunConfig, needs: Needs) -> str | None:
    """The reason why policy and reference need not agree before step 1; None when they must."""
    if not needs.reference:
        return "the objective needs no reference"
    if not config.train.check_reference:
        return "train.check_reference is false"
    if config.reference.path is not None:
        return f"the reference is another model, {config.reference.path}"
    if config.reference.kind == "mixture":
        return "the reference is a mixture"
    return None


@waiting("scoring the first rows")
def check_start(run: Run) -> str:
    """The truth check on every process's first micro-batch; returns what was found, as a line.

    Raises:
        ConfigError: The policy is not its reference, with the likely causes.
    """
    reason = why_unequal(run.config, run.objective.needs)
    batch = _first_batch(run)
    with own_random_stream(run.config.train.seed), torch.no_grad():
        logps = run.model(batch, run.objective.needs)  # what an adapter cannot score, it refuses
    if doubt := worse_than_guessing(logps, run.adapter.vocab_size):
        log.warning("%s", doubt)
    if reason is not None:
        return f"not checked that the policy starts as its reference: {reason}"
    tolerance = run.tools.score_tolerance(run.config)
    gap = CACHED_GAP if run.config.reference.kind == "cached" else LARGEST_GAP
    with own_random_stream(run.config.train.seed):
        problem = unequal_start(run.model, run.objective, batch, tolerance, gap, logps)
    problems = [found for found in gather_object([problem]) if found is not None]
    if problems:
        raise ConfigError(problems[0])
    return "policy and reference agree before the first step"


def _first_batch(run: Run) -> Batch:
    """What passes the model first in this process, on its device."""
    visits = run.order.micro_batch(0, run.accelerator.process_index)
    batch = run.adapter.collate([run.train_rows[visit.row] for visit in visits])
    return run.parts(batch)[0].to(run.accelerator.device)


LARGEST_GAP = 1e-3
"""How far from log 2 the loss of a pair may start."""
CACHED_GAP = 0.05
"""The same where reference scores were computed in other batches, which round otherwise."""

_CAUSES = (
    "Likely causes: dropout is on (model.lora.dropout, or the model's own config); the policy "
    "continues from an adapter that the reference does not have; a DoRA whose magnitudes are not "
    "the norms of the base's weights; model.dtype or train.mixed_precision in which the two are "
    "computed differently; a cached reference was written by another model or in another dtype; "
    "noise is drawn twice. If it is what you want, set train.check_reference: false"
)


def worse_than_guessing(logps: CandidateLogps, vocab_size: int | None) -> str:
    """What is in doubt of a model that finds responses less likely than one that knows nothing.

    Args:
        logps: Of some rows, before the first step.
        vocab_size: Tokens that the model knows; None: positions are not a choice among any.
    """
    best, mask = logps.policy[:, 0], logps.mask[:, 0]  # the others may be made to be unlikely
    if vocab_size is None or not bool(mask.any()):
        return ""
    mean, chance = float(best[mask].mean()), -math.log(vocab_size)
    if not mean < chance - FAR_FROM_CHANCE:
        return ""
    return (
        f"responses have {mean:.1f} nats a token under the model before the first step, and "
        f"guessing among its {vocab_size:,} tokens would give {chance:.1f}: the tokenizer or "
        "the weights seem to be another model's"
    )


FAR_FROM_CHANCE = 3.0
"""Nats a token. Random weights lie up to one below chance; those of another tokenizer, ten."""


@torch.no_grad()
def unequal_start(
    model: nn.Module,
    objective: Objective,
    batch: Batch,
    tolerance: float,
    gap: float = LARGEST_GAP,
    known: CandidateLogps | None = None,
) -> str | None:
    """What is wrong before step 1, when the policy should *be* the reference; None if nothing.

    Every log-ratio is 0 then, and the loss of a logistic pair is log 2. Asked in training mode,
    because dropout is one of the faults it finds.

    Args:
        model: The adapter as it will be trained.
        objective: What is trained; its running statistics (BCO) are left as they were.
        batch: Some rows.
        tolerance: Largest mean log-ratio, in nats a position.
        gap: Largest distance of a pair's loss from log 2, which is half the log-ratio times beta.
        known: Their scores, where they are known.
    """
    logps: CandidateLogps = model(batch, objective.needs) if known is None else known
    assert logps.reference is not None  # else nobody asks
    log_ratio = (logps.policy - logps.reference)[logps.mask].abs()
    if not bool(log_ratio.isfinite().all()):
        names = [name for name, value in logps.tensors() if not bool(value.isfinite().all())]
        return (
            f"{' and '.join(names)} are not finite before the first step, on rows "
            f"{_listed(batch.ids)}; the model's weights or its dtype are at fault"
        )
    mean, largest = float(log_ratio.mean()), float(log_ratio.max())
    was_training = objective.training
    loss = objective.eval()(logps)
    rewards = _largest_reward(objective, logps)
    objective.train(was_training)
    if mean > tolerance or rewards > gap:
        times = f", times beta {rewards:.3g}" if rewards else ""
        return (
            f"policy and reference differ before the first step: log-ratios are {mean:.3g} nats a "
            f"position on average and {largest:.3g} at most{times}, on rows {_listed(batch.ids)}. "
            f"{_CAUSES}"
        )
    expected = _expected_loss(objective)
    if expected is None or loss.rows is None:
        return None
    found = float((loss.rows - expected).abs().max())
    if found <= max(1.0, abs(objective.coefs[0])) * gap:
        return None
    return (
        f"policy and reference agree before the first step, but the loss of a pair is {found:.3g} "
        "away from log 2: the objective does not see the log-ratios it should (weights, labels)"
    )


def _largest_reward(objective: Objective, logps: CandidateLogps) -> float:
    """The largest log-ratio times beta that a term compares; 0 where none is defined."""
    found = 0.0
    for term in objective.terms.values():
        score = getattr(term, "score", None)
        if not isinstance(score, Score) or score.reference_weight != 1.0:
            continue
        if not isinstance(score.transform, ReverseKL):  # of others 0 is not the start
            continue
        rewards = term.rewards(logps)
        if rewards is not None:
            found = max(found, float(rewards.abs().max()))
    return found


def _expected_loss(objective: Objective) -> float | None:
    """log 2 for a single logistic preference term; None where the start has no such value."""
    if len(objective.terms) != 1:
        return None
    (term,) = objective.terms.values()
    if type(term) is not Preference or term.link != Logistic():
        return None
    return objective.coefs[0] * math.log(2.0) if term.score.reference_weight == 1.0 else None


@dataclass(frozen=True, slots=True)
class Scored:
    """What is kept of a micro-batch until its step is done, to say what was wrong with it."""

    ids: tuple[str, ...]
    value: Tensor  # []
    rows: Tensor | None  # [B]
    tensors: dict[str, Tensor]  # the fields of CandidateLogps, detached

    @classmethod
    def of(cls, batch: Batch, loss: Loss, logps: CandidateLogps) -> Scored:
        """The numbers of a micro-batch without its graph."""
        tensors = {name: value.detach() for name, value in logps.tensors()}
        return cls(batch.ids, loss.value.detach(), loss.rows, tensors)


def describe_non_finite(window: list[Scored]) -> str:
    """Which rows and which tensors of a step are not finite, as sentences."""
    return " ".join(_describe(scored) for scored in window if not bool(scored.value.isfinite()))


def _describe(scored: Scored) -> str:
    broken = {
        name: ~value.isfinite()
        for name, value in scored.tensors.items()
        if value.is_floating_point()
    }
    per_row = [flags.flatten(1).any(1) for flags in broken.values() if flags.dim() > 1]
    if scored.rows is not None:
        per_row.append(~scored.rows.isfinite())
    bad = torch.stack(per_row).any(0).tolist()
    ids = [row for row, is_bad in zip(scored.ids, bad, strict=True) if is_bad] or scored.ids
    parts = [_count(name, scored.tensors[name], flags) for name, flags in broken.items()]
    return f"Loss is {float(scored.value)} for rows {_listed(ids)}: {'; '.join(parts)}."


def _count(name: str, value: Tensor, flags: Tensor) -> str:
    if not bool(flags.any()):
        return f"{name}: finite"
    kinds = {"nan": value.isnan(), "-inf": value.isneginf(), "inf": value.isposinf()}
    found = [f"{int(where.sum())} {kind}" for kind, where in kinds.items() if bool(where.any())]
    return f"{name}: {' and '.join(found)} of {value.numel()}"


def _listed(ids: Iterable[str]) -> str:
    return ", ".join(first_few(list(map(repr, ids))))


def non_finite_error(step: int, reports: list[str], last_good: Path | None) -> NonFiniteLoss:
    """The error that ends a run, from what every process saw."""
    seen = " ".join(report for report in reports if report) or (
        "The losses are finite, but their gradient is not."
    )
    return NonFiniteLoss(
        f"step {step}: {seen} Nothing was saved after it. Try a lower train.lr or model.dtype: "
        "float32, or look at the rows with `mmalign data show`. Last good checkpoint: "
        f"{last_good or 'none had been written yet'}"
    )


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
        return _local(held).float().flatten()[:: self._every]


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
        raise NonFiniteLoss(
            f"step {run.position.step}: {problems[0]} after it, so nothing of it is saved. Try "
            "a lower train.lr, more train.warmup or model.dtype: float32. Last good checkpoint: "
            f"{saved or 'none had been written yet'}"
        )


def _broken_weights(run: Run) -> str | None:
    trained = {name: p for name, p in run.adapter.named_parameters() if p.requires_grad}
    others = {**run.adapter.extra_state(), **run.objective.state_dict()}
    tensors = {name: _local(value) for name, value in {**trained, **others}.items()}
    floats = {name: value for name, value in tensors.items() if value.is_floating_point()}
    # One fused pass over all of them: a largest magnitude that is finite leaves nothing else.
    largest = torch.nn.utils.get_total_norm(list(floats.values()), norm_type=float("inf"))
    if bool(largest.isfinite()):
        return None
    bad = [name for name, value in floats.items() if not bool(value.isfinite().all())]
    return (
        f"{len(bad)} of {len(floats)} trained tensors are no longer finite (the first is {bad[0]})"
    )


def _broken_scores(run: Run) -> str | None:
    """Finite weights can still be so large that nothing they compute is."""
    batch, needs = _first_batch(run), replace(run.objective.needs, reference=False, kl=False)
    with own_random_stream(run.config.train.seed):
        logps = run.model(batch, needs)
        reshard(run.model)
    if bool(logps.policy[logps.mask].isfinite().all()):
        return None
    return "the weights are so large that the scores of the first step's rows are no longer finite"


def _local(value: Tensor) -> Tensor:
    """A tensor, or this process's shard of it."""
    shard = getattr(value, "to_local", None)
    return value.detach() if shard is None else shard().detach()
