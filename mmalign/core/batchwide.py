"""Terms that look across the batch, or keep a running state: KTO and its relatives, BCO and AOT.

Their rows are not independent: results depend on how many rows meet in one step. What they compare
is gathered over all processes, so splitting a batch over processes changes nothing; splitting it
over accumulation steps does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from mmalign.core.links import nll
from mmalign.core.numerics import full_precision, gather_rows, global_mean, global_sum, require
from mmalign.core.terms import Scored
from mmalign.core.types import CandidateLogps, Needs, Rows


class RunningMean(nn.Module):
    """Mean of everything seen in training, over all processes; a buffer, so checkpoints keep it."""

    mean: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def forward(self, values: Tensor) -> Tensor:  # any -> []
        """The mean, after taking `values` in when in training mode; 0 before anything was seen."""
        if self.training:
            batch = torch.stack([values.sum(), values.new_tensor(float(values.numel()))])
            total, number = global_sum(batch).to(self.mean)
            self.count += number
            self.mean += (total - number * self.mean) / self.count.clamp(min=1.0)
        return self.mean.to(values)


@dataclass(frozen=True)
class Bco(Scored):
    """Binary classifier optimisation: every rated response against a common shift.

    loss = sum over k of label_k nll(s_k - shift) + (1 - label_k) nll(-(s_k - shift))

    Args:
        score: How a response is scored.
        shift: Running mean of all scores, updated with a batch before it is used, in training mode
            only; None for no shift.
        kind: `pair` reads candidates 0 and 1, `unpaired` candidate 0.
        coef: Weight of the term.
    """

    shift: RunningMean | None = None
    kind: Literal["pair", "unpaired"] = "pair"
    coef: float = 1.0
    name: ClassVar[str] = "bco"

    @property
    def needs(self) -> Needs:
        """Rated responses, paired or not."""
        rows: Rows = self.kind
        count = 2 if self.kind == "pair" else 1
        return self.score.needs | Needs(rows=rows, candidates=count, labels=True)

    @property
    def across_rows(self) -> bool:
        """The shift moves with all rows."""
        return self.shift is not None

    def rated_columns(self, c: CandidateLogps) -> CandidateLogps:
        """The pair, or the one response of the row."""
        return c.columns((0, 1) if self.kind == "pair" else (0,))

    def __call__(self, c: CandidateLogps) -> Tensor:  # [B]
        """The classifier's cross-entropy, summed over the rated candidates."""
        c = self.rated_columns(c)
        score, labels = self.score(c), full_precision(c.labels)
        if self.shift is not None:
            score = score - self.shift(score.detach())
        return (labels * nll(score) + (1.0 - labels) * nll(-score)).sum(1)

    def report(self, c: CandidateLogps) -> dict[str, Tensor]:
        """The usual metrics, and the shift as `delta`."""
        metrics = super().report(c)
        if self.shift is not None:
            metrics["delta"] = self.shift.mean.clone()
        return metrics


@dataclass(frozen=True)
class Aot(Scored):
    """Alignment by optimal transport: the sorted margins of the policy against the reference's.

    q_i = sort(policy margins)_i - sort(reference margins)_i, times beta;
    loss = (1 - flip) nll(q) + flip nll(-q)

    Rows of all processes are sorted together. A row's loss is the one at the rank of its policy
    margin.
    """

    flip: float = 0.0
    coef: float = 1.0
    name: ClassVar[str] = "aot"

    def __post_init__(self) -> None:
        require(
            0.0 <= self.flip <= 0.5, "flip", self.flip, "in [0, 0.5], the share of wrong labels"
        )

    @property
    def needs(self) -> Needs:
        """Pairs and the reference."""
        return self.score.needs | Needs(rows="pair", candidates=2, reference=True)

    @property
    def across_rows(self) -> bool:
        """Ranks are among all rows."""
        return True

    def _sides(self, c: CandidateLogps) -> tuple[Tensor, Tensor]:  # [B], [B]
        assert c.reference is not None, "Objective checks the needs first"
        alone = replace(self.score, reference_weight=0.0)
        policy = alone(c)
        reference = alone(c.replace(policy=c.reference.detach()))
        return policy[:, 0] - policy[:, 1], reference[:, 0] - reference[:, 1]

    def __call__(self, c: CandidateLogps) -> Tensor:  # [B]
        """The loss at each row's rank."""
        first, second = self._sides(self.rated_columns(c))
        (first, own), (second, _) = gather_rows(first), gather_rows(second)
        order = first.argsort(stable=True)
        gap = first[order] - second.sort().values  # [W * B]
        loss = (1.0 - self.flip) * nll(gap) + self.flip * nll(-gap)
        return loss[order.argsort()][own]


@dataclass(frozen=True)
class AotUnpaired(Aot):
    """As Aot, between the sorted scores of chosen and of rejected responses.

    q_i = sort(chosen scores)_i - sort(rejected scores)_i. Compares across prompts, so reverse KL
    only.
    """

    name: ClassVar[str] = "aot_unpaired"

    def _sides(self, c: CandidateLogps) -> tuple[Tensor, Tensor]:  # [B], [B]
        score = self.score(c)
        return score[:, 0], score[:, 1]


