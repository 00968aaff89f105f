"""From log-probabilities per position to one score, the implicit reward, per candidate."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from mmalign.core.divergence import LogOdds, ReverseKL, Transform, is_pointwise
from mmalign.core.numerics import Reduce, full_precision, num_positions, over_positions, require
from mmalign.core.types import CandidateLogps, Needs
from mmalign.errors import ArgumentError, ConfigError, NeedsError


@dataclass(frozen=True, slots=True)
class Score:
    """Score of a candidate: beta * (f'(u) + kl_coef * sequential KL).

    log u is the sum (or mean) over positions of weight * (policy - reference_weight * reference).

    Args:
        beta: Scale of the score, in 1/nats; a tuple gives one per candidate.
        transform: f' of the divergence, as a function of log u.
        reference_weight: 1 for DPO, 0 for a reference-free score.
        reduce: `mean` divides by the number of unmasked positions.
        length_norm: What `mean` divides: the `log_ratio` before f', or the `score` after it. The
            same for reverse KL. Under another divergence the second is no f-divergence reward; it
            reproduces TRL.
        kl_coef: Weight of the sequential KL(reference, policy), no unit.
        kl_detach_chosen: No gradient through candidate 0's KL (TDPO2).
        reward_kl: KL weight in logged rewards, where a paper reports another; None for `kl_coef`.
        weighted: A position weight must be present. One that is present is always applied.
        span_weight: How it is applied: None as it is; a number as 1 + (span_weight - 1) * weight,
            so that under 0 / 1 weights every position counts and those of spans count
            `span_weight` times. 1 is the plain score.
        ld_alpha: LD-DPO: weight of the positions beyond the length of the pair's shorter response.
    """

    beta: float | tuple[float, ...] = 0.1
    transform: Transform = field(default_factory=ReverseKL)
    reference_weight: float = 1.0
    reduce: Reduce = "sum"
    length_norm: Literal["log_ratio", "score"] = "log_ratio"
    kl_coef: float = 0.0
    kl_detach_chosen: bool = False
    reward_kl: float | None = None
    weighted: bool = False
    span_weight: float | None = None
    ld_alpha: float | None = None

    def __post_init__(self) -> None:
        betas = self.beta if isinstance(self.beta, tuple) else (self.beta,)
        require(all(0.0 < b < math.inf for b in betas), "beta", self.beta, "above 0 and finite")
        if len(set(betas)) > 1 and not is_pointwise(self.transform):
            raise ConfigError(
                "different betas per candidate are defined for reverse KL only: under another "
                "divergence the reward's unknown constant does not cancel between candidates"
            )
        span = self.span_weight
        require(span is None or 0.0 <= span < math.inf, "span_weight", span, "at least 0")
        if self.ld_alpha is not None:
            require(0.0 <= self.ld_alpha <= 1.0, "ld_alpha", self.ld_alpha, "in [0, 1]")
            if isinstance(self.transform, LogOdds):
                raise ArgumentError(
                    "ld_alpha is not defined on log-odds, which read a mean "
                    "log-probability; leave it out"
                )

    @property
    def needs(self) -> Needs:
        """The reference, the KL and the weight, as far as this score reads them."""
        return Needs(
            reference=self.reference_weight != 0.0, kl=self.kl_coef != 0.0, weight=self.weighted
        )

    def __call__(self, c: CandidateLogps) -> Tensor:  # [B, K]
        """Scores with gradient."""
        score = self._transformed(c)
        if self.kl_coef != 0.0:
            kl = self._kl(c)
            if self.kl_detach_chosen:
                kl = torch.cat([kl[:, :1].detach(), kl[:, 1:]], dim=1)
            score = score + self.kl_coef * kl
        return score * self._beta(score)

    @torch.no_grad()
    def rewards(self, c: CandidateLogps) -> Tensor:  # [B, K]
        """Scores to log: without gradient, and with the KL weight that the paper reports."""
        if self.reward_kl is None or self.kl_coef == 0.0:
            return self(c)
        score = self._transformed(c) + self.reward_kl * self._kl(c)
        return score * self._beta(score)

    @torch.no_grad()
    def log_ratio_rewards(self, c: CandidateLogps) -> Tensor:  # [B, K]
        """beta * summed log-ratio, whatever the divergence: what TRL logs as a reward."""
        log_ratio = over_positions(self._positions(c), c.mask, self._weight(c))
        return log_ratio * self._beta(log_ratio)

    @property
    def is_log_ratio(self) -> bool:
        """True where rewards equal `log_ratio_rewards`, or the latter are undefined."""
        plain = isinstance(self.transform, ReverseKL) and self.reduce == "sum" and not self.kl_coef
        return plain or self.reference_weight == 0.0

    def _positions(self, c: CandidateLogps) -> Tensor:  # [B, K, L]
        policy = full_precision(c.policy)
        if self.reference_weight == 0.0:
            return policy
        assert c.reference is not None, "Objective checks the needs before any score is taken"
        return policy - self.reference_weight * full_precision(c.reference.detach())

    def _weight(self, c: CandidateLogps) -> Tensor | None:  # [B, K, L]
        given = c.weight
        span = self.span_weight
        if given is not None and span is not None:
            given = None if span == 1.0 else 1.0 + (span - 1.0) * given
        if self.ld_alpha is None:
            return given
        shared = c.mask.sum(-1).amin(dim=1)[:, None, None]  # [B, 1, 1] length of the shorter side
        tail = (c.mask.cumsum(-1) > shared).to(full_precision(c.policy).dtype)
        weight = 1.0 + (self.ld_alpha - 1.0) * tail
        return weight if given is None else weight * given

    def _transformed(self, c: CandidateLogps) -> Tensor:  # [B, K]
        after = self.reduce == "mean" and self.length_norm == "score"
        reduce: Reduce = "sum" if after else self.reduce
        log_ratio = over_positions(self._positions(c), c.mask, self._weight(c), reduce)
        score = self.transform(log_ratio)
        return score / num_positions(c.mask) if after else score

    def _kl(self, c: CandidateLogps) -> Tensor:  # [B, K]
        assert c.kl is not None, "Objective checks the needs before any score is taken"
        return over_positions(c.kl, c.mask, c.kl_weight, self.reduce)

    def _beta(self, score: Tensor) -> Tensor | float:
        if not isinstance(self.beta, tuple):
            return self.beta
        if len(self.beta) != score.shape[1]:
            raise NeedsError(
                f"the objective has {len(self.beta)} betas, one per candidate, but sees "
                f"{score.shape[1]} candidates"
            )
        return score.new_tensor(self.beta)
