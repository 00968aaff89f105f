"""Losses that look at each response alone: of pairs, of single rated responses, of ranked lists."""

from __future__ import annotations

from typing import Literal

from mmalign.core.batchwide import Aot, AotUnpaired, Bco, Kto, KtoPair, RunningMean
from mmalign.core.links import ApoDown, ApoZero, Dpop, LambdaRank, Link, Nca, PlackettLuce
from mmalign.core.objective import Objective
from mmalign.core.score import Score
from mmalign.core.terms import Preference

__all__ = [  # noqa: RUF022
    "nca", "bco", "apo_zero", "apo_down", "dpop", "kto_pair", "aot", "aot_unpaired", "kto",
    "apo_zero_unpaired", "plackett_luce", "tpo_tree",
]  # fmt: skip

# Losses on pairs that look at each response alone: reverse KL only.


def nca(beta: float = 0.1) -> Objective:
    """Noise-contrastive alignment on pairs.

    loss = -log sigmoid(r_w) - [log sigmoid(-r_w) + log sigmoid(-r_l)] / 2,
    r = beta * log-ratio of the chosen (w) and the rejected (l) response

    Args:
        beta: Inverse temperature of the implicit reward, in 1/nats.

    Source: Chen et al. 2024, arXiv:2402.05369.
    Departs: nothing.
    """
    return Objective(Preference(Score(beta), Nca()))


def bco(
    beta: float = 0.1,
    rows: Literal["pair", "unpaired"] = "pair",
    shift: Literal["running", "none"] = "running",
    compat: Literal["trl-1.16"] | None = None,
) -> Objective:
    """Binary classifier optimisation.

    loss = -log sigmoid(r_w - delta) - log sigmoid(-(r_l - delta)), r = beta * log-ratio,
    delta = running mean of all rewards seen

    Args:
        beta: Inverse temperature of the implicit reward, in 1/nats.
        rows: Read pairs, or single rated responses (one of the two summands each).
        shift: "running" takes a batch into delta before using it, over all processes, in training
            only; it is saved with checkpoints. "none" is delta = 0.
        compat: "trl-1.16" has no delta.

    Source: Jung et al. 2024, arXiv:2404.04656; the running mean as in TRL 1.10's BCOTrainer.
    Departs: a prompt classifier's density-ratio weights are data: put them in a record's `weight`.
    """
    running = shift == "running" and compat is None
    state = RunningMean() if running else None
    return Objective(Bco(Score(beta), shift=state, kind=rows))


def apo_zero(beta: float = 0.1) -> Objective:
    """Anchored preference optimisation, zero: for chosen responses better than the model's own.

    loss = sigmoid(-r_w) + sigmoid(r_l), r = beta * log-ratio

    Args:
        beta: Inverse temperature of the implicit reward, in 1/nats.

    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7.
    Departs: nothing.
    """
    return Objective(Preference(Score(beta), ApoZero()))


def apo_down(beta: float = 0.1) -> Objective:
    """Anchored preference optimisation, down: for chosen responses worse than the model's own.

    loss = sigmoid(r_w) + sigmoid(-(r_w - r_l)), r = beta * log-ratio

    Args:
        beta: Inverse temperature of the implicit reward, in 1/nats.

    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 8.
    Departs: nothing.
    """
    return Objective(Preference(Score(beta), ApoDown()))


def dpop(beta: float = 0.3, penalty: float = 50.0) -> Objective:
    """DPO-positive (Smaug): a penalty where the chosen response becomes less likely.

    loss = -log sigmoid(beta * [m - penalty * max(0, -log-ratio of chosen)])

    Args:
        beta: Inverse temperature of the implicit reward, in 1/nats.
        penalty: Weight of the chosen response's lost log-ratio, no unit.

    Source: Pal et al. 2024, arXiv:2402.13228.
    Departs: nothing.
    """
    return Objective(Preference(Score(beta), Dpop(penalty)))


