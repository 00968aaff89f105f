"""Losses on single responses rated good or bad."""

from __future__ import annotations

from mmalign.core.kahneman import Kahneman
from mmalign.core.objective import Objective
from mmalign.core.score import Score


def kto(
    beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Objective:
    """Kahneman-Tversky optimisation.

    loss = weight * sigmoid(-(r - z0)) if desirable, weight * sigmoid(r - z0) if not,
    r = beta * log-ratio, z0 = max(0, beta * mean log-ratio of mismatched responses), no gradient

    z0 is a mean over the batch on all processes: use at least a few rows a step. Keep weight times
    number of rows of the two kinds between 1:1 and 4:3.

    Args:
        beta: Inverse temperature of the implicit reward, in 1/nats.
        desirable_weight: Weight of desirable rows.
        undesirable_weight: Weight of undesirable rows.

    Source: Ethayarajh et al. 2024, arXiv:2402.01306.
    Departs: nothing.
    """
    return Objective(Kahneman(Score(beta), desirable_weight, undesirable_weight))


def apo_zero_unpaired(
    beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Objective:
    """Anchored preference optimisation on single responses: KTO without its baseline.

    loss = weight * sigmoid(-r) if desirable, weight * sigmoid(r) if not, r = beta * log-ratio

    Args:
        beta: Inverse temperature of the implicit reward, in 1/nats.
        desirable_weight: Weight of desirable rows.
        undesirable_weight: Weight of undesirable rows.

    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266; TRL 1.16 KTOTrainer.
    Departs: nothing.
    """
    term = Kahneman(Score(beta), desirable_weight, undesirable_weight, baseline="zero")
    return Objective(term)
