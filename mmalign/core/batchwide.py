"""Terms that look across the batch, or keep a running state: KTO, BCO and AOT.

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
from mmalign.core.metrics import preference_metrics
from mmalign.core.numerics import full_precision, gather_rows, global_sum, require
from mmalign.core.score import Score
from mmalign.core.terms import Term
from mmalign.core.types import CandidateLogps, Needs, Rows


@dataclass(frozen=True)
class Scored(Term):
    """A term on scores of rated candidates, reverse KL only; `rated` columns are compared."""

    score: Score

    rated: ClassVar[tuple[int, ...]] = (0, 1)

    @property
    def alone(self) -> Score:
        """The score: responses of different rows meet here."""
        return self.score

    def rated_columns(self, c: CandidateLogps) -> CandidateLogps:
        """The candidates that are compared."""
        return c.columns(self.rated)

    def rewards(self, c: CandidateLogps) -> Tensor:  # [B, K]
        """The scores of the rated candidates."""
        return self.score.rewards(self.rated_columns(c))

    def report(self, c: CandidateLogps) -> dict[str, Tensor]:
        """Rewards, margins, accuracy and log-probabilities with TRL's names."""
        return preference_metrics(self.rated_columns(c), self.score)


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
    def state(self) -> nn.Module | None:
        """The running shift."""
        return self.shift

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