def kto_pair(beta: float = 0.1, compat: Literal["official"] | None = None) -> Objective:
    """KTO's older form for pairs.

    loss = [sigmoid(-(r_w - z_l)) + sigmoid(r_l - z_w)] / 2, z = max(0, batch mean of r), no
    gradient

    Args:
        beta: Inverse temperature of the implicit reward, in 1/nats.
        compat: "official" lets the gradient through z.

    Source: uclaml/SPPO released code, loss_type kto_pair; prefer kto.
    Departs: the baselines are means over all processes and carry no gradient.
    """
    return Objective(KtoPair(Score(beta), detach=compat is None))


def aot(beta: float = 0.1, flip: float = 0.0) -> Objective:
    """Alignment by optimal transport, paired.

    loss = -(1 - flip) log sigmoid(beta * q) - flip log sigmoid(-beta * q),
    q_i = sort(policy margins)_i - sort(reference margins)_i over the batch

    Args:
        beta: Inverse temperature of the implicit reward, in 1/nats.
        flip: Label smoothing, in [0, 0.5].

    Source: Melnyk et al. 2024, arXiv:2406.05882.
    Departs: sorts the rows of all processes; accumulation steps still sort separately.
    """
    return Objective(Aot(Score(beta), flip))


def aot_unpaired(beta: float = 0.1, flip: float = 0.0) -> Objective:
    """Alignment by optimal transport, between all chosen and all rejected responses.

    loss = -(1 - flip) log sigmoid(beta * q) - flip log sigmoid(-beta * q),
    q_i = sort(chosen log-ratios)_i - sort(rejected log-ratios)_i over the batch

    Args:
        beta: Inverse temperature of the implicit reward, in 1/nats.
        flip: Label smoothing, in [0, 0.5].

    Source: Melnyk et al. 2024, arXiv:2406.05882.
    Departs: sorts the rows of all processes; accumulation steps still sort separately.
    """
    return Objective(AotUnpaired(Score(beta), flip))


# Losses on single responses rated good or bad.


def kto(
    beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Objective:
    """Kahneman-Tversky optimization.

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
    return Objective(Kto(Score(beta), desirable_weight, undesirable_weight))


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
    term = Kto(Score(beta), desirable_weight, undesirable_weight, baseline="zero")
    return Objective(term)


# Losses on K ranked responses of one prompt.


def plackett_luce(beta: float = 0.1) -> Objective:
    """Likelihood of a whole ranking.

    loss = sum over ranks k of [log sum of exp(r_j) over j not ranked above k] - r_k, r = beta *
    log-ratio

    Args:
        beta: Inverse temperature of the implicit reward, in 1/nats.

    Source: Rafailov et al. 2023, arXiv:2305.18290, appendix (Plackett-Luce form).
    Departs: tied responses share their denominator.
    """
    return Objective(Preference(Score(beta), PlackettLuce()))


def tpo_tree(beta: float = 0.1, weighted: bool = True) -> Objective:
    """Tree preference optimisation: LambdaRank over the responses, steps weighted.

    loss = sum over pairs v_i > v_j of lambda_ij * (-log sigmoid(r_i - r_j)),
    lambda_ij = |2^v_i - 2^v_j| * |1/log(1 + rank_i) - 1/log(1 + rank_j)|,
    r = beta * weighted log-ratio, v = labels

    Args:
        beta: Inverse temperature of the implicit reward, in 1/nats.
        weighted: Needs the adapter's step weights (text.masks kind steps); false for plain
            log-ratios.

    Source: Liao et al. 2024, arXiv:2410.12854, in the LiPO-lambda form that the paper names.
    Departs: the released code wraps the list loss in another -log sigmoid, so that descent raises
        the ranking loss; it also counts the diagonal and only the sign of label differences.
    """
    link: Link = LambdaRank()
    return Objective(Preference(Score(beta, weighted=weighted), link))
