"""Whether a model may be fed packed rows: by its kind, and by trying."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mmalign.errors import ConfigError, MmalignError
from mmalign.text import attention
from mmalign.text.body import rope_limits, turns_alike
from mmalign.text.calls import FAULTS, describe, in_mode
from mmalign.text.limits import position_limit
from mmalign.text.model import causal_model
from mmalign.text.trial import score_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from mmalign.models.adapter import Batch
    from mmalign.text.head import Heads
    from mmalign.text.trial import Arrange

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-3}  # largest difference, in nats
_TOLERANCE_HALF = 0.05  # mean difference, in nats: single tokens differ by more in bfloat16


def check_length(model: PreTrainedModel, inputs: Mapping[str, Tensor], remedy: str) -> None:
    """Refuse rows beyond the model's positions; `remedy` says what shortens them.

    Raises:
        ConfigError: naming the limits to lower.
    """
    limit = position_limit(model.config.get_text_config())
    lengths = inputs["prompt_mask"].sum(-1) + inputs["response_mask"].sum(-1) - 1
    if limit is not None and int(lengths.max()) > limit:
        raise ConfigError(
            f"a row has {int(lengths.max())} tokens, but the model has {limit} positions; {remedy} "
            f"data.max_prompt_length and data.max_response_length to {limit} together"
        )


def why_plain(
    models: Iterable[nn.Module],
    heads: Heads,
    few: Batch,
    arrange: Arrange,
    body: Callable[[PreTrainedModel], PreTrainedModel],
) -> str | None:
    """The reason why rows of these models cannot be packed; None when they can be.

    Looks at each model's kind, then scores the rows in both layouts.

    Args:
        models: Those that score.
        heads: Know their output layers.
        few: Some rows.
        arrange: Lays out a batch.
        body: The part of a model that has the attention layers.
    """
    for model in models:
        inner = causal_model(model)
        reason = attention.why_not(body(inner)) or _compare(inner, heads, few, arrange)
        if reason is not None:
            return reason
    return None


@torch.no_grad()
def _compare(model: PreTrainedModel, heads: Heads, few: Batch, arrange: Arrange) -> str | None:
    limits = rope_limits(model)
    each = [few, *(few.take(torch.tensor([i])) for i in range(len(few.labels)))]
    few = next((part for part in each if turns_alike(limits, part.inputs)), few)
    if not turns_alike(limits, few.inputs):
        return f"candidates lie on both sides of {limits[0]} tokens, where its angles change"
    rows = arrange(few, "packed")
    try:
        with in_mode(model, training=False):
            plain = score_rows(model, heads, arrange(few, "plain"))
            packed = score_rows(model, heads, rows)
        if rows.segments is not None:
            attention.check_windows(model, rows.segments)
    except attention.CannotPackError as error:
        return str(error)
    except MmalignError:
        raise
    except FAULTS as error:
        if "segments" in str(error):
            return "its forward pass takes no further keywords"
        return f"its forward pass over packed rows raises {describe(error)}"
    gap = (packed[0] - plain[0])[few.inputs["response_mask"]].abs()
    limit = _TOLERANCE.get(packed[1])
    found, limit = (gap.mean(), _TOLERANCE_HALF) if limit is None else (gap.max(), limit)
    if float(found) <= limit:
        return None
    return f"its log-probabilities differ by {float(found):.3g} nats between the two layouts"
