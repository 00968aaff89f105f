"""Whether a model may be fed packed rows: by its kind, and by trying."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from mmalign.errors import ConfigError
from mmalign.text import attention
from mmalign.text.logps import compute_dtype, response_logps
from mmalign.text.model import causal_model, run_body, scored_states

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from mmalign.models.adapter import Batch
    from mmalign.text.head import Heads
    from mmalign.text.prefix import Layout, Rows

    Arrange = Callable[[Batch, Layout], Rows]

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-3}  # largest difference, in nats
_TOLERANCE_HALF = 0.05  # mean difference, in nats: single tokens differ by more in bfloat16


def check_length(model: PreTrainedModel, inputs: Mapping[str, Tensor], remedy: str) -> None:
    """Refuse rows beyond the model's positions; `remedy` says what shortens them.

    Raises:
        ConfigError: naming the limits to lower.
    """
    settings: Any = model.config.get_text_config()
    limit = getattr(settings, "max_position_embeddings", None)
    lengths = inputs["prompt_mask"].sum(-1) + inputs["response_mask"].sum(-1) - 1
    if limit is not None and int(lengths.max()) > limit:
        raise ConfigError(
            f"a row has {int(lengths.max())} tokens, but the model has {limit} positions; {remedy} "
            f"data.max_prompt_length and data.max_response_length to {limit} together"
        )


def why_plain(
    models: Iterable[nn.Module],
    heads: Heads,
    batch: Batch,
    arrange: Arrange,
    body: Callable[[PreTrainedModel], PreTrainedModel],
) -> str | None:
    """The reason why rows of these models cannot be packed; None when they can be.

    Looks at each model's kind, then scores up to two rows of the batch in both layouts.

    Args:
        models: Those that score.
        heads: Know their output layers.
        batch: Some rows.
        arrange: Lays out a batch.
        body: The part of a model that has the attention layers.
    """
    for model in models:
        inner = causal_model(model)
        reason = attention.why_not(body(inner)) or _compare(inner, heads, batch, arrange)
        if reason is not None:
            return reason
    return None


@torch.no_grad()
def _compare(model: PreTrainedModel, heads: Heads, batch: Batch, arrange: Arrange) -> str | None:
    sizes = sum(batch.inputs[f"{name}_mask"].flatten(1).sum(1) for name in ("prompt", "response"))
    few = batch.take(torch.as_tensor(sizes).argsort()[:2])
    try:
        with _evaluating(model):
            plain, packed = (_score(model, heads, arrange(few, x)) for x in ("plain", "packed"))
    except attention.CannotPackError as error:
        return str(error)
    except TypeError as error:
        if "segments" not in str(error):
            raise
        return "its forward pass takes no further keywords"
    gap = (packed[0] - plain[0])[few.inputs["response_mask"]].abs()
    limit = _TOLERANCE.get(packed[1])
    found, limit = (gap.mean(), _TOLERANCE_HALF) if limit is None else (gap.max(), limit)
    if float(found) <= limit:
        return None
    return f"its log-probabilities differ by {float(found):.3g} nats between the two layouts"


def _score(
    model: PreTrainedModel, heads: Heads, rows: Rows
) -> tuple[Tensor, torch.dtype]:  # [B, K, L], and what it was computed in
    states = scored_states(run_body(model, rows).last_hidden_state, rows)
    if rows.segments is not None:
        attention.check_windows(model, rows.segments)
    head = heads.of(model)
    stats = response_logps(
        states, head.weight, head.bias, rows.targets, scale=head.scale, softcap=head.softcap
    )
    return rows.responses(stats.policy), compute_dtype(states)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
