"""Whether a model's tokens are scored right here: tried once on a few rows, before the first step.

The truth is the model's own forward pass over each sequence alone. Against it stand rows beside
longer ones, with padding, in evaluation and in training mode.
"""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from mmalign.errors import ConfigError
from mmalign.text.body import run_body, scored_states
from mmalign.text.calls import in_mode, refusing
from mmalign.text.logps import compute_dtype, response_logps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor
    from transformers import PreTrainedModel

    from mmalign.models.adapter import Batch
    from mmalign.text.head import Heads
    from mmalign.text.prefix import Layout, Rows

    Arrange = Callable[[Batch, Layout], Rows]


def few_rows(batch: Batch) -> Batch:
    """The two shortest rows, all of their tokens scored, one response cut so that it is padded."""
    sizes = sum(batch.inputs[f"{name}_mask"].flatten(1).sum(1) for name in ("prompt", "response"))
    few = batch.take(torch.as_tensor(sizes).argsort()[:2])
    mask = few.inputs["response_mask"].clone()
    mask[0, 0, (int(mask[0, 0].sum()) + 1) // 2 :] = False
    inputs = {name: few.inputs[name] for name in few.inputs if name != "response_scored"}
    return replace(few, inputs={**inputs, "response_mask": mask})


def require_right(
    model: PreTrainedModel, heads: Heads, few: Batch, arrange: Arrange, *, trains: bool
) -> None:
    """Refuse a model whose rows in a batch are not scored as it scores each of them alone.

    Args:
        model: Without a wrapper.
        heads: Know its output layer.
        few: Rows of `few_rows`.
        arrange: Lays out a batch.
        trains: Whether the model is to be trained: it is tried in the mode that it is in, too, and
            has to have a backward pass.

    Raises:
        ConfigError: naming the class, the fault and its size.
    """
    name = type(model).__name__
    if len(few.labels) > 1:  # one response a row tells as much as all; one row alone has no padding
        few = few.select(0)
    with refusing(model, "a pass over a few rows"), torch.no_grad(), in_mode(model, training=False):
        alone = {at: _alone(model, heads, few, arrange, at) for at in _tried(few)}
        found = score_rows(model, heads, arrange(few, "plain"))
    gap = _gap(alone, *found)
    if gap:
        later = _seen_ahead(model, few) if _takes_ids(few, arrange) else None
        if later:
            raise ConfigError(
                f"model.path: {name} cannot be trained here: it is not causal, the "
                f"log-probabilities of tokens change by up to {later:.3g} nats with what follows "
                "them, so that an answer would be scored by looking at it"
            )
        raise ConfigError(
            f"model.path: {name} cannot be trained here: its log-probabilities of a row beside "
            f"longer ones are {gap:.3g} nats away from those of the row alone"
        )
    if not trains:
        return
    with refusing(model, "a pass in training mode"), torch.no_grad(), _undropped(model):
        gap = _gap(alone, *score_rows(model, heads, arrange(few, "plain")))
    if gap:
        raise ConfigError(
            f"model.path: {name} cannot be trained here: its log-probabilities in training mode "
            f"are {gap:.3g} nats away from those in evaluation mode, though dropout is off, so "
            "that log-ratios would be noise"
        )
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return  # a backward pass inside of a wrapper's forward pass would confuse it
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with refusing(model, f"its backward pass (attention {attention_of(model)})"):
        with torch.enable_grad(), _undropped(model):
            one = few.take(torch.tensor([0])).select(0)
            total = score_rows(model, heads, arrange(one, "plain"))[0].sum()
        if total.requires_grad and trained:  # no gradient is left behind
            torch.autograd.grad(total, trained[:1], allow_unused=True)


@contextmanager
def _undropped(model: PreTrainedModel) -> Iterator[None]:
    """Without the dropout of a LoRA, which changes scores and draws numbers that a run needs.

    A resumed run is tried when its factors are no longer 0.
    """
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Dropout) and m.training]
    for layer in layers:
        layer.training = False
    try:
        yield
    finally:
        for layer in layers:
            layer.training = True


