"""KTO and its relatives: the utility of single rated responses against a baseline of the batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mmalign.core.batchwide import Scored
from mmalign.core.links import nll
from mmalign.core.numerics import global_mean, global_sum, require
from mmalign.core.types import CandidateLogps, Needs

Baseline = Literal["mismatched", "batch", "class_means", "zero"]
Utility = Literal["sigmoid", "loss_averse", "risk_seeking_1", "risk_seeking_3"]


@dataclass(frozen=True)
class Kahneman(Scored):
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
class KahnemanPair(Scored):
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
