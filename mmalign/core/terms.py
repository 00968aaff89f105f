"""Terms: the summands of an objective. Each turns the candidates of a batch into a loss per row."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor

from mmalign.core.links import Link
from mmalign.core.metrics import preference_metrics
from mmalign.core.numerics import full_precision, over_positions, require
from mmalign.core.score import Score
from mmalign.core.several import Several
from mmalign.core.types import CandidateLogps, Needs, Rows
from mmalign.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn


class Term(ABC):
    """A summand: `coef` times a loss per row, what it needs, and what it has to report."""

    name: ClassVar[str]
    coef: float

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What this term reads of the candidates."""

    @property
    def state(self) -> nn.Module | None:
        """The module that holds running state, for checkpoints; most terms have none."""
        return None

    @property
    def alone(self) -> Score | None:
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

    def modified(self, ld_alpha: float | None, wpo: Wpo | None) -> Self:
        """This term under the modifiers; a term that reads no pair is left as it is."""
        return self


@dataclass(frozen=True, slots=True)
class Wpo:
    """Weight of a pair by how likely the current policy is to give it; no gradient.

    w = product over both sides of exp(mean over positions of [policy - log sum_v p(v)^2]). A side
    can exceed 1: the most likely token has p >= sum p^2.

    Args:
        clamp_max: Largest product; 1 as released, None as in TRL.

    Source: Zhou et al. 2024, arXiv:2406.11827, eq. 2, and released code.
    """

    clamp_max: float | None = 1.0

    def __post_init__(self) -> None:
        bound = self.clamp_max
        require(bound is None or bound > 0.0, "wpo.clamp_max", bound, "above 0, or null for none")

    @torch.no_grad()
    def __call__(self, c: CandidateLogps) -> Tensor:  # [B]
        """The weight of each pair."""
        assert c.log_sum_p2 is not None, "Objective checks the needs first"
        likeness = over_positions(c.policy - c.log_sum_p2, c.mask, reduce="mean").sum(1)
        return torch.exp(likeness).clamp(max=math.inf if self.clamp_max is None else self.clamp_max)


@dataclass(frozen=True)
class Preference(Term):
    """A link on the scores of some candidates.

    Args:
        score: How a candidate is scored.
        link: How scores become a loss.
        coef: Weight of the term.
        candidates: Which columns the link reads, in this order; None for the first ones it needs,
            all for a list link and a bag.
        wpo: WPO's pair weight, applied to this term.
        rows: The records that the candidates are made from, where not the link's: "plain" for one
            response under two inputs.
    """

    score: Score
    link: Link
    coef: float = 1.0
    candidates: tuple[int, ...] | None = None
    wpo: Wpo | None = None
    rows: Rows | None = None
    name: ClassVar[str] = "preference"

    @property
    def needs(self) -> Needs:
        """The score's needs and the link's kind of rows."""
        highest = self.link.candidates if self.candidates is None else max(self.candidates) + 1
        return self.score.needs | Needs(
            candidates=highest,
            rows=self.rows or self.link.rows,
            log_sum_p2=self.wpo is not None,
            labels=self.link.reads_labels,
        )

    @property
    def alone(self) -> Score | None:
        """The score, unless the link reads differences only."""
        return None if self.link.margin_only else self.score

    def __call__(self, c: CandidateLogps) -> Tensor:  # [B]
        """The link's loss of each row."""
        c = self._columns(c)
        loss = self.link(self.score(c), full_precision(c.labels))
        return loss if self.wpo is None else loss * self.wpo(c)

    def rewards(self, c: CandidateLogps) -> Tensor:  # [B, K]
        """The scores of the link's candidates."""
        return self.score.rewards(self._columns(c))

    def report(self, c: CandidateLogps) -> dict[str, Tensor]:
        """Rewards, margins, accuracy and log-probabilities with TRL's names."""
        c = self._columns(c)
        shares = self.link.shares if isinstance(self.link, Several) else None
        metrics = preference_metrics(c, self.score, shares)
        if self.wpo is not None:
            metrics["wpo_weight"] = self.wpo(c).mean()
        return metrics

    def modified(self, ld_alpha: float | None, wpo: Wpo | None) -> Preference:
        """With LD-DPO's tail weight in the score and WPO's weight on the loss; pairs only."""
        if self.link.rows == "any":
            return self
        if self.link.rows != "pair" or self.link.candidates != 2:
            raise ConfigError(
                "ld_alpha and wpo are defined for pairs of responses, which "
                f"{type(self.link).__name__} does not read"
            )
        if ld_alpha is not None and self.rows == "plain":
            raise ConfigError(
                "ld_alpha compares the lengths of two responses, and this objective reads one "
                "response under two inputs; leave it out"
            )
        score = self.score if ld_alpha is None else replace(self.score, ld_alpha=ld_alpha)
        return replace(self, score=score, wpo=wpo or self.wpo)

    def _columns(self, c: CandidateLogps) -> CandidateLogps:
        if self.candidates is not None:
            return c.columns(self.candidates)
        if self.link.rows in ("list", "plain"):
            return c
        return c.columns(tuple(range(self.link.candidates)))
