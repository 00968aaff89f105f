"""Terms beside the preference: likelihood, value, KL to the reference, sparsity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mmalign.core.numerics import global_mean, num_positions, over_positions, require
from mmalign.core.terms import Term
from mmalign.core.types import CandidateLogps, Needs

NllReduce = Literal["sum", "mean", "batch_token"]


@dataclass(frozen=True)
class Nll(Term):
    """Negative log-likelihood of one candidate: SFT, or the denoising error of a diffusion model.

    Args:
        coef: Weight of the term.
        reduce: `sum` over positions; `mean` over positions, then over rows; `batch_token` over all
            positions of a step, on all processes and in all its micro-batches, so that long
            responses weigh more. None of them depends on how a batch is accumulated in parts.
        candidate: Which column.
        prompt: Score the prompt's tokens too.
    """

    coef: float = 1.0
    reduce: NllReduce = "mean"
    candidate: int = 0
    prompt: bool = False
    name: ClassVar[str] = "nll"

    def __post_init__(self) -> None:
        require(self.reduce in ("sum", "mean", "batch_token"), "nll_reduce", self.reduce,
                "one of 'sum', 'mean', 'batch_token'")  # fmt: skip

    @property
    def needs(self) -> Needs:
        """One column, and its prompt where that is scored."""
        return Needs(
            candidates=self.candidate + 1,
            prompt=self.prompt,
            token_mean=self.reduce == "batch_token",
        )

    def __call__(self, c: CandidateLogps) -> Tensor:  # [B]
        """-log pi of the candidate, reduced."""
        c = c.columns((self.candidate,))
        total = -over_positions(c.policy, c.mask)[:, 0]
        tokens = c.mask.sum((1, 2))
        if self.prompt:
            assert c.prompt is not None, "Objective checks the needs first"
            mask = (
                torch.ones_like(c.prompt, dtype=torch.bool)
                if c.prompt_mask is None
                else c.prompt_mask
            )
            total = total - over_positions(c.prompt, mask)[:, 0]
            tokens = tokens + mask.sum((1, 2))
        if self.reduce == "sum":
            return total
        if self.reduce == "mean":
            return total / tokens.clamp(min=1)
        # The mean of these rows over the step is the sum of all tokens over their number.
        if c.step_positions is None:
            per_row = global_mean(tokens.to(total.dtype))
        else:
            known = c.step_positions[:, 0].to(total)  # [B, 2]
            per_row = known.sum(-1) if self.prompt else known[:, 0]
        return total / torch.where(per_row > 0.0, per_row, 1.0)


@dataclass(frozen=True)
class LogRatio(Term):
    """The log-ratio of one candidate, raised or lowered as a value: VPO.

    Args:
        coef: Weight; negative raises the response's likelihood.
        reduce: Over positions.
        candidate: Which column.
    """

    coef: float
    reduce: Literal["sum", "mean"] = "sum"
    candidate: int = 0
    name: ClassVar[str] = "log_ratio"

    @property
    def needs(self) -> Needs:
        """One column and its reference."""
        return Needs(reference=True, candidates=self.candidate + 1)

    def __call__(self, c: CandidateLogps) -> Tensor:  # [B]
        """log pi - log pi_ref of the candidate."""
        c = c.columns((self.candidate,))
        assert c.reference is not None, "Objective checks the needs first"
        log_ratio = c.policy - c.reference.detach()
        return over_positions(log_ratio, c.mask, reduce=self.reduce)[:, 0]


@dataclass(frozen=True)
class KlPenalty(Term):
    """KL(reference, policy) over every position of one candidate: RRPO's regulariser.

    Position weights do not apply: the whole response is held to the reference, not only its spans.
    """

    coef: float
    reduce: Literal["sum", "mean"] = "sum"
    candidate: int = 0
    name: ClassVar[str] = "kl_penalty"

    @property
    def needs(self) -> Needs:
        """One column and its KL."""
        return Needs(kl=True, candidates=self.candidate + 1)

    def __call__(self, c: CandidateLogps) -> Tensor:  # [B]
        """The sequential KL of the candidate."""
        c = c.columns((self.candidate,))
        assert c.kl is not None, "Objective checks the needs first"
        return over_positions(c.kl, c.mask, reduce=self.reduce)[:, 0]


@dataclass(frozen=True)
class KlGap(Term):
    """KL(reference, policy) of the rejected response less that of the chosen one, as a loss.

    Only the rejected side carries gradient, as in TDPO2: the chosen side is the level that it is
    measured against. Sums over positions; 0 at equal policies. Position weights do not apply.
    """

    coef: float
    name: ClassVar[str] = "kl_gap"

    @property
    def needs(self) -> Needs:
        """A pair and its KL."""
        return Needs(kl=True, candidates=2, rows="pair")

    def __call__(self, c: CandidateLogps) -> Tensor:  # [B]
        """The difference of the sequential KLs."""
        c = c.columns((0, 1))
        assert c.kl is not None, "Objective checks the needs first"
        kl = over_positions(c.kl, c.mask)
        return kl[:, 1] - kl[:, 0].detach()


@dataclass(frozen=True)
class WeightL1(Term):
    """Sparsity of learned position weights: sum of |weight| over the positions of both responses.

    Where `kl_weight` is the very same tensor as `weight` (a common mask), each coefficient counts
    half, so that equal coefficients cost a weight once.

    Args:
        reward: Weight of the L1 norm of `weight`.
        kl: Weight of the L1 norm of `kl_weight`.
    """

    reward: float
    kl: float
    coef: float = 1.0
    name: ClassVar[str] = "weight_l1"

    def __post_init__(self) -> None:
        require(self.reward >= 0.0, "l1_reward", self.reward, "at least 0")
        require(self.kl >= 0.0, "l1_kl", self.kl, "at least 0")

    @property
    def needs(self) -> Needs:
        """The weights of a pair."""
        return Needs(weight=True, candidates=2)

    def __call__(self, c: CandidateLogps) -> Tensor:  # [B]
        """The weighted L1 norms."""
        assert c.weight is not None, "Objective checks the needs first"
        mask = c.mask[:, :2]
        share = 0.5 if c.kl_weight is c.weight else 1.0
        cost = share * self.reward * over_positions(c.weight[:, :2].abs(), mask).sum(1)
        if c.kl_weight is not None:
            cost = cost + share * self.kl * over_positions(c.kl_weight[:, :2].abs(), mask).sum(1)
        return cost

    def report(self, c: CandidateLogps) -> dict[str, Tensor]:
        """The share of positions whose weight is exactly zero: a dead mask head shows here."""
        metrics: dict[str, Tensor] = {}
        count = num_positions(c.mask[:, :2]).sum()
        for name, weight in (("reward", c.weight), ("kl", c.kl_weight)):
            if weight is not None:
                zeros = (weight.detach()[:, :2] == 0) & c.mask[:, :2]
                metrics[f"sparsity/{name}"] = zeros.sum() / count
        return metrics


@dataclass(frozen=True)
class OnlineKl(Term):
    """KL(policy, reference) on fresh samples of the policy, with the gradient of the expectation.

    Value: mean over samples of l_k = log pi - log pi_ref. Gradient: mean of (l_k - mean of the
    others' l) * grad log pi. Differentiating l_k itself has expected gradient zero.

    Args:
        coef: Weight of the KL.
        first: Column of the first sample; all columns from there on are samples.
        samples: Their number, at least 2.
    """

    coef: float
    first: int = 2
    samples: int = 2
    name: ClassVar[str] = "online_kl"

    def __post_init__(self) -> None:
        require(
            self.samples >= 2, "samples", self.samples, "at least 2: the baseline leaves one out"
        )

    @property
    def needs(self) -> Needs:
        """Columns with role `online`."""
        return Needs(
            reference=True,
            candidates=self.first + self.samples,
            roles=("online",) * self.samples,
        )

    def __call__(self, c: CandidateLogps) -> Tensor:  # [B]
        """The KL estimate, carrying the leave-one-out gradient."""
        c = c.columns(tuple(range(self.first, self.first + self.samples)))
        log_ratio = self._log_ratio(c)
        others = (log_ratio.sum(1, keepdim=True) - log_ratio) / (self.samples - 1)
        surrogate = ((log_ratio - others) * over_positions(c.policy, c.mask)).mean(1)
        return log_ratio.mean(1) + surrogate - surrogate.detach()

    def report(self, c: CandidateLogps) -> dict[str, Tensor]:
        """The KL estimate."""
        c = c.columns(tuple(range(self.first, self.first + self.samples)))
        return {"kl": self._log_ratio(c).mean()}

    @torch.no_grad()
    def _log_ratio(self, c: CandidateLogps) -> Tensor:  # [B, samples]
        assert c.reference is not None, "Objective checks the needs first"
        return over_positions(c.policy - c.reference, c.mask)
