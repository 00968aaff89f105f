"""Weights of pairs and rows: on any loss (LD-DPO's on positions, WPO's on rows), and from data.

The latter, and the soft labels beside them, are computed before a run for the presets that read
them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mmalign.core.numerics import over_positions, require
from mmalign.core.objective import Objective
from mmalign.core.terms import Preference, Scored, Term
from mmalign.core.types import CandidateLogps, Needs
from mmalign.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Wpo:
    """Weight of a pair by its likelihood under the current policy; no gradient.

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
        log_weight = over_positions(c.policy - c.log_sum_p2, c.mask, reduce="mean").sum(1)
        return torch.exp(log_weight).clamp(
            max=math.inf if self.clamp_max is None else self.clamp_max
        )


@dataclass(frozen=True)
class Weighed(Preference):
    """A preference term whose loss per row is multiplied by WPO's weight.

    Args:
        weight: Of a row, without gradient.
    """

    weight: Wpo = field(default_factory=Wpo)

    @property
    def needs(self) -> Needs:
        """The preference's, and the policy's own concentration at every position."""
        return super().needs | Needs(log_sum_p2=True)

    def __call__(self, c: CandidateLogps) -> Tensor:  # [B]
        """The weighed loss of each row."""
        return super().__call__(c) * self.weight(self.rated_columns(c))

    def report(self, c: CandidateLogps) -> dict[str, Tensor]:
        """The preference's, and the mean weight."""
        weight = self.weight(self.rated_columns(c))
        return {**super().report(c), "wpo_weight": weight.mean()}


def reweight(
    objective: Objective, ld_alpha: float | None = None, wpo: Wpo | None = None
) -> Objective:
    """The same objective with the weights on its terms that compare the two sides of a pair.

    Args:
        objective: A preset's, a mix, or a user's own; itself where there is no weight.
        ld_alpha: LD-DPO: weight in [0, 1] of the positions beyond the length of the pair's shorter
            response; 1 changes nothing.
        wpo: The weight of a row.

    Raises:
        ConfigError: No term reads a pair, or one that does has no such form.
    """
    if ld_alpha is None and wpo is None:
        return objective
    terms = [_reweighted(term, ld_alpha, wpo) for term in objective.terms.values()]
    if all(new is old for new, old in zip(terms, objective.terms.values(), strict=True)):
        raise ConfigError("ld_alpha and wpo act on pairs, but this objective does not read any")
    return Objective(
        *terms,
        needs=objective.needs,
        names=tuple(objective.terms),
        coefs=objective.coefs,
        unit=objective.unit,
    )


def _reweighted(term: Term, ld_alpha: float | None, wpo: Wpo | None) -> Term:
    if isinstance(term, Preference):
        if term.link.rows == "any":
            return term
        if (term.link.rows, term.link.candidates) != ("pair", 2):
            raise ConfigError(
                "ld_alpha and wpo are defined for pairs of responses, which "
                f"{type(term.link).__name__} does not read"
            )
    elif not isinstance(term, Scored):
        return term
    elif term.needs.rows != "pair":
        raise ConfigError(
            "ld_alpha and wpo are defined for pairs; this loss rates single responses"
        )
    elif wpo is not None:
        raise ConfigError(
            f"wpo weighs pairs, but {type(term).__name__} compares responses of different rows"
        )
    if ld_alpha is not None:
        if term.needs.rows == "plain":
            raise ConfigError(
                "ld_alpha compares the lengths of two responses, and this objective reads one "
                "response under two inputs; leave it out"
            )
        term = replace(term, score=replace(term.score, ld_alpha=ld_alpha))
    if wpo is None or not isinstance(term, Preference):
        return term
    return Weighed(term.score, term.link, term.coef, term.candidates, term.rows, wpo)


def semantic_weights(cosine: Tensor, alpha: float, normalize: bool = False) -> Tensor:  # [N] -> [N]
    """Sem-DPO's row weights exp(-alpha * (1 - cosine)); multiply a record's `weight` by them.

    Args:
        cosine: Similarity of the prompt's and the chosen response's embedding, in [-1, 1].
        alpha: At least 0; 0 gives weight 1 everywhere.
        normalize: Scale to mean 1, so that the learning rate keeps its meaning.

    Source: Sem-DPO, formula as quoted in public notes.
    """
    require(alpha >= 0.0, "alpha", alpha, "at least 0")
    weight = torch.exp(-alpha * (1.0 - cosine))
    return weight / weight.mean() if normalize else weight


def bald(probabilities: Tensor) -> Tensor:  # [T, N] -> [N]
    """Mutual information of T stochastic predictions of a binary label, in nats, in [0, log 2].

    B = H(mean over t of p_t) - mean over t of H(p_t); low means certain.

    Args:
        probabilities: P(first response wins) of each pass with dropout on.
    """
    spread = _binary_entropy(probabilities.mean(0)) - _binary_entropy(probabilities).mean(0)
    return spread.clamp(min=0.0)


def _binary_entropy(p: Tensor) -> Tensor:
    return -(torch.xlogy(p, p) + torch.xlogy(1.0 - p, 1.0 - p))


def uncertainty_labels(uncertainty: Tensor) -> Tensor:  # [N] -> [N, 2]
    """UPO's soft labels (1 - a, a) with a = B / (2 log 2), from 0 (certain) to 1/2 (no idea).

    Args:
        uncertainty: `bald` of each pair.

    Source: Uncertainty-Enhanced Preference Optimization (paper text).
    Departs: the printed a = 1 / (P + 1), P <= 1, is always at least 1/2: training would run
        backwards.
    """
    flip = (0.5 * uncertainty / math.log(2.0)).clamp(0.0, 0.5)
    return torch.stack([1.0 - flip, flip], dim=-1)


def uncertainty_sampling(uncertainty: Tensor, mu: float = 1.0) -> Tensor:  # [N] -> [N]
    """UPO's sampling probability of each pair, proportional to (1 - B)^mu.

    Args:
        uncertainty: `bald` of each pair.
        mu: Sharpness, at least 0; an exponent, since the printed factor would cancel.
    """
    require(mu >= 0.0, "mu", mu, "at least 0")
    weight = (1.0 - uncertainty) ** mu
    return weight / weight.sum()


def visit_labels(better: Tensor, worse: Tensor) -> Tensor:  # [N], [N] -> [N, 2]
    """MCTS-DPO's soft labels (1 - e, e), e = min(1 - 1 / (1 + worse / max(1, better)), 1/2).

    Args:
        better: Visit count of the better child.
        worse: Visit count of the worse child.

    Source: Xie et al. 2024, arXiv:2405.00451, released code.
    """
    ratio = worse / better.clamp(min=1)
    smoothing = (1.0 - 1.0 / (1.0 + ratio)).clamp(max=0.5)
    return torch.stack([1.0 - smoothing, smoothing], dim=-1)
