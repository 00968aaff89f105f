"""Links: scores of one row's candidates to a loss. They never see log-probabilities or betas."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mmalign.core.numerics import expm1_linear, require
from mmalign.core.types import Rows

# m is the margin score[:, 0] - score[:, 1]; nll(m) = -log sigmoid(m). `margin_only` links stay the
# same when a constant is added to all scores of a row, so they are defined under every valid
# divergence; the others look at one response alone and need reverse KL (or log-odds).


class Link(Protocol):
    """Scores and labels of the candidates of each row to a loss per row."""

    candidates: ClassVar[int]  # how many the link reads; the smallest number for a list link
    rows: ClassVar[Rows]
    margin_only: ClassVar[bool]
    reads_labels: ClassVar[bool]  # a pair's label values; the order of a pair is no label

    def __call__(self, score: Tensor, labels: Tensor) -> Tensor: ...  # [B, K], [B, K] -> [B]


def nll(margin: Tensor) -> Tensor:
    """-log sigmoid; not softplus, whose threshold costs 2e-9."""
    return -F.logsigmoid(margin)


def margin_of(score: Tensor) -> Tensor:  # [B, K] -> [B]
    """m: the score of candidate 0 less that of candidate 1."""
    return score[:, 0] - score[:, 1]


@dataclass(frozen=True, slots=True)
class PairLink:
    """Base of links on the margin of a pair."""

    candidates: ClassVar[int] = 2
    rows: ClassVar[Rows] = "pair"
    margin_only: ClassVar[bool] = True
    reads_labels: ClassVar[bool] = False


@dataclass(frozen=True, slots=True)
class PointwiseLink(PairLink):
    """Base of links on pairs that look at each response alone."""

    margin_only: ClassVar[bool] = False


@dataclass(frozen=True, slots=True)
class ListLink(PairLink):
    """Base of links on ranked responses of one prompt."""

    rows: ClassVar[Rows] = "list"
    reads_labels: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class Logistic(PairLink):
    """nll(m - target_margin): DPO, SimPO, TDPO, RRPO."""

    target_margin: float = 0.0

    def __call__(self, score: Tensor, labels: Tensor) -> Tensor:  # [B, K], [B, K] -> [B]
        return nll(margin_of(score) - self.target_margin)


@dataclass(frozen=True, slots=True)
class ClippedLogistic(PairLink):
    """nll(m clipped to [-bound, bound]): chi-PO. The gradient outside is zero, as published."""

    bound: float

    def __post_init__(self) -> None:
        require(0.0 < self.bound < math.inf, "r_max", self.bound, "above 0")

    def __call__(self, score: Tensor, labels: Tensor) -> Tensor:  # [B, K], [B, K] -> [B]
        return nll(margin_of(score).clamp(-self.bound, self.bound))


@dataclass(frozen=True, slots=True)
class ClippedRatio(PointwiseLink):
    """nll(clip(s_0) - clip(s_1)), each score clipped to [low, high]: SPO.

    With scores beta * log(pi / pi_ref) and bounds beta * log(1 -+ eps) the ratio pi / pi_ref is
    clipped to 1 -+ eps. The gradient of a clipped score is zero, as published.
    """

    low: float
    high: float

    def __call__(self, score: Tensor, labels: Tensor) -> Tensor:  # [B, K], [B, K] -> [B]
        clipped = score.clamp(self.low, self.high)
        return nll(margin_of(clipped))


@dataclass(frozen=True, slots=True)
class Conservative(PairLink):
    """(1 - flip) nll(m) + flip nll(-m): cDPO, SimPO with label smoothing; m less target_margin."""

    flip: float = 0.1
    target_margin: float = 0.0

    def __post_init__(self) -> None:
        require(
            0.0 <= self.flip <= 0.5, "flip", self.flip, "in [0, 0.5], the share of wrong labels"
        )

    def __call__(self, score: Tensor, labels: Tensor) -> Tensor:  # [B, K], [B, K] -> [B]
        margin = margin_of(score) - self.target_margin
        return (1.0 - self.flip) * nll(margin) + self.flip * nll(-margin)


@dataclass(frozen=True, slots=True)
class Robust(PairLink):
    """Logistic loss made unbiased under random label flips.

    [(1 - flip) nll(m) - flip nll(-m)] / (1 - 2 flip). Can be negative and is unbounded below for
    large margins; its mean over flipped and unflipped copies of a pair equals nll(m).
    """

    flip: float = 0.1

    def __post_init__(self) -> None:
        require(0.0 <= self.flip < 0.5, "flip", self.flip, "in [0, 0.5), the share of wrong labels")

    def __call__(self, score: Tensor, labels: Tensor) -> Tensor:  # [B, K], [B, K] -> [B]
        margin = margin_of(score)
        kept, flipped = nll(margin), nll(-margin)
        return ((1.0 - self.flip) * kept - self.flip * flipped) / (1.0 - 2.0 * self.flip)


@dataclass(frozen=True, slots=True)
class CrossEntropy(PairLink):
    """label_0 nll(m) + label_1 nll(-m): soft labels, per-pair smoothing (UPO, MCTS-DPO)."""

    reads_labels: ClassVar[bool] = True

    def __call__(self, score: Tensor, labels: Tensor) -> Tensor:  # [B, K], [B, K] -> [B]
        margin = margin_of(score)
        return labels[:, 0] * nll(margin) + labels[:, 1] * nll(-margin)


@dataclass(frozen=True, slots=True)
class Smoothed(PairLink):
    """nll((label_0 - label_1) m): SmPO's averaged preference; hard labels give Logistic."""

    reads_labels: ClassVar[bool] = True

    def __call__(self, score: Tensor, labels: Tensor) -> Tensor:  # [B, K], [B, K] -> [B]
        return nll((labels[:, 0] - labels[:, 1]) * margin_of(score))


