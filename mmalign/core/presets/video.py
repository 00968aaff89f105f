"""Losses of video papers: pairs with spans, a response under two inputs, and cells of both."""

from __future__ import annotations

import math

from mmalign.core.links import Anchor, Logistic, Pami, Povid
from mmalign.core.numerics import require
from mmalign.core.objective import Objective
from mmalign.core.score import Score
from mmalign.core.terms import KlGap, KlPenalty, Nll, NllReduce, Preference, Term
from mmalign.core.types import Needs

__all__ = [  # noqa: RUF022
    "rrpo", "adpo", "vdpo", "pami_vdpo", "mdpo", "vdpo_symmetric", "povid", "chip", "vista_dpo",
    "tpo_temporal", "ha_dpo",
]  # fmt: skip


def rrpo(beta: float = 0.1, alpha: float = 0.01) -> Objective:
    """Refined regularized preference optimisation: reward on spans, KL on the chosen response.

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
    """CAT's ambiguity-aware DPO: DPO on pairs of precise and vague responses.

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
    """PaMi-VDPO: the response under its own clip against the same under augmented clips.

    loss = -w * sum over k of a_k * log sigmoid(beta * [h(y|v) - h(y|v_k)]), h the log-ratio, v_k
    the augmented clips, a_k their weights, w the row weight

    The adapter makes the clips and weights them: those close to v that change the response most.

    Args:
        beta: Inverse temperature of the implicit reward, in 1/nats.

    Source: Ding et al. 2025, arXiv:2504.05810; reconstructed, no public code.
    Departs: constants and the formulas of the weights are ours.
    """
    return Objective(Preference(Score(beta), Pami()), needs=Needs(roles=("augmented",)))


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
    """Hallucination-aware DPO: DPO plus the summed likelihood of style-consistent responses.

    loss = -log sigmoid(beta * m) - nll_weight * log pi(chosen)

    Args:
        beta: Inverse temperature of the implicit reward, in 1/nats.
        nll_weight: Weight of the summed negative log-likelihood, per nat.

    Source: Zhao et al. 2023, arXiv:2311.16839.
    Departs: the auxiliary likelihood is the chosen response's.
    """
    return tpo_temporal(beta, nll_weight, "sum")


# Losses of video and image papers on cells: pairs of a response and a visual input.
#
# h(y|v) is the log-ratio of policy and reference. Candidates: 0 is h(y_w|v), 1 is h(y_l|v); then
# the roles. "corrupted" is the chosen response under a corrupted input; "rejected_corrupted" the
# rejected response, or another losing one, under such an input.


def mdpo(beta: float = 0.1, anchor: float = 0.0) -> Objective:
    """Multimodal DPO: response preference, visual preference and an anchor on the chosen response.

    loss = -log sigmoid(beta * [h(y_w|v) - h(y_l|v)]) - log sigmoid(beta * [h(y_w|v) - h(y_w|v_c)])
    - log sigmoid(beta * h(y_w|v) - anchor), h the log-ratio, v_c the corrupted input

    Args:
        beta: Inverse temperature of the implicit reward, in 1/nats.
        anchor: Floor of the chosen response's reward, no unit.

    Source: Wang et al. 2024, arXiv:2406.11839.
    Departs: nothing.
    """
    score = Score(beta)
    return Objective(
        Preference(score, Logistic()),
        Preference(score, Logistic(), candidates=(0, 2)),
        Preference(score, Anchor(anchor), candidates=(0,)),
        needs=Needs(rows="pair", roles=("corrupted",)),
    )


def vdpo_symmetric(beta: float = 0.1) -> Objective:
    """Symmetric visual DPO: each response is preferred under the input it belongs to.

    loss = -1/2 log sigmoid(beta * [h(y_w|v) - h(y_l|v)])
    - 1/2 log sigmoid(beta * [h(y_l|v_l) - h(y_w|v_l)]), h the log-ratio, v_l the input of y_l

    Args:
        beta: Inverse temperature of the implicit reward, in 1/nats.

    Source: symmetric form of visual DPO, reconstructed; no code was run.
    Departs: not published in this form.
    """
    score = Score(beta)
    return Objective(
        Preference(score, Logistic(), coef=0.5),
        Preference(score, Logistic(), coef=0.5, candidates=(3, 2)),
        needs=Needs(rows="pair", roles=("corrupted", "rejected_corrupted")),
    )


def povid(beta: float = 0.1, beta_rejected: float = 0.1) -> Objective:
    """POVID: the chosen response against a rejected one and one under a noised image.

    loss = -log sigmoid(beta * h(y_w|v) - beta_rejected * [h(y_l|v) + h(y'|v_noisy)]), h the
    log-ratio

    y' is the model's own response under the noised image; the data bring it. Logged as rejected is
    the sum of both losing rewards.

    Args:
        beta: Scale of the chosen response's log-ratio, in 1/nats.
        beta_rejected: Scale of each rejected log-ratio, in 1/nats.

    Source: Zhou et al. 2024, arXiv:2402.11411.
    Departs: one scale for both rejected terms, where the paper has one for each.
    """
    score = Score((beta, beta_rejected, beta_rejected))
    return Objective(
        Preference(score, Povid(), candidates=(0, 1, 2)),
        needs=Needs(roles=("rejected_corrupted",)),
    )


