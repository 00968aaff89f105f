"""PaMi-VDPO's choice among augmented clips, by the policy's own outputs, without a gradient.

Close first: a clip must still show what the row's own shows (cosine of mean features). Then far:
of those the one under which the policy answers most differently (divergence of its distributions at
the response's tokens).

Source: Ding et al. 2025, arXiv:2504.05810; reconstructed, see `mmalign.video.select`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from mmalign.video.select import aggregate, close_scores, far_scores, js_from_states

if TYPE_CHECKING:
    from torch import Tensor

    from mmalign.config import SelectionSpec
    from mmalign.core import CandidateLogps
    from mmalign.models.adapter import Batch
    from mmalign.text.packing import Rows
    from mmalign.text.passes import Scored


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
    divergence = js_from_states(picked[0], scored.head, picked[1:], scored.head, block_size)
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
        kept = _columns(kept, columns)
    return Chosen(kept, selection.row_weight, close, far, weights)


def _columns(batch: Batch, columns: Tensor) -> Batch:  # [B, 2]
    """The batch with some candidates of each row, others for each."""
    alike = batch.shared | batch.whole
    index = torch.arange(len(columns), device=columns.device)[:, None]

    def take(value: Tensor) -> Tensor:
        return value[index.to(value.device), columns.to(value.device)]

    inputs = {k: v if k in alike else take(v) for k, v in batch.inputs.items()}
    return replace(batch, inputs=inputs, labels=take(batch.labels))