@dataclass(frozen=True, slots=True)
class Squared(PairLink):
    """((m - target) / scale)^2: IPO, INPO. With scale = beta the square is in log-ratio units."""

    target: float = 0.5
    scale: float = 1.0

    def __call__(self, score: Tensor, labels: Tensor) -> Tensor:  # [B, K], [B, K] -> [B]
        return ((margin_of(score) - self.target) / self.scale) ** 2


@dataclass(frozen=True, slots=True)
class SquaredToLabels(PairLink):
    """((m - (label_0 - label_1)) / scale)^2, labels being win rates: online IPO, EGPO."""

    scale: float = 1.0
    reads_labels: ClassVar[bool] = True

    def __call__(self, score: Tensor, labels: Tensor) -> Tensor:  # [B, K], [B, K] -> [B]
        return ((margin_of(score) - (labels[:, 0] - labels[:, 1])) / self.scale) ** 2


@dataclass(frozen=True, slots=True)
class Hinge(PairLink):
    """relu(1 + target_margin - m): SLiC, RSO."""

    target_margin: float = 0.0

    def __call__(self, score: Tensor, labels: Tensor) -> Tensor:  # [B, K], [B, K] -> [B]
        return F.relu(1.0 + self.target_margin - margin_of(score))


@dataclass(frozen=True, slots=True)
class Exo(PairLink):
    """KL(sigmoid(m) || target), the reverse direction of cross-entropy, for log targets given.

    p (log p - log_target) + (1 - p) (log(1 - p) - log_other), p = sigmoid(m).
    """

    log_target: float
    log_other: float

    def __call__(self, score: Tensor, labels: Tensor) -> Tensor:  # [B, K], [B, K] -> [B]
        margin = margin_of(score)
        log_p, log_q = F.logsigmoid(margin), F.logsigmoid(-margin)
        return torch.sigmoid(margin) * (log_p - self.log_target) + torch.sigmoid(-margin) * (
            log_q - self.log_other
        )


