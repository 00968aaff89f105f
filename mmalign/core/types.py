"""The needs of an objective, the log-probabilities from an adapter, and the loss.

Shape letters, everywhere in mmalign: B rows, K candidates, L positions, V vocabulary.
Candidate 0 is the chosen response and candidate 1 the rejected one wherever the row is a pair.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from mmalign.errors import NeedsError

Rows = Literal["any", "pair", "unpaired", "list", "plain"]
"""The shape of a record: chosen and rejected, one rated response, K ranked ones, or one response
that is not rated and is compared with itself under another input."""


@dataclass(frozen=True, slots=True)
class Needs:
    """Requirements of an objective on adapter and data; joined with `|`.

    Attributes:
        reference: Log-probabilities under the frozen reference.
        kl: KL(reference, policy) at each position.
        weight: A position weight, from a learned mask or from the data (spans, tree steps).
        log_sum_p2: log of the sum of squared policy probabilities at each position (WPO).
        prompt: Policy log-probabilities of the prompt's own tokens (ORPO as released).
        labels: The values of a pair's labels, not only which response is the better one.
        token_mean: A mean over all tokens of a step: the loop counts them before its first pass.
        candidates: Smallest number of candidates K.
        rows: The record shape the objective is defined on.
        roles: Candidates after the rated ones, in order: "mismatched" (KTO), "calibration" (VPO),
            "rationale" (rationale DPO), "online" (HyPO; repeated once per fresh sample). The chosen
            response under another visual input: "corrupted"; "corrupted_video", "corrupted_clip",
            "corrupted_frame" (VistaDPO); "augmented" (PaMi-VDPO: named once, as many as the adapter
            makes). "rejected_corrupted": the rejected response, or another, under such an input.
            "rejected_irrelevant": a second rejected response (VistaDPO).
    """

    reference: bool = False
    kl: bool = False
    weight: bool = False
    log_sum_p2: bool = False
    prompt: bool = False
    labels: bool = False
    token_mean: bool = False
    candidates: int = 1
    rows: Rows = "any"
    roles: tuple[str, ...] = ()

    def __or__(self, other: Needs) -> Needs:
        rows: set[Rows] = {self.rows, other.rows}
        rows.discard("any")
        if len(rows) > 1:
            raise NeedsError(
                f"the terms of one objective need different kinds of rows: {sorted(rows)}; "
                "mix only losses that are defined on the same kind"
            )
        if self.roles and other.roles and self.roles != other.roles:
            raise NeedsError(
                f"the terms of one objective need different extra candidates: {self.roles} and "
                f"{other.roles}; mix only losses that share them"
            )
        joined: dict[str, Any] = {
            item.name: getattr(self, item.name) or getattr(other, item.name)
            for item in fields(self)
        }
        joined["candidates"] = max(self.candidates, other.candidates)
        joined["rows"] = rows.pop() if rows else "any"
        return Needs(**joined)

    def describe(self) -> str:
        """The needs as words, e.g. `reference, kl, at least 2 candidates (pair)`."""
        parts = [
            n for n in ("reference", "kl", "weight", "log_sum_p2", "prompt") if getattr(self, n)
        ]
        parts += [
            f"{'an' if role[0] in 'aeiou' else 'a'} {role} response"
            for role in dict.fromkeys(self.roles)
        ]
        plural = "s" if self.candidates > 1 else ""
        kind = "" if self.rows == "any" else f" ({self.rows})"
        parts.append(f"at least {self.candidates} candidate{plural}{kind}")
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class CandidateLogps:
    """Log-probabilities of K candidates per row, position by position; float32 or wider.

    Positions where `mask` is False may hold anything finite: they never reach a sum.
    """

    policy: Tensor  # [B, K, L]  carries gradient
    mask: Tensor  # [B, K, L]  bool, True where a position counts
    labels: Tensor  # [B, K]  (1, 0) | (p, 1-p) | graded | desirable
    reference: Tensor | None = None  # [B, K, L]  no gradient
    kl: Tensor | None = None  # [B, K, L]  KL(reference, policy), carries gradient
    weight: Tensor | None = None  # [B, K, L]  weight of the log-ratio; None means 1
    kl_weight: Tensor | None = None  # [B, K, L]  weight of the KL; None means 1
    row_weight: Tensor | None = None  # [B]  no gradient; None means 1
    log_sum_p2: Tensor | None = None  # [B, K, L]  log sum_v p(v)^2 under the policy, no gradient
    prompt: Tensor | None = None  # [B, K, P]  policy log-probs of the prompt, carries gradient
    prompt_mask: Tensor | None = None  # [B, K, P]  bool
    # [B, K, 2]  positions of response and of prompt that a row of the whole step has on average,
    # the same for all rows; None: those of this batch, over all processes
    step_positions: Tensor | None = None

    def check(self, needs: Needs) -> None:
        """Raise NeedsError, naming the field, when something `needs` asks for is absent."""
        for name in ("reference", "kl", "weight", "log_sum_p2", "prompt"):
            if getattr(needs, name) and getattr(self, name) is None:
                raise NeedsError(
                    f"the objective needs CandidateLogps.{name}, but the adapter left it None"
                )
        if self.policy.dim() != 3:
            raise NeedsError(
                f"CandidateLogps.policy has shape {list(self.policy.shape)}; it must be [B, K, L]"
            )
        if self.mask.shape != self.policy.shape or self.mask.dtype != torch.bool:
            raise NeedsError(
                f"CandidateLogps.mask is {self.mask.dtype} of shape {list(self.mask.shape)}; it "
                f"must be bool of policy's shape {list(self.policy.shape)}"
            )
        if self.labels.shape != self.policy.shape[:2]:
            raise NeedsError(
                f"CandidateLogps.labels has shape {list(self.labels.shape)}; it must be [B, K] = "
                f"{list(self.policy.shape[:2])}"
            )
        if self.policy.shape[1] < needs.candidates:
            raise NeedsError(
                f"the objective needs at least {needs.candidates} candidates a row, but the batch "
                f"has {self.policy.shape[1]}"
            )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of every field that is present."""
        for item in fields(self):
            value = getattr(self, item.name)
            if value is not None:
                yield item.name, value

    def replace(self, **changes: Tensor | None) -> CandidateLogps:
        """A copy with some fields exchanged."""
        return replace(self, **changes)

    def columns(self, candidates: tuple[int, ...]) -> CandidateLogps:
        """The same rows with only these candidates, in this order."""
        if candidates == tuple(range(self.policy.shape[1])):
            return self
        index = list(candidates)
        picked = {
            name: tensor if name == "row_weight" else tensor[:, index]
            for name, tensor in self.tensors()
        }
        return replace(self, **picked)


@dataclass(frozen=True, slots=True)
class Loss:
    """A training step's scalar and what to log beside it."""

    value: Tensor  # []  differentiable
    metrics: dict[str, Tensor] = field(
        default_factory=dict[str, Tensor]
    )  # detached, mean over rows
    rows: Tensor | None = None  # [B]  per-row loss before row weights, detached
    rewards: Tensor | None = None  # [B, K]  implicit rewards of the first preference term, detached
