"""Links that set one candidate against several others at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmalign.core.links import nll
from mmalign.core.types import Rows


class Several(ABC):
    """A link of candidate 0 against the others, which says how much each of them counts."""

    @abstractmethod
    def __call__(self, score: Tensor, labels: Tensor) -> Tensor:  # [B, K], [B, K] -> [B]
        """The loss of each row."""

    @abstractmethod
    def shares(self, labels: Tensor) -> Tensor:  # [B, K] -> [B, K - 1]
        """What each other candidate counts in the rejected side of a row."""


@dataclass(frozen=True, slots=True)
class Contrast(Several):
    """nll(score_0 - sum of the other scores): one response against several (POVID, VistaDPO)."""

    candidates: ClassVar[int] = 3
    rows: ClassVar[Rows] = "pair"
    margin_only: ClassVar[bool] = False  # one constant enters, two leave
    reads_labels: ClassVar[bool] = False

    def __call__(self, score: Tensor, labels: Tensor) -> Tensor:  # [B, K], [B, K] -> [B]
        """The loss of each row."""
        return nll(score[:, 0] - score[:, 1:].sum(1))

    def shares(self, labels: Tensor) -> Tensor:  # [B, K] -> [B, K - 1]
        """All count whole."""
        return torch.ones_like(labels[:, 1:])


@dataclass(frozen=True, slots=True)
class Bag(Several):
    """sum over k >= 1 of label_k nll(score_0 - score_k): one response under K + 1 inputs (PaMi).

    Candidate 0 has the true input. The labels of the others are their weights a_k, usually of sum
    1; the label of candidate 0 is not read. K = 1 with weight 1 is Logistic.
    """

    candidates: ClassVar[int] = 2
    rows: ClassVar[Rows] = "plain"
    margin_only: ClassVar[bool] = True
    reads_labels: ClassVar[bool] = True

    def __call__(self, score: Tensor, labels: Tensor) -> Tensor:  # [B, K], [B, K] -> [B]
        """The loss of each row."""
        return (labels[:, 1:] * nll(score[:, :1] - score[:, 1:])).sum(1)

    def shares(self, labels: Tensor) -> Tensor:  # [B, K] -> [B, K - 1]
        """Their weights, scaled to a mean."""
        weight = labels[:, 1:]
        total = weight.sum(1, keepdim=True)
        return weight / torch.where(total > 0.0, total, 1.0)
