"""What a clue aggregator is asked and shown, of several rows at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn


def stack(features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Features of rows as one batch.

    Args:
        features: [n_i, D] each; n_i is 0 for a row that lacks the modality.

    Returns:
        [B, N, D], zeros behind a row's own, and the mask [B, N]; N is at least 1.
    """
    longest = max(1, *(len(row) for row in features))
    padded = features[0].new_zeros(len(features), longest, features[0].shape[1])
    padded = torch.stack(
        [torch.cat([row, blank[len(row) :]]) for row, blank in zip(features, padded, strict=True)]
    )
    lengths = torch.tensor([len(row) for row in features], device=padded.device)
    return padded, torch.arange(longest, device=padded.device) < lengths[:, None]


def question_embeddings(
    embedding: nn.Module, ids: Sequence[Sequence[int]], *, detach: bool = True
) -> tuple[Tensor, Tensor]:
    """Embeddings of questions.

    Args:
        embedding: `model.get_input_embeddings()`.
        ids: Tokens of each question, without those of media and clues.
        detach: Whether the language model's table gets no gradient from here.

    Returns:
        [B, Lq, Dt] and the mask [B, Lq].
    """
    device = next(embedding.parameters()).device
    with torch.set_grad_enabled(torch.is_grad_enabled() and not detach):
        rows = [embedding(torch.tensor(row, dtype=torch.long, device=device)) for row in ids]
        return stack(rows)
