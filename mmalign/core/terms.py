"""Terms: the summands of an objective. Each turns the candidates of a batch into a loss per row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mmalign.core.links import Link, MultiNegative
from mmalign.core.numerics import (
    full_precision,
    global_mean,
    num_positions,
    on_cpu,
    over_positions,
    require,
)
from mmalign.core.score import Score
from mmalign.core.types import CandidateLogps, Needs, Rows


@torch.no_grad()
def preference_metrics(
    c: CandidateLogps, score: Score, shares: Callable[[Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    """Rewards, margins, accuracy, ties and log-probabilities of the candidates in `c`.

    Under TRL's names, so that one dashboard fits both.
    A tie counts half in the accuracy; TRL counts it as wrong.

    The chosen candidate is the one with the highest label, the rejected one that with the lowest;
    in a tie the earlier and the later. With one candidate a row (unpaired data) the two are groups
    of rows: labels above 1/2, and the others; a group without rows is left out, or nan on an
    accelerator.

    Args:
        c: The candidates that the loss compares.
        score: Gives the rewards.
        shares: `MultiNegative.shares` of a link of candidate 0 against all others. Then the
            rejected reward is the others' sum by share, as the loss has it, and the other numbers
            are means.
    """
    values = {"rewards": score.rewards(c), "logps": over_positions(c.policy, c.mask)}
    if not score.is_log_ratio:
        values["log_ratio"] = score.log_ratio_rewards(c)
    metrics: dict[str, Tensor] = {}
    if c.labels.shape[1] == 1:
        desirable = c.labels[:, 0] > 0.5
        for name, value in values.items():
            for side, rows in (("chosen", desirable), ("rejected", ~desirable)):
                if not on_cpu(rows):  # rows picked by a mask would be waited for
                    total = torch.where(rows, value[:, 0], 0.0).sum()
                    metrics[f"{name}/{side}"] = total / rows.sum()
                elif bool(rows.any()):
                    metrics[f"{name}/{side}"] = value[rows, 0].mean()
        if "rewards/chosen" in metrics and "rewards/rejected" in metrics:
            metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    else:
        for name, value in values.items():
            if shares is None:
                chosen, rejected = _by_label(value, c.labels)
            else:
                share = shares(c.labels).to(value.dtype)  # [B, K - 1]
                chosen, rejected = value[:, 0], (share * value[:, 1:]).sum(1)
                if name != "rewards":
                    rejected = rejected / share.sum(1).clamp(min=1.0)
            metrics[f"{name}/chosen"] = chosen.mean()
            metrics[f"{name}/rejected"] = rejected.mean()
            if name == "rewards":
                metrics["rewards/margins"] = (chosen - rejected).mean()
                won, tied = chosen > rejected, chosen == rejected
                metrics["rewards/ties"] = tied.to(value.dtype).mean()
                accuracy = won.to(value.dtype).mean() + 0.5 * metrics["rewards/ties"]
                metrics["rewards/accuracies"] = accuracy
    if c.kl is not None:
        metrics["kl"] = over_positions(c.kl, c.mask).mean()
    return metrics


def _by_label(values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:  # [B, K] -> [B], [B]
    best = labels.argmax(1, keepdim=True)
    worst = labels.shape[1] - 1 - labels.flip(1).argmin(1, keepdim=True)
    return values.gather(1, best).squeeze(1), values.gather(1, worst).squeeze(1)


class Term(ABC):
    """A summand: `coef` times a loss per row, what it needs, and what it has to report.

    A module among its attributes is running state, which checkpoints keep.
    """

    name: ClassVar[str]
    coef: float

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """The data that this term reads of the candidates."""

    @property
    def across_rows(self) -> bool:
        """Whether a row's loss depends on the rows beside it; its batch then stays whole."""
        return False

    @property
    def pointwise_score(self) -> Score | None:
        """The score that is read one response at a time, which only reverse KL defines, or None."""
        return None

    @abstractmethod
    def __call__(self, c: CandidateLogps) -> Tensor:  # [B]
        """The loss of each row, before `coef`."""

    def report(self, c: CandidateLogps) -> dict[str, Tensor]:
        """Metrics, detached and averaged over rows."""
        return {}

    def rewards(self, c: CandidateLogps) -> Tensor | None:  # [B, K]
        """Implicit rewards of the rated candidates, where this term has them."""
        return None


@dataclass(frozen=True)
class Scored(Term):
    """A term on the scores of rated candidates, which are reported as rewards and margins."""

    score: Score
    rated: ClassVar[tuple[int, ...]] = (0, 1)

    def rated_columns(self, c: CandidateLogps) -> CandidateLogps:
        """The candidates that are compared."""
        return c.columns(self.rated)

    @property
    def pointwise_score(self) -> Score | None:
        """The score, unless only differences within a row are read."""
        return self.score

    def rewards(self, c: CandidateLogps) -> Tensor:  # [B, K]
        """The scores of the rated candidates."""
        return self.score.rewards(self.rated_columns(c))

    def report(self, c: CandidateLogps) -> dict[str, Tensor]:
        """Rewards, margins, accuracy and log-probabilities with TRL's names."""
        return preference_metrics(self.rated_columns(c), self.score)


@dataclass(frozen=True)
class Preference(Scored):
    """A link on the scores of some candidates.

    Args:
        score: How a candidate is scored.
        link: How scores become a loss.
        coef: Weight of the term.
        candidates: Which columns the link reads, in this order; None for the first ones it needs,
            all for a list link and a bag.
        rows: The records that the candidates are made from, where not the link's: "plain" for one
            response under two inputs.
    """

    link: Link
    coef: float = 1.0
    candidates: tuple[int, ...] | None = None
    rows: Rows | None = None
    name: ClassVar[str] = "preference"

    @property
    def needs(self) -> Needs:
        """The score's needs and the link's kind of rows."""
        highest = self.link.candidates if self.candidates is None else max(self.candidates) + 1
        return self.score.needs | Needs(
            candidates=highest,
            rows=self.rows or self.link.rows,
            labels=self.link.reads_labels,
        )

    @property
    def pointwise_score(self) -> Score | None:
        """The score, unless the link reads differences only."""
        return None if self.link.margin_only else self.score

    def __call__(self, c: CandidateLogps) -> Tensor:  # [B]
        """The link's loss of each row."""
        c = self.rated_columns(c)
        return self.link(self.score(c), full_precision(c.labels))

    def report(self, c: CandidateLogps) -> dict[str, Tensor]:
        """Rewards, margins, accuracy and log-probabilities with TRL's names."""
        c = self.rated_columns(c)
        shares = self.link.shares if isinstance(self.link, MultiNegative) else None
        return preference_metrics(c, self.score, shares)

    def rated_columns(self, c: CandidateLogps) -> CandidateLogps:
        """The candidates that the link reads."""
        if self.candidates is not None:
            return c.columns(self.candidates)
        if self.link.rows in ("list", "plain"):
            return c
        return c.columns(tuple(range(self.link.candidates)))


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
    """KL(reference, policy) over every position of one candidate: RRPO's regularizer.

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