Baseline = Literal["mismatched", "batch", "class_means", "zero"]
Utility = Literal["sigmoid", "loss_averse", "risk_seeking_1", "risk_seeking_3"]


@dataclass(frozen=True)
class Kto(Scored):
    """Prospect-theoretic utility of single rated responses: KTO and its relatives.

    loss = lambda_y * (1 - h(z)),  z = +-(score - z0), + where the label is desirable (above 1/2)

    Args:
        score: How a response is scored.
        desirable: lambda of desirable rows.
        undesirable: lambda of the others.
        baseline: z0, without gradient: `mismatched` max(0, mean score of candidate 1, a response to
            another prompt); `batch` max(0, mean score of the batch); `class_means` the average of
            the two groups' means; `zero`. Means run over all processes.
        utility: h: `sigmoid(z)`; loss_averse `log sigmoid(z)`; risk_seeking_1
            `-+log sigmoid(-+z)`, that is -y log sigmoid(-(score - z0)); risk_seeking_3
            `-log sigmoid(-z)`.
        coef: Weight of the term.
    """

    desirable: float = 1.0
    undesirable: float = 1.0
    baseline: Baseline = "mismatched"
    utility: Utility = "sigmoid"
    coef: float = 1.0
    name: ClassVar[str] = "kahneman"
    rated: ClassVar[tuple[int, ...]] = (0,)

    def __post_init__(self) -> None:
        require(self.desirable >= 0.0, "desirable", self.desirable, "at least 0")
        require(self.undesirable >= 0.0, "undesirable", self.undesirable, "at least 0")

    @property
    def needs(self) -> Needs:
        """Unpaired rows; the mismatched response where it is the baseline."""
        mismatched = self.baseline == "mismatched"
        return self.score.needs | Needs(
            rows="unpaired",
            candidates=2 if mismatched else 1,
            roles=("mismatched",) if mismatched else (),
        )

    @property
    def across_rows(self) -> bool:
        """The baseline is a mean over rows, and a mismatched response is another row's."""
        return self.baseline != "zero"

    def __call__(self, c: CandidateLogps) -> Tensor:  # [B]
        """lambda * (1 - utility) of each row."""
        rated = self.rated_columns(c)
        gain = self.score(rated)[:, 0] - self._z0(c)
        desirable = (rated.labels[:, 0] > 0.5).to(gain.dtype)
        sign = 2.0 * desirable - 1.0
        z = sign * gain
        if self.utility == "sigmoid":
            regret = torch.sigmoid(-z)
        elif self.utility == "loss_averse":
            regret = 1.0 + nll(z)
        elif self.utility == "risk_seeking_1":
            regret = 1.0 - sign * nll(-gain)
        else:
            regret = 1.0 - nll(-z)
        return (self.desirable * desirable + self.undesirable * (1.0 - desirable)) * regret

    def report(self, c: CandidateLogps) -> dict[str, Tensor]:
        """The usual metrics, and z0 in nats as TRL's `kl`."""
        assert isinstance(self.score.beta, float | int)
        return super().report(c) | {"kl": self._z0(c) / self.score.beta}

    @torch.no_grad()
    def _z0(self, c: CandidateLogps) -> Tensor:  # []
        column = 1 if self.baseline == "mismatched" else 0
        score = self.score(c.columns((column,)))[:, 0]
        if self.baseline == "zero":
            return torch.zeros_like(score[0])
        if self.baseline != "class_means":
            return global_mean(score).clamp(min=0.0)
        desirable = (c.labels[:, 0] > 0.5).to(score.dtype)
        groups = torch.stack([desirable, 1.0 - desirable])  # [2, B]
        count = global_sum(groups.sum(1))
        total = global_sum((groups * score).sum(1))
        present = count > 0
        return (total / count.clamp(min=1.0)).sum() / present.sum()


@dataclass(frozen=True)
class KtoPair(Scored):
    """KTO on pairs: each side's z0 is the other side's batch mean, at least 0.

    loss = [sigmoid(-(s_0 - z_1)) + sigmoid(s_1 - z_0)] / 2,  z_k = max(0, mean over rows of s_k)

    Args:
        score: How a response is scored.
        detach: z carries no gradient; without it, that of this process's rows.
        coef: Weight of the term.
    """

    detach: bool = True
    coef: float = 1.0
    name: ClassVar[str] = "kahneman_pair"

    @property
    def needs(self) -> Needs:
        """Pairs."""
        return self.score.needs | Needs(rows="pair", candidates=2)

    @property
    def across_rows(self) -> bool:
        """Each side is compared with the other's mean."""
        return True

    def __call__(self, c: CandidateLogps) -> Tensor:  # [B]
        """The mean of both sides' regrets."""
        score = self.score(self.rated_columns(c))
        z0, z1 = self._mean(score[:, 0]), self._mean(score[:, 1])
        return 0.5 * (torch.sigmoid(z1 - score[:, 0]) + torch.sigmoid(score[:, 1] - z0))

    def _mean(self, score: Tensor) -> Tensor:  # [B] -> []
        mean = global_mean(score)
        if not self.detach:
            mean = mean + score.mean() - score.mean().detach()
        return mean.clamp(min=0.0)