@dataclass(frozen=True, slots=True)
class DiscoPop(PairLink):
    """nll(m) sigmoid(-m / tau) + exp(-m) sigmoid(m / tau): the discovered blend.

    Not monotone: a shoulder near m = 0 for small tau. The second term is one exponential of a sum:
    the plain product is inf * 0 for m below -88 in float32.
    """

    tau: float = 0.05

    def __post_init__(self) -> None:
        require(0.0 < self.tau < math.inf, "tau", self.tau, "above 0")

    def __call__(self, score: Tensor, labels: Tensor) -> Tensor:  # [B, K], [B, K] -> [B]
        margin = margin_of(score)
        exponential = 1.0 + expm1_linear(-margin + F.logsigmoid(margin / self.tau))
        return nll(margin) * torch.sigmoid(-margin / self.tau) + exponential


@dataclass(frozen=True, slots=True)
class Nca(PointwiseLink):
    """nll(s_0) + [nll(-s_0) + nll(-s_1)] / 2: noise-contrastive alignment."""

    def __call__(self, score: Tensor, labels: Tensor) -> Tensor:  # [B, K], [B, K] -> [B]
        return nll(score[:, 0]) + 0.5 * (nll(-score[:, 0]) + nll(-score[:, 1]))


@dataclass(frozen=True, slots=True)
class ApoZero(PointwiseLink):
    """sigmoid(-s_0) + sigmoid(s_1): raises the chosen response and lowers the rejected one."""

    def __call__(self, score: Tensor, labels: Tensor) -> Tensor:  # [B, K], [B, K] -> [B]
        return torch.sigmoid(-score[:, 0]) + torch.sigmoid(score[:, 1])


@dataclass(frozen=True, slots=True)
class ApoDown(PointwiseLink):
    """sigmoid(s_0) + sigmoid(-m): lowers both responses, the rejected one more."""

    def __call__(self, score: Tensor, labels: Tensor) -> Tensor:  # [B, K], [B, K] -> [B]
        return torch.sigmoid(score[:, 0]) + torch.sigmoid(-margin_of(score))


@dataclass(frozen=True, slots=True)
class Dpop(PointwiseLink):
    """nll(m - penalty * relu(-s_0)): DPO-positive, which keeps the chosen response likely."""

    penalty: float = 50.0

    def __post_init__(self) -> None:
        require(0.0 <= self.penalty < math.inf, "penalty", self.penalty, "at least 0")

    def __call__(self, score: Tensor, labels: Tensor) -> Tensor:  # [B, K], [B, K] -> [B]
        return nll(margin_of(score) - self.penalty * F.relu(-score[:, 0]))


@dataclass(frozen=True, slots=True)
class Bernoulli(PointwiseLink):
    """sum over k of label_k nll(s_k) + (1 - label_k) nll(-s_k): ASFT."""

    reads_labels: ClassVar[bool] = True

    def __call__(self, score: Tensor, labels: Tensor) -> Tensor:  # [B, K], [B, K] -> [B]
        return (labels * nll(score) + (1.0 - labels) * nll(-score)).sum(1)


@dataclass(frozen=True, slots=True)
class SquaredEach(PointwiseLink):
    """share * sum over k of ((s_k - (label_k - offset)) / scale)^2: SPPO, GPO."""

    scale: float
    offset: float = 0.5
    share: float = 0.5
    reads_labels: ClassVar[bool] = True

    def __call__(self, score: Tensor, labels: Tensor) -> Tensor:  # [B, K], [B, K] -> [B]
        return self.share * (((score - (labels - self.offset)) / self.scale) ** 2).sum(1)


@dataclass(frozen=True, slots=True)
class Anchor(PointwiseLink):
    """nll(s_0 - target): one response's score above a floor (mDPO's anchor, rationales)."""

    target: float = 0.0
    candidates: ClassVar[int] = 1
    rows: ClassVar[Rows] = "any"

    def __call__(self, score: Tensor, labels: Tensor) -> Tensor:  # [B, K], [B, K] -> [B]
        return nll(score[:, 0] - self.target)


