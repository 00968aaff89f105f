"""Terms: the summands of an objective. Each turns the candidates of a batch into a loss per row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from mmalign.core.links import Link
from mmalign.core.metrics import preference_metrics
from mmalign.core.numerics import full_precision
from mmalign.core.score import Score
from mmalign.core.several import Several
from mmalign.core.types import CandidateLogps, Needs, Rows

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


@dataclass(frozen=True)
class Preference(Term):
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

    score: Score
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
    def alone(self) -> Score | None:
        """The score, unless the link reads differences only."""
        return None if self.link.margin_only else self.score

    def __call__(self, c: CandidateLogps) -> Tensor:  # [B]
        """The link's loss of each row."""
        c = self.rated_columns(c)
        return self.link(self.score(c), full_precision(c.labels))

    def rewards(self, c: CandidateLogps) -> Tensor:  # [B, K]
        """The scores of the link's candidates."""
        return self.score.rewards(self.rated_columns(c))

    def report(self, c: CandidateLogps) -> dict[str, Tensor]:
        """Rewards, margins, accuracy and log-probabilities with TRL's names."""
        c = self.rated_columns(c)
        shares = self.link.shares if isinstance(self.link, Several) else None
        return preference_metrics(c, self.score, shares)

    def rated_columns(self, c: CandidateLogps) -> CandidateLogps:
        """The candidates that the link reads."""
        if self.candidates is not None:
            return c.columns(self.candidates)
        if self.link.rows in ("list", "plain"):
            return c
        return c.columns(tuple(range(self.link.candidates)))