def chip(beta: float = 0.1, lam: float = 1.0, gamma: float = 0.1, gain: float = 4.0) -> Objective:
    """CHiP: preferences on responses, on what was changed in them, on tokens and on the input.

    loss = -log sigmoid(beta * m) - log sigmoid(beta * [h(y_w|v) - h(y_w|v_c)])
    - lam * log sigmoid(beta * m_segments) + gamma * beta * [KL_rejected - stopgrad(KL_chosen)]

    m is the margin h(y_w|v) - h(y_l|v), m_segments the same with the tokens of spans counted `gain`
    times, KL_y the sum over response tokens of KL(reference, policy), v_c the corrupted input.

    Args:
        beta: Inverse temperature of the implicit reward, in 1/nats.
        lam: Weight of the segment term; 0 leaves it out, and with it the need of spans.
        gamma: Weight of the token term; 0 leaves it out, and with it the need of the KL.
        gain: How often a token of a span counts in the segment term; 4 in the released scripts.

    Source: Fu et al. 2025, arXiv:2501.16629; released code was read, the paper's formula is
        recalled.
    Departs: terms add up, as in the paper; the release puts all margins into one sigmoid and counts
        spans `gain` times in each of them. The KL has the direction of the release and of TDPO2:
        the other one rewards drifting from the reference. lam is ours.
    """
    for key, value in {"lam": lam, "gamma": gamma, "gain": gain}.items():
        require(0.0 <= value < math.inf, key, value, "at least 0")
    plain = Score(beta, span_weight=1.0)
    terms: list[Term] = [
        Preference(plain, Logistic()),
        Preference(plain, Logistic(), candidates=(0, 2)),
    ]
    if lam:
        terms.append(Preference(Score(beta, weighted=True, span_weight=gain), Logistic(), coef=lam))
    if gamma:
        terms.append(KlGap(gamma * beta))
    return Objective(*terms, needs=Needs(rows="pair", roles=("corrupted",)))


def vista_dpo(
    beta: float = 0.1,
    relevant: float = 0.7,
    video: float = 0.8,
    clip: float = 0.6,
    frame: float = 0.4,
    gamma: float = 0.1,
    alpha: float = 0.5,
) -> Objective:
    """VistaDPO: two rejected responses, corrupted inputs at three scales, and a token term.

    loss = -log sigmoid(beta * [h(y_w|v) - relevant * h(y_l|v) - (1 - relevant) * h(y_i|v)])
    - sum over s of c_s * log sigmoid(beta * [h(y_w|v) - h(y_w|v_s)]) + gamma * TDPO2(y_w, y_l)

    y_i is a rejected response that has nothing to do with the video; s runs over video, clip and
    frame, v_s is the input corrupted at that scale. TDPO2 is tdpo2 with the same beta and alpha.

    Args:
        beta: Inverse temperature of the implicit reward, in 1/nats.
        relevant: Share of the relevant rejected response, in (0, 1).
        video: Weight of the term on the whole video.
        clip: Weight of the term on the clip.
        frame: Weight of the term on the frames.
        gamma: Weight of the token term.
        alpha: Weight of the sequential KL in the token term, no unit.

    Source: Huang et al. 2025, arXiv:2504.13122, released code read.
    Departs: the terms on inputs, and the irrelevant response, have a gradient; the release detaches
        them. Both shares scale the reference too; in the release the policy alone, so that equal
        policies do not give log 2. The preferred side of every input is the whole video; the
        release crops it to the clip and to the frames.
    """
    require(0.0 < relevant < 1.0, "relevant", relevant, "in (0, 1)")
    weights = {"video": video, "clip": clip, "frame": frame, "gamma": gamma, "alpha": alpha}
    for key, value in weights.items():
        require(0.0 <= value < math.inf, key, value, "at least 0")
    score = Score(beta)
    shared = Score((beta, relevant * beta, (1.0 - relevant) * beta))
    tokens = Score(beta, kl_coef=alpha, kl_detach_chosen=True, reward_kl=1.0)
    return Objective(
        Preference(shared, Povid()),
        Preference(score, Logistic(), coef=video, candidates=(0, 3)),
        Preference(score, Logistic(), coef=clip, candidates=(0, 4)),
        Preference(score, Logistic(), coef=frame, candidates=(0, 5)),
        Preference(tokens, Logistic(), coef=gamma),
        needs=Needs(
            rows="pair",
            roles=("rejected_irrelevant", "corrupted_video", "corrupted_clip", "corrupted_frame"),
        ),
    )