@dataclass(frozen=True, slots=True)
class MultiNegative(PairLink, ABC):
    """A link of candidate 0 against the others, which says how much each of them counts."""

    @abstractmethod
    def __call__(self, score: Tensor, labels: Tensor) -> Tensor:  # [B, K], [B, K] -> [B]
        """The loss of each row."""

    @abstractmethod
    def shares(self, labels: Tensor) -> Tensor:  # [B, K] -> [B, K - 1]
        """The weight of each other candidate in the rejected side of a row."""


@dataclass(frozen=True, slots=True)
class Povid(MultiNegative):
    """nll(score_0 - sum of the other scores): one response against several (POVID, VistaDPO)."""

    candidates: ClassVar[int] = 3
    margin_only: ClassVar[bool] = False  # one constant enters, two leave

    def __call__(self, score: Tensor, labels: Tensor) -> Tensor:  # [B, K], [B, K] -> [B]
        """The loss of each row."""
        return nll(score[:, 0] - score[:, 1:].sum(1))

    def shares(self, labels: Tensor) -> Tensor:  # [B, K] -> [B, K - 1]
        """1 for each."""
        return torch.ones_like(labels[:, 1:])


@dataclass(frozen=True, slots=True)
class Pami(MultiNegative):
    """sum over k >= 1 of label_k nll(score_0 - score_k): one response under K + 1 inputs (PaMi).

    Candidate 0 has the true input. The labels of the others are their weights a_k, usually of sum
    1; the label of candidate 0 is not read. K = 1 with weight 1 is Logistic.
    """

    rows: ClassVar[Rows] = "plain"
    reads_labels: ClassVar[bool] = True

    def __call__(self, score: Tensor, labels: Tensor) -> Tensor:  # [B, K], [B, K] -> [B]
        """The loss of each row."""
        return (labels[:, 1:] * nll(score[:, :1] - score[:, 1:])).sum(1)

    def shares(self, labels: Tensor) -> Tensor:  # [B, K] -> [B, K - 1]
        """Their weights, scaled to a mean."""
        weight = labels[:, 1:]
        total = weight.sum(1, keepdim=True)
        return weight / torch.where(total > 0.0, total, 1.0)


@dataclass(frozen=True, slots=True)
class PlackettLuce(ListLink):
    """-log likelihood of the ranking: sum over k of logsumexp(scores not ranked above k) - s_k.

    Tied responses share their denominator (Breslow), so the loss does not depend on their order.
    K = 2 gives Logistic.
    """

    def __call__(self, score: Tensor, labels: Tensor) -> Tensor:  # [B, K], [B, K] -> [B]
        above = labels[:, None, :] > labels[:, :, None]  # [B, K, K] j is ranked above k
        rest = score[:, None, :].masked_fill(above, -torch.inf).logsumexp(-1)  # [B, K]
        return (rest - score).sum(1)


@dataclass(frozen=True, slots=True)
class LambdaRank(ListLink):
    """Sum over pairs with label_i > label_j of lambda_ij nll(s_i - s_j).

    lambda_ij = |2^label_i - 2^label_j| |1/log(1 + rank_i) - 1/log(1 + rank_j)|, natural logarithm;
    rank counts from 1 by the current score and carries no gradient. Ties contribute nothing. Labels
    are grades; use small ones, the gain is exponential.
    """

    def __call__(self, score: Tensor, labels: Tensor) -> Tensor:  # [B, K], [B, K] -> [B]
        order = score.argsort(dim=1, descending=True, stable=True)
        rank = order.argsort(dim=1).to(score.dtype) + 1.0  # [B, K]
        gain, discount = torch.exp2(labels.to(score.dtype)), 1.0 / torch.log1p(rank)
        gap = (gain[:, :, None] - gain[:, None, :]) * (labels[:, :, None] > labels[:, None, :])
        weight = gap * (discount[:, :, None] - discount[:, None, :]).abs()  # [B, K, K]
        return (weight * nll(score[:, :, None] - score[:, None, :])).sum((1, 2))
