"""Losses on soft labels (p, 1 - p) and on weighted rows."""

from __future__ import annotations

import math

from mmalign.core.links import CrossEntropy, Logistic
from mmalign.core.numerics import require
from mmalign.core.objective import Objective
from mmalign.core.regularisers import Nll
from mmalign.core.score import Score
from mmalign.core.terms import Preference


def soft_dpo(beta: float = 0.1) -> Objective:
    """DPO on soft labels: the share of raters, or one smoothing per pair.

    loss = -p log sigmoid(beta * m) - (1 - p) log sigmoid(-beta * m), (p, 1 - p) = labels

    Args:
        beta: Inverse temperature of the implicit reward, in 1/nats.

    Source: the conservative form of Mitchell 2023 with a label per pair.
    Departs: nothing.
    """
    return Objective(Preference(Score(beta), CrossEntropy()))


def upo(beta: float = 0.1, nll_weight: float = 0.0) -> Objective:
    """Uncertainty-enhanced preference optimisation, in its safe form.

    loss = -(1 - a) log sigmoid(beta * m) - a log sigmoid(-beta * m) + nll_weight * NLL(chosen),
    (1 - a, a) = labels, a = uncertainty of the pair / 2 (core.weights.uncertainty_labels)

    Args:
        beta: Inverse temperature of the implicit reward, in 1/nats.
        nll_weight: Weight of the chosen response's mean negative log-likelihood.

    Source: Self-Evolutionary LLMs through Uncertainty-Enhanced Preference Optimization, paper text.
    Departs: a runs from 0 to 1/2; the printed 1 / (P + 1) is never below 1/2 and trains backwards.
        The likelihood term raises the chosen response; the printed sign lowers it.
    """
    require(0.0 <= nll_weight < math.inf, "nll_weight", nll_weight, "at least 0")
    term = Preference(Score(beta), CrossEntropy())
    return Objective(term, Nll(nll_weight)) if nll_weight else Objective(term)


def mcts_dpo(beta: float = 0.1) -> Objective:
    """DPO on pairs from a search tree, smoothed by visit counts.

    loss = -(1 - e) log sigmoid(beta * m) - e log sigmoid(-beta * m), (1 - e, e) = labels,
    e = min(1 - 1 / (1 + N_worse / max(1, N_better)), 1/2) (core.weights.visit_labels)

    Args:
        beta: Inverse temperature of the implicit reward, in 1/nats.

    Source: Xie et al. 2024, arXiv:2405.00451, released code.
    Departs: nothing.
    """
    return soft_dpo(beta)


def sem_dpo(beta: float = 0.1) -> Objective:
    """Semantically weighted DPO.

    loss = -w log sigmoid(beta * m), w = the record's weight = exp(-alpha * cosine distance of
    prompt and chosen response) (core.weights.semantic_weights)

    Args:
        beta: Inverse temperature of the implicit reward, in 1/nats.

    Source: Sem-DPO, formula as quoted in public notes.
    Departs: weights come with the data, so any pair loss can use them.
    """
    return Objective(Preference(Score(beta), Logistic()))
