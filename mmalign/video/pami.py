"""PaMi-VDPO's choice among augmented clips, by the policy's own outputs, without a gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mmalign.config import SelectionSpec
from mmalign.core import CandidateLogps
from mmalign.core.numerics import full_precision
from mmalign.models.batch import Batch
from mmalign.text.logps import BLOCK_SIZE, Head, block_rows, compute_dtype
from mmalign.text.packing import Rows
from mmalign.text.passes import Scored

# Close first: a clip must still show what the row's own shows (cosine of mean features). Then far:
# of those the one under which the policy answers most differently (divergence of its distributions
# at the response's tokens).
#
# Nothing here has a gradient: the weights are constants of the loss
# mean_b w_b sum_k a_bk l_bk, l_bk = -log sigmoid(beta [h(y | v, x) - h(y | v_k, x)]).
#
# Source: Ding et al. 2025, arXiv:2504.05810: bags of augmented clips, chosen close to far, with the
#     Jensen-Shannon divergence of the model's outputs.
# Departs: The paper has no public code; gate, aggregation, noise weight and constants are our
#     reconstruction.

Mode = Literal["hard", "soft", "mean"]


@dataclass(frozen=True, slots=True)
class Selection:
    """What a row is trained on.

    Attributes:
        weights: [B, K] a_bk; at least 0, 1 in sum, 0 where not kept.
        row_weight: [B] w_b in [0, 1].
        index: [B] the one clip with weight, where there is one in every row (`hard`); else None.
        kept: [B, K] bool, the clips that passed the gate, or the closest where none did.
    """

    weights: Tensor
    row_weight: Tensor
    index: Tensor | None
    kept: Tensor


@torch.no_grad()
def js_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:  # [..., V], [..., V] -> [...]
    """Jensen-Shannon divergence of two distributions in log space, in nats, in [0, ln 2].

    With m = (p + q) / 2 it is [KL(p, m) + KL(q, m)] / 2 = sum_v (p + q) g(|log p - log q|) / 4,
    g(x) = x tanh(x / 2) + log(1 - tanh(x / 2)^2): a sum of terms that are 0 where p = q and never
    negative, so equal inputs give exactly 0. -inf is a probability of 0.
    """
    x = (log_p - log_q).abs_()
    # Where both are 0 the gap is nan and weighs nothing; beyond 200, g is 2 ln 2 in any type.
    x.nan_to_num_(nan=0.0).clamp_(max=200.0)
    t = torch.tanh(0.5 * x)
    near = x * t + torch.log1p(-t.square())
    e = torch.exp(-x)
    far = 2.0 * (math.log(2.0) - x * e / (1.0 + e) - torch.log1p(e))
    g = torch.where(x < 1.0, near, far)
    total = 0.25 * ((log_p.exp() + log_q.exp()) * g).sum(-1)
    return total.clamp_(max=math.log(2.0))


@torch.no_grad()
def js_from_states(
    states: Tensor, head: Head, block_size: int = BLOCK_SIZE
) -> Tensor:  # [1 + K, M, D] -> [K, M], float32 or wider
    """The divergence from hidden states; logits exist for a block of positions at a time.

    Args:
        states: That predict the M response tokens, under the row's own clip and under K others.
        head: That they go through, those of the own clip once.
        block_size: Most positions at a time.
    """
    dtype = compute_dtype(states)
    head = head.to(dtype)
    rows = block_rows(block_size, head.weight)
    wide = torch.promote_types(dtype, torch.float32)
    out = torch.empty(len(states) - 1, states.shape[1], dtype=wide, device=states.device)
    with torch.autocast(states.device.type, enabled=False):
        for start in range(0, states.shape[1], rows):
            block = slice(start, start + rows)
            log_p = head.logits(states[0, block].to(dtype)).log_softmax(-1)
            for k, other in enumerate(states[1:]):
                log_q = head.logits(other[block].to(dtype)).log_softmax(-1)
                out[k, block] = js_divergence(log_p, log_q)
    return out


def far_scores(divergence: Tensor, lengths: Sequence[int]) -> Tensor:  # [K, M] -> [B, K]
    """Mean over the response positions of each row; 0 for a row without any.

    Args:
        divergence: [K, M], the rows' positions one after another.
        lengths: Positions of each row, M in sum.
    """
    parts = divergence.split(list(lengths), dim=1)
    return torch.stack([part.sum(1) / max(part.shape[1], 1) for part in parts])


@torch.no_grad()
def close_scores(own: Tensor, clips: Tensor) -> Tensor:  # [B, D], [B, K, D] -> [B, K]
    """Cosine of the mean visual features of a row's clip and of its augmented ones."""
    return F.cosine_similarity(full_precision(own).unsqueeze(1), full_precision(clips), dim=-1)