def score_rows(
    model: PreTrainedModel, heads: Heads, rows: Rows
) -> tuple[Tensor, torch.dtype]:  # [B, K, L], and what it was computed in
    """Log-probabilities of the responses, and the precision that they were computed in."""
    states = scored_states(run_body(model, rows).last_hidden_state, rows)
    head = heads.of(model)
    stats = response_logps(
        states, head.weight, head.bias, rows.targets, scale=head.scale, softcap=head.softcap
    )
    return rows.responses(stats.policy), compute_dtype(states)


def attention_of(model: PreTrainedModel) -> str:
    """The name of a model's attention implementation."""
    return str(getattr(model.config, "_attn_implementation", "its own"))


def _tried(few: Batch) -> list[tuple[int, int]]:
    """Two responses: of two rows, or of the only one."""
    rows, candidates = few.labels.shape
    return [(row, k) for row in range(rows) for k in range(candidates)][:2]


def _takes_ids(few: Batch, arrange: Arrange) -> bool:
    return arrange(few, "plain").feed is None


def _alone(
    model: PreTrainedModel, heads: Heads, few: Batch, arrange: Arrange, at: tuple[int, int]
) -> Tensor:  # [n]
    """Log-probabilities of one response, in a pass of its own."""
    if not _takes_ids(few, arrange):  # the model's own forward would need the media themselves
        row, k = at
        one = few.take(torch.tensor([row])).select(k)
        rows = arrange(one, "plain")
        return score_rows(model, heads, rows)[0][0, 0][rows.mask[0, 0]]
    prompt, response = _ids(few, at)
    logps = own_logps(model, torch.cat([prompt, response]), len(response))
    return logps.gather(-1, response[:, None]).squeeze(-1)


def _ids(few: Batch, at: tuple[int, int]) -> tuple[Tensor, Tensor]:
    inputs = few.inputs
    prompt, response = (
        inputs[f"{part}_ids"][at][inputs[f"{part}_mask"][at]] for part in ("prompt", "response")
    )
    return prompt, response


def own_logps(model: PreTrainedModel, ids: Tensor, count: int, **inputs: Any) -> Tensor:
    """The model's own log-probabilities [count, V] at the positions that predict the last ids.

    Args:
        model: Without a wrapper.
        ids: [S].
        count: How many.
        inputs: What its forward takes beside ids.
    """
    options: dict[str, Any] = {**inputs, "use_cache": False}
    if "logits_to_keep" in inspect.signature(type(model).forward).parameters:
        options["logits_to_keep"] = count + 1
    logits = model(input_ids=ids[None], **options).logits[0, -count - 1 : -1]
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


@torch.no_grad()
def _seen_ahead(model: PreTrainedModel, few: Batch) -> float | None:
    """How far what follows moves a response's log-probabilities; None where it does not."""
    prompt, response = _ids(few, _tried(few)[-1])
    ids, tail = torch.cat([prompt, response]), prompt[:4].flip(0)
    with in_mode(model, training=False):
        short = own_logps(model, ids, len(response))
        long = own_logps(model, torch.cat([ids, tail]), len(response) + len(tail))
        long = long[: len(response)]
    moved = float((short - long).gather(-1, response[:, None]).abs().max())
    return moved if moved > 0.01 else None


def _gap(
    alone: dict[tuple[int, int], Tensor], scores: Tensor, dtype: torch.dtype
) -> float | None:  # nats
    """How far scores are from the truth; None where it is rounding.

    Most tokens must be off in half precision, where a single one may be routed to other experts.
    """
    gaps = [(scores[at][: len(truth)] - truth).abs() for at, truth in alone.items() if len(truth)]
    if not gaps:
        return None
    every = torch.cat(gaps)
    wide = dtype in (torch.float32, torch.float64)
    found, limit = (every.max(), 2e-3) if wide else (every.median(), 0.05)
    return None if float(found) <= limit else float(found)
