"""Losses of video papers: pairs with spans or likelihood, and one response under two inputs.

`video_cells` holds those that compare responses and inputs at once.
"""

from __future__ import annotations

import math

from mmalign.core.links import Logistic
from mmalign.core.numerics import require
from mmalign.core.objective import Objective
from mmalign.core.regularisers import KlPenalty, Nll, NllReduce
from mmalign.core.score import Score
from mmalign.core.several import Bag
from mmalign.core.terms import Preference
from mmalign.core.types import Needs


def rrpo(beta: float = 0.1, alpha: float = 0.01) -> Objective:
    """Refined regularised preference optimisation: reward on spans, KL on the chosen response.

    loss = -log sigmoid(beta * m_spans) + alpha * KL(reference, policy) summed over the chosen
    response

    Args:
        beta: Inverse temperature of the implicit reward, in 1/nats. 0.1 to 0.9.
        alpha: Weight of the KL, no unit. 0.01 to 0.1.

    Source: Sarkar et al. 2025, arXiv:2504.12083, released code.
    Departs: spans count only on response tokens, and the lowest span id is never dropped; the
        published formula's sign of the KL is the code's.
    """
    require(0.0 <= alpha < math.inf, "alpha", alpha, "at least 0")
    term = Preference(Score(beta, weighted=True), Logistic())
    return Objective(term, KlPenalty(alpha)) if alpha else Objective(term)


def adpo(beta: float = 0.1, nll_weight: float = 0.0) -> Objective:
    """CAT's ambiguity-aware DPO: DPO on pairs of precise and vague answers.

    loss = -log sigmoid(beta * m) + nll_weight * NLL(chosen)

    Args:
        beta: Inverse temperature of the implicit reward, in 1/nats.
        nll_weight: Weight of the chosen response's mean negative log-likelihood; the release
            accepts one and never uses it.

    Source: Ye et al. 2024, arXiv:2403.04640, released code.
    Departs: labels are those of the expanded sequence, padding is not scored, the mean is over
        rows.
    """
    require(0.0 <= nll_weight < math.inf, "nll_weight", nll_weight, "at least 0")
    term = Preference(Score(beta), Logistic())
    return Objective(term, Nll(nll_weight)) if nll_weight else Objective(term)


def vdpo(beta: float = 0.1) -> Objective:
    """Visual DPO: the same response preferred under the true input to a corrupted one.

    loss = -log sigmoid(beta * [h(y|v) - h(y|v_c)]), h the log-ratio, v_c the corrupted input

    A record has one response, or the chosen one is taken; the adapter makes the corrupted input.

    Args:
        beta: Inverse temperature of the implicit reward, in 1/nats.

    Source: the conditional term of mDPO, Wang et al. 2024, arXiv:2406.11839, alone.
    Departs: nothing.
    """
    return Objective(
        Preference(Score(beta), Logistic(), rows="plain"), needs=Needs(roles=("corrupted",))
    )


def pami_vdpo(beta: float = 0.1) -> Objective:
    """PaMi-VDPO: the response under its clip against the same under augmented clips.

    loss = -w * sum over k of a_k * log sigmoid(beta * [h(y|v) - h(y|v_k)]), h the log-ratio, v_k
    the augmented clips, a_k their weights, w the row weight

    The adapter makes the clips and weighs them: those close to v that change the answer most count.

    Args:
        beta: Inverse temperature of the implicit reward, in 1/nats.

    Source: Ding et al. 2025, arXiv:2504.05810; reconstructed, no public code.
    Departs: constants and the formulas of the weights are ours.
    """
    return Objective(Preference(Score(beta), Bag()), needs=Needs(roles=("augmented",)))


def tpo_temporal(
    beta: float = 0.1, nll_weight: float = 0.5, nll_reduce: NllReduce = "mean"
) -> Objective:
    """Temporal preference optimisation of long videos: DPO plus likelihood of the chosen response.

    loss = -log sigmoid(beta * m) + nll_weight * NLL(chosen)

    Args:
        beta: Inverse temperature of the implicit reward, in 1/nats.
        nll_weight: Weight of the likelihood term.
        nll_reduce: "mean" over the response's tokens; "sum"; "batch_token" over the step's.

    Source: Li et al. 2025, arXiv:2501.13919.
    Departs: nothing known; no code was run.
    """
    require(0.0 <= nll_weight < math.inf, "nll_weight", nll_weight, "at least 0")
    return Objective(Preference(Score(beta), Logistic()), Nll(nll_weight, nll_reduce))


def ha_dpo(beta: float = 0.1, nll_weight: float = 0.5) -> Objective:
    """Hallucination-aware DPO: DPO plus the summed likelihood of style-consistent answers.

    loss = -log sigmoid(beta * m) - nll_weight * log pi(chosen)

    Args:
        beta: Inverse temperature of the implicit reward, in 1/nats.
        nll_weight: Weight of the summed negative log-likelihood, per nat.

    Source: Zhao et al. 2023, arXiv:2311.16839.
    Departs: the auxiliary likelihood is the chosen response's.
    """
    return tpo_temporal(beta, nll_weight, "sum")