@torch.no_grad()
def aggregate(
    close: Tensor,
    far: Tensor,
    *,
    tau_close: float,
    mode: Mode = "hard",
    temperature: float = 0.05,
    noise_floor: float = 0.0,
) -> Selection:
    """Weights of the augmented clips of each row.

    Of the clips with close >= tau_close, or the closest where there is none, `hard` takes the one
    with the largest far score (the first of equal ones), `soft` weighs by softmax(far /
    temperature), `mean` equally. A row counts min(1, largest far score / noise_floor).

    Args:
        close: [B, K] from `close_scores`.
        far: [B, K] from `far_scores`, in nats.
        tau_close: Least cosine.
        mode: How the kept clips share the weight.
        temperature: In nats; read by `soft`.
        noise_floor: In nats; 0 counts every row fully.
    """
    far = full_precision(far)
    kept = close >= tau_close
    closest = F.one_hot(close.argmax(1), close.shape[1]).bool()
    kept = torch.where(kept.any(1, keepdim=True), kept, closest)
    reach = far.masked_fill(~kept, -math.inf)
    farthest = reach.argmax(1)
    if mode == "hard":
        weights = F.one_hot(farthest, far.shape[1]).to(far.dtype)
    elif mode == "soft":
        weights = (reach / temperature).softmax(1)
    else:
        weights = kept / kept.sum(1, keepdim=True).to(far.dtype)
    row_weight = torch.ones_like(far[:, 0])
    if noise_floor > 0:
        row_weight = (reach.amax(1) / noise_floor).clamp(max=1.0)
    return Selection(weights, row_weight, farthest if mode == "hard" else None, kept)


def tau_at(spec: SelectionSpec, step: int, num_steps: int) -> float:
    """The gate at a step: from tau_start at step 0 straight to tau_close at the last one."""
    if spec.tau_start is None:
        return spec.tau_close
    share = min(step / max(num_steps - 1, 1), 1.0)
    return spec.tau_start + share * (spec.tau_close - spec.tau_start)


@dataclass(frozen=True, slots=True)
class Chosen:
    """A batch whose augmented clips were compared.

    Attributes:
        batch: With the clips that are trained on; labels are (1, a_1, ..., a_K).
        row_weight: [B], less than 1 for rows whose farthest clip changes little.
        close, far: [B, K] scores of all clips of the batch before the choice.
        weights: [B, K] a_bk of all of them.
    """

    batch: Batch
    row_weight: Tensor
    close: Tensor
    far: Tensor
    weights: Tensor

    def weigh(self, logps: CandidateLogps) -> CandidateLogps:
        """The scores with the weights of their rows."""
        own = logps.row_weight
        weight = self.row_weight if own is None else self.row_weight * own
        return logps.replace(row_weight=weight.float())


@torch.no_grad()
def choose(
    batch: Batch, rows: Rows, scored: Scored, means: Tensor, spec: SelectionSpec, tau: float,
    block_size: int,
) -> Chosen:  # fmt: skip
    """Compare a row's own clip with its augmented ones.

    Args:
        batch: Candidates (own, augmented, ...), one response a row.
        rows: Its layout.
        scored: A pass of the policy over it.
        means: [B, 1 + K, D] mean features of each candidate's media.
        spec: How to choose.
        tau: Least cosine at this step.
        block_size: Positions with logits at one time.
    """
    mask = rows.mask[:, 0]  # [B, L]  alike for all: the response is the same
    states = rows.responses(scored.states)  # [B, 1 + K, L, D]
    picked = torch.stack([states[:, k][mask] for k in range(states.shape[1])])  # [1 + K, M, D]
    divergence = js_from_states(picked, scored.head, block_size)
    far = far_scores(divergence.view(len(picked) - 1, -1), mask.sum(1).tolist())
    close = close_scores(means[:, 0], means[:, 1:])
    selection = aggregate(
        close,
        far,
        tau_close=tau,
        mode=spec.mode,
        temperature=spec.temperature,
        noise_floor=spec.noise_floor,
    )
    weights = selection.weights.to(batch.labels.dtype)
    labels = torch.cat([torch.ones_like(weights[:, :1]), weights], 1)
    kept = replace(batch, labels=labels)
    if selection.index is not None:  # only the chosen clip is scored with a gradient
        columns = torch.stack([torch.zeros_like(selection.index), selection.index + 1], 1)
        kept = kept.columns(columns)
    return Chosen(kept, selection.row_weight, close, far, weights)
