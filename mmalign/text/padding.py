"""Which prompts are answered in one batch: padding and neighbours may not change an answer."""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from mmalign.errors import DataError
from mmalign.text.decoding import next_logits
from mmalign.text.model import causal_model

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

log = logging.getLogger(__name__)

_HALF = (torch.bfloat16, torch.float16)
_LIMIT, _LIMIT_HALF = 2e-3, 0.05  # nats: the largest difference; in half precision the mean
_pads_freely: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, [B, P] long, of prompts that all end in the last column."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, width - len(row) :] = torch.tensor(row)
        mask[place, width - len(row) :] = 1
    return ids, mask


def batches(
    model: nn.Module, rows: Sequence[list[int]], pad: int, max_new_tokens: int
) -> list[tuple[list[int], int]]:
    """Numbers of the rows that are answered together, and how many tokens their answers may have.

    Usually all of them. Rows of different lengths are kept apart where the model counts positions
    or keeps its state without regard to padding, which is found out by trying. Answers end where
    a model with a table of positions has no further one.

    Raises:
        DataError: A prompt alone has more tokens than such a table.
    """
    inner: Any = causal_model(model)
    lengths = sorted({len(row) for row in rows})
    room = [_room(inner, row, max_new_tokens) for row in rows]
    apart = len(lengths) > 1 and not _is_padded_freely(inner, rows, pad, min(room))
    groups: dict[tuple[int, int], list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault((len(row) if apart else 0, room[number]), []).append(number)
    return [(group, most) for (_, most), group in groups.items()]


def _room(model: Any, row: list[int], wanted: int) -> int:
    """How many tokens can follow a prompt: the last of them needs no position of its own."""
    limit = _table_of_positions(model)
    if limit is None or len(row) + wanted - 1 <= limit:
        return wanted
    if len(row) > limit:
        raise DataError(
            f"a prompt has {len(row)} tokens, but the model has {limit} positions; shorten it, or "
            "lower data.max_prompt_length"
        )
    _say(f"answers end at the model's {limit} positions, some before sample.max_new_tokens")
    return limit - len(row) + 1


def _table_of_positions(model: Any) -> int | None:
    """Positions of a model that learned one vector for each and has no more; else None."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        return None
    tokens = model.get_input_embeddings()
    tables = (m for m in model.modules() if isinstance(m, nn.Embedding) and m is not tokens)
    # Some families leave their first one or two rows unused.
    return limit if any(0 <= table.num_embeddings - limit <= 2 for table in tables) else None


def _is_padded_freely(model: Any, rows: Sequence[list[int]], pad: int, steps: int) -> bool:
    """Whether rows, the most and the least padded ones, are continued beside the longest as alone.

    Found out once for a model.
    """
    if model not in _pads_freely:
        ordered = sorted(rows, key=len)
        longest = ordered[-1]
        shorter = [row for row in ordered if len(row) < len(longest)]
        tried = [shorter[0], shorter[-1]]
        beside, *alone = (
            next_logits(model, *left_padded(few, pad), pad, steps=min(steps, 2)).log_softmax(-1)
            for few in ([*tried, longest], *([row] for row in tried))
        )
        gap = (beside[:, :2] - torch.cat(alone, dim=1)).abs()
        is_half = model.dtype in _HALF or torch.is_autocast_enabled(model.device.type)
        found, limit = (gap.mean(), _LIMIT_HALF) if is_half else (gap.max(), _LIMIT)
        _pads_freely[model] = bool(found <= limit)  # not where it is no number
    return _pads_freely[model]


@cache
def _say(message: str) -> None:
    log.warning(message)
