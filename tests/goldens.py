"""Golden files to candidate batches: the plumbing that the golden tests share.

Log-probabilities are made here from logits with a plain log-softmax, independent of the package.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign.core import CandidateLogps, Loss, Objective

FOLDER = Path(__file__).resolve().parent / "golden"
DOUBLE = torch.float64


@cache
def load(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def tensor(value: Any, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.tensor(value, dtype=dtype)


def columns(*values: Any, dtype: torch.dtype = DOUBLE) -> Tensor:
    """Per-row numbers of K candidates as [B, K, 1]: one position that holds a whole sequence."""
    return torch.stack([tensor(v, dtype) for v in values], dim=1).unsqueeze(-1)


def sequences(
    policy: Tensor,
    reference: Tensor | None = None,
    labels: Tensor | None = None,
    **extra: Tensor,
) -> CandidateLogps:
    """A batch from [B, K, L] log-probabilities; `policy` becomes the leaf of the gradients."""
    if labels is None:
        labels = torch.zeros(policy.shape[:2], dtype=policy.dtype)
        labels[:, 0] = 1.0
    return CandidateLogps(
        policy=policy.requires_grad_(),
        mask=torch.ones(policy.shape, dtype=torch.bool),
        labels=labels,
        reference=reference,
        **extra,
    )


def seq_pair(source: dict[str, Any], dtype: torch.dtype = DOUBLE, **extra: Any) -> CandidateLogps:
    """The usual four lists: policy and reference, chosen and rejected."""
    return sequences(
        columns(source["policy_chosen_logps"], source["policy_rejected_logps"], dtype=dtype),
        columns(source["ref_chosen_logps"], source["ref_rejected_logps"], dtype=dtype),
        **extra,
    )


def log_softmax(logits: Tensor) -> Tensor:
    return logits - logits.logsumexp(-1, keepdim=True)


def fold(rows: Tensor) -> Tensor:
    """[2B, ...] chosen then rejected -> [B, 2, ...]."""
    return torch.stack(rows.chunk(2), dim=1)


def unfold(pairs: Tensor) -> Tensor:
    """[B, 2, ...] -> [2B, ...]."""
    return torch.cat(list(pairs.unbind(1)))


class Tokens:
    """A token-level golden: logits, labels and what follows from them, before any loss."""

    def __init__(self, source: dict[str, Any]) -> None:
        self.logits = tensor(source["policy_logits"]).requires_grad_()  # [2B, T, V]
        reference = log_softmax(tensor(source["ref_logits"]))[:, :-1]
        labels = torch.tensor(source["labels"])[:, 1:]
        self.mask = labels != -100
        target = labels.clamp(min=0).unsqueeze(-1)
        policy = log_softmax(self.logits)[:, :-1]
        self.policy = policy.gather(-1, target).squeeze(-1)  # [2B, T - 1]
        self.reference = reference.gather(-1, target).squeeze(-1)
        self.kl = (reference.exp() * (reference - policy)).sum(-1)
        self.log_sum_p2 = (2.0 * policy.detach()).logsumexp(-1)
        if "input_ids" in source:
            ids = torch.tensor(source["input_ids"])[:, 1:]
            attended = torch.tensor(source["attention_mask"])[:, 1:].bool()
            self.prompt = policy.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
            self.prompt_mask = attended & ~self.mask
        else:
            self.prompt = self.prompt_mask = None

    def batch(self, **extra: Tensor | None) -> CandidateLogps:
        fields: dict[str, Any] = {
            "policy": fold(self.policy),
            "mask": fold(self.mask),
            "labels": tensor([[1.0, 0.0]] * (len(self.mask) // 2)),
            "reference": fold(self.reference),
            "kl": fold(self.kl),
            "log_sum_p2": fold(self.log_sum_p2),
        }
        if self.prompt is not None:
            fields |= {"prompt": fold(self.prompt), "prompt_mask": fold(self.prompt_mask)}
        return CandidateLogps(**(fields | extra))


def gradient(loss: Loss, *leaves: Tensor, of_sum: bool = False) -> list[Tensor]:
    """d value / d leaves; of the sum over rows where a golden says so."""
    scale = float(len(loss.rows)) if of_sum and loss.rows is not None else 1.0
    return list(torch.autograd.grad(loss.value * scale, leaves, retain_graph=True))


def pair_results(
    objective: Objective, c: CandidateLogps, of_sum: bool = False
) -> dict[str, Tensor]:
    """Loss, rows, rewards and gradients of a batch whose policy is a leaf."""
    loss = objective(c)
    (grad,) = gradient(loss, c.policy, of_sum=of_sum)
    assert loss.rows is not None
    got = {"loss": loss.value.detach(), "losses": loss.rows}
    if loss.rewards is not None:
        got |= {"chosen_rewards": loss.rewards[:, 0], "rejected_rewards": loss.rewards[:, -1]}
    chosen, rejected = grad[:, 0].sum(-1), grad[:, 1].sum(-1)
    trl = "log_ratio" if "log_ratio/chosen" in loss.metrics else "rewards"
    return got | {
        "grad_policy_chosen_logps": chosen,
        "grad_policy_rejected_logps": rejected,
        "grad_policy_chosen": chosen,
        "grad_policy_rejected": rejected,
        "rewards_chosen_mean": loss.metrics[f"{trl}/chosen"],
        "rewards_rejected_mean": loss.metrics[f"{trl}/rejected"],
        "reward_accuracy": loss.metrics["rewards/accuracies"],
        "logps_chosen_mean": loss.metrics["logps/chosen"],
        "logps_rejected_mean": loss.metrics["logps/rejected"],
    }


def compare(
    expected: dict[str, Any],
    got: dict[str, Tensor],
    *,
    tol: float = 1e-9,
    relative: bool = False,
    skip: dict[str, str] | None = None,
) -> None:
    """Every expected number against ours; a key that is neither ours nor skipped is a failure."""
    for key, value in expected.items():
        if key in (skip or {}):
            continue
        assert key in got, f"{key} is expected, but the test does not compute it"
        ours = got[key].detach()
        target = tensor(value, ours.dtype)
        assert ours.shape == target.shape, key
        bound = tol * target.abs().clamp(min=1.0) if relative else torch.full_like(target, tol)
        gap = (ours - target).abs()
        assert bool((gap <= bound).all()), f"{key}: off by {gap.max().item():.3e}"
