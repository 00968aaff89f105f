"""List links: K scored responses of one prompt, ranked by their labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmalign.core.links import nll
from mmalign.core.types import Rows


@dataclass(frozen=True, slots=True)
class PlackettLuce:
    """-log likelihood of the ranking: sum over k of logsumexp(scores not ranked above k) - s_k.

    Tied responses share their denominator (Breslow), so the loss does not depend on their order.
    K = 2 gives Logistic.
    """

    candidates: ClassVar[int] = 2
    rows: ClassVar[Rows] = "list"
    margin_only: ClassVar[bool] = True
    reads_labels: ClassVar[bool] = True

    def __call__(self, score: Tensor, labels: Tensor) -> Tensor:  # [B, K], [B, K] -> [B]
        above = labels[:, None, :] > labels[:, :, None]  # [B, K, K] j is ranked above k
        rest = score[:, None, :].masked_fill(above, -torch.inf).logsumexp(-1)  # [B, K]
        return (rest - score).sum(1)


@dataclass(frozen=True, slots=True)
class LambdaRank:
    """Sum over pairs with label_i > label_j of lambda_ij nll(s_i - s_j).

    lambda_ij = |2^label_i - 2^label_j| |1/log(1 + rank_i) - 1/log(1 + rank_j)|, natural logarithm;
    rank counts from 1 by the current score and carries no gradient. Ties contribute nothing. Labels
    are grades; use small ones, the gain is exponential.
    """

    candidates: ClassVar[int] = 2
    rows: ClassVar[Rows] = "list"
    margin_only: ClassVar[bool] = True
    reads_labels: ClassVar[bool] = True

    def __call__(self, score: Tensor, labels: Tensor) -> Tensor:  # [B, K], [B, K] -> [B]
        order = score.argsort(dim=1, descending=True, stable=True)
        rank = order.argsort(dim=1).to(score.dtype) + 1.0  # [B, K]
        gain, discount = torch.exp2(labels.to(score.dtype)), 1.0 / torch.log1p(rank)
        gap = (gain[:, :, None] - gain[:, None, :]) * (labels[:, :, None] > labels[:, None, :])
        weight = gap * (discount[:, :, None] - discount[:, None, :]).abs()  # [B, K, K]
        return (weight * nll(score[:, :, None] - score[:, None, :])).sum((1, 2))
