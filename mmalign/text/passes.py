"""One pass of a model over laid-out rows, their layout, and the trial that both are right."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from mmalign.config import MaskConfig
from mmalign.core import Needs
from mmalign.errors import ConfigError, MmalignError
from mmalign.models.batch import Batch
from mmalign.models.reference import NoReference, Reference
from mmalign.text import masks, packing
from mmalign.text.logps import Head, TokenStats, compute_dtype, head_of, response_logps
from mmalign.text.masks import record_activations
from mmalign.text.model import (
    FAULTS,
    causal_model,
    describe,
    in_mode,
    position_limit,
    refusing,
    rope_limits,
    run_body,
    runs_apart,
    scored_states,
    turns_alike,
)
from mmalign.text.packing import Layout, Rows, TextInputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Arrange = Callable[[Batch[TextInputs], Layout], Rows]

Keep = Literal["layers", "activations"]
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-3}  # largest difference, in nats
_TOLERANCE_HALF = 0.05  # mean difference, in nats: single tokens differ by more in bfloat16


@dataclass(frozen=True, slots=True)
class Scored:
    """What one pass of a model leaves behind for the M scored tokens of a batch."""

    states: Tensor  # [M, D]
    head: Head
    layers: Tensor | None = None  # [J, M, D]  states after every layer, for a learned mask
    activations: Mapping[str, Sequence[Tensor]] | None = None  # [R, T] each, for MaPO's mask


def run_model(model: nn.Module, rows: Rows, keep: Keep | None = None) -> Scored:
    """Run a model's body once over the rows.

    Args:
        model: In a peft wrapper or not.
        rows: The laid-out batch.
        keep: What a mask reads beside the last states.
    """
    inner = causal_model(model)
    fed = None if rows.feed is None else rows.feed(inner)
    body = inner if fed is None else fed.body
    if keep == "activations" and runs_apart(inner, rows):
        raise ConfigError(
            "text.masks.kind activations reads one pass over a batch, but this batch has rows on "
            f"both sides of {rope_limits(inner)[0]} tokens, where the model changes its rotary "
            "angles; keep all rows below, or use another kind of mask"
        )
    recorder = record_activations(body) if keep == "activations" else nullcontext()
    with recorder as activations:
        output = run_body(inner, rows, all_layers=keep == "layers", fed=fed)
    layers = None
    if keep == "layers":
        layers = torch.stack([scored_states(h, rows) for h in output.hidden_states[1:]])
    states = scored_states(output.last_hidden_state, rows)
    return Scored(states, head_of(inner), layers, activations)


def score(
    policy: Scored, rows: Rows, needs: Needs, block_size: int, reference: Scored | None = None
) -> TokenStats:
    """Statistics of every scored token, [M]: one pass over the head, or over both, in blocks."""
    return response_logps(
        policy.states,
        policy.head,
        rows.targets,
        ref_hidden=None if reference is None else reference.states,
        ref_head=None if reference is None else reference.head,
        kl=needs.kl,
        log_sum_p2=needs.log_sum_p2,
        block_size=block_size,
    )


def scoring_models(policy: nn.Module, reference: Reference) -> Iterator[nn.Module]:
    """Every model that scores: the policy, and references that are models of their own."""
    yield policy
    seen = {causal_model(policy)}
    if isinstance(reference, NoReference):
        return
    for _, member in reference.members():
        with member.active() as model:
            inner = causal_model(model)
            if inner not in seen:
                seen.add(inner)
                yield model


class PositionWeights(nn.Module):
    """Weights of the log-ratio and of the KL at each response position."""

    def __init__(self, config: MaskConfig, model: PreTrainedModel) -> None:
        """Make the learned head; the other kinds have no parameters."""
        super().__init__()
        self.config = config
        self.learned: masks.LearnedMask | None = None
        if config.kind == "learned":
            settings: Any = model.config.get_text_config()
            eps = [getattr(settings, f"{name}_eps", None) for name in ("rms_norm", "layer_norm")]
            self.learned = masks.LearnedMask(
                settings.num_hidden_layers,
                settings.hidden_size,
                common=config.common,
                on_reward=config.on_reward,
                on_kl=config.on_kl,
                dropout=config.dropout,
                eps=next((value for value in eps if value), 1e-5),
            )

    @property
    def reads(self) -> Keep | None:
        """What is needed of a live reference model beside its last states."""
        return {"learned": "layers", "activations": "activations"}.get(self.config.kind)  # pyright: ignore

    def forward(
        self, batch: Batch[TextInputs], rows: Rows, policy: Scored, reference: Scored | None
    ) -> tuple[Tensor, Tensor | None]:  # [B, K, L] each
        """Weights of the log-ratio, and of the KL where they are others than 1.

        Args:
            batch: As collated.
            rows: Its layout.
            policy: The policy's pass; the steps of a tree are compared by its states.
            reference: The reference's pass, for learned and activation masks.
        """
        if self.config.kind in ("spans", "diff"):
            assert batch.inputs.span_mask is not None
            return masks.span_weights(batch.inputs.span_mask, rows.mask), None
        if self.config.kind == "steps":
            states = rows.responses(policy.states.detach())
            assert batch.inputs.step_index is not None
            index, steps = batch.inputs.step_index, batch.inputs.read().num_steps
            return masks.step_weights(states, index, batch.labels, steps), None
        assert reference is not None
        if self.learned is not None:
            assert reference.layers is not None
            on_reward, on_kl = self.learned(reference.layers)
            weight = rows.responses(on_reward)
            return weight, weight if on_kl is on_reward else rows.responses(on_kl)
        assert reference.activations is not None
        means = {
            kind: [rows.responses(mean.flatten()[rows.states]) for mean in group]
            for kind, group in reference.activations.items()
        }
        weight = masks.activation_mask(means, rows.mask)
        ones = torch.ones_like(weight)
        return (weight if self.config.on_reward else ones, weight if self.config.on_kl else ones)


def few_rows(batch: Batch[TextInputs]) -> Batch[TextInputs]:
    """The two shortest rows, all of their tokens scored, one response cut so that it is padded."""
    lengths = torch.tensor(batch.inputs.read().lengths()).view(len(batch.labels), -1)
    few = batch.take(lengths.sum(1).argsort()[:2])
    mask = few.inputs.response_mask.clone()
    mask[0, 0, (int(mask[0, 0].sum()) + 1) // 2 :] = False
    cut = replace(few.inputs, response_scored=None, response_mask=mask, written=None)
    return replace(few, inputs=cut)


def require_right(
    model: PreTrainedModel, few: Batch[TextInputs], arrange: Arrange, *, trains: bool
) -> None:
    """Refuse a model whose rows in a batch are not scored as it scores each of them alone.

    The truth is the model's own forward pass over each sequence alone. Against it stand rows beside
    longer ones, with padding, in evaluation and in training mode.

    Args:
        model: Without a wrapper.
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
        alone = {at: _alone(model, few, arrange, at) for at in _tried(few)}
        rows = arrange(few, "plain")
        gap = _gap(alone, *score_rows(model, rows))
    if gap:
        later = _seen_ahead(model, few) if rows.feed is None else None
        if later:
            raise ConfigError(
                f"model.path: {name} cannot be trained here: it is not causal, the "
                f"log-probabilities of tokens change by up to {later:.3g} nats with what follows "
                "them, so that a response would be scored by looking at it"
            )
        raise ConfigError(
            f"model.path: {name} cannot be trained here: its log-probabilities of a row beside "
            f"longer ones are {gap:.3g} nats away from those of the row alone"
        )
    if not trains:
        return
    with refusing(model, "a pass in training mode"), torch.no_grad(), _undropped(model):
        gap = _gap(alone, *score_rows(model, arrange(few, "plain")))
    if gap:
        raise ConfigError(
            f"model.path: {name} cannot be trained here: its log-probabilities in training mode "
            f"are {gap:.3g} nats away from those in evaluation mode, though dropout is off, so "
            "that log-ratios would be noise"
        )
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return  # a backward pass inside of a wrapper's forward pass would confuse it
    attention = getattr(model.config, "_attn_implementation", "its own")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with refusing(model, f"its backward pass (attention {attention})"):
        with torch.enable_grad(), _undropped(model):
            one = few.take(torch.tensor([0])).select(0)
            total = score_rows(model, arrange(one, "plain"))[0].sum()
        if total.requires_grad and trained:  # no gradient is left behind
            torch.autograd.grad(total, trained[:1], allow_unused=True)


def _undropped(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Without the dropout of a LoRA, which changes scores and draws numbers that a run needs.

    A resumed run is tried when its factors are no longer 0.
    """
    return in_mode(*(m for m in model.modules() if isinstance(m, nn.Dropout)), training=False)


def score_rows(
    model: PreTrainedModel, rows: Rows
) -> tuple[Tensor, torch.dtype]:  # [B, K, L], and what it was computed in
    """Log-probabilities of the responses, and the precision that they were computed in."""
    states = scored_states(run_body(model, rows).last_hidden_state, rows)
    stats = response_logps(states, head_of(model), rows.targets)
    return rows.responses(stats.policy), compute_dtype(states)


def _tried(few: Batch[TextInputs]) -> list[tuple[int, int]]:
    """Two responses: of two rows, or of the only one."""
    rows, candidates = few.labels.shape
    return [(row, k) for row in range(rows) for k in range(candidates)][:2]


def _alone(
    model: PreTrainedModel, few: Batch[TextInputs], arrange: Arrange, at: tuple[int, int]
) -> Tensor:  # [n]
    """Log-probabilities of one response, in a pass of its own."""
    rows = arrange(few.take(torch.tensor([at[0]])).select(at[1]), "plain")
    if rows.feed is not None:  # the model's own forward would need the media themselves
        return score_rows(model, rows)[0][0, 0][rows.mask[0, 0]]
    prompt, response = _ids(few, at)
    logps = own_logps(model, torch.cat([prompt, response]), len(response))
    return logps.gather(-1, response[:, None]).squeeze(-1)


def _ids(few: Batch[TextInputs], at: tuple[int, int]) -> tuple[Tensor, Tensor]:
    inputs = few.inputs
    prompt = inputs.prompt_ids[at][inputs.prompt_mask[at]]
    return prompt, inputs.response_ids[at][inputs.response_mask[at]]


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
def _seen_ahead(model: PreTrainedModel, few: Batch[TextInputs]) -> float | None:
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


def check_length(model: PreTrainedModel, inputs: TextInputs, remedy: str) -> None:
    """Refuse rows beyond the model's positions; `remedy` says what shortens them.

    Raises:
        ConfigError: naming the limits to lower.
    """
    limit = position_limit(model.config.get_text_config())
    longest = max(inputs.read().lengths()) - 1
    if limit is not None and longest > limit:
        raise ConfigError(
            f"a row has {longest} tokens, but the model has {limit} positions; {remedy} "
            f"data.max_prompt_length and data.max_response_length to {limit} together"
        )


def why_plain(
    models: Iterable[nn.Module],
    few: Batch[TextInputs],
    arrange: Arrange,
    body: Callable[[PreTrainedModel], PreTrainedModel],
) -> str | None:
    """The reason why rows of these models cannot be packed; None when they can be.

    Looks at each model's kind, then scores the rows in both layouts.

    Args:
        models: Those that score.
        few: Some rows.
        arrange: Lays out a batch.
        body: The part of a model that has the attention layers.
    """
    for model in models:
        inner = causal_model(model)
        reason = packing.why_not(body(inner)) or _compare(inner, few, arrange)
        if reason is not None:
            return reason
    return None


@torch.no_grad()
def _compare(model: PreTrainedModel, few: Batch[TextInputs], arrange: Arrange) -> str | None:
    limits = rope_limits(model)
    each = [few, *(few.take(torch.tensor([i])) for i in range(len(few.labels)))]
    alike = [part for part in each if turns_alike(limits, part.inputs)]
    if not alike:
        return f"candidates lie on both sides of {limits[0]} tokens, where its angles change"
    few = alike[0]
    rows = arrange(few, "packed")
    try:
        with in_mode(model, training=False):
            plain = score_rows(model, arrange(few, "plain"))
            packed = score_rows(model, rows)
        if rows.segments is not None:
            packing.check_windows(model, rows.segments)
    except packing.CannotPackError as error:
        return str(error)
    except MmalignError:
        raise
    except FAULTS as error:
        if "segments" in str(error):
            return "its forward pass takes no further keywords"
        return f"its forward pass over packed rows raises {describe(error)}"
    gap = (packed[0] - plain[0])[few.inputs.response_mask].abs()
    limit = _TOLERANCE.get(packed[1])
    found, limit = (gap.mean(), _TOLERANCE_HALF) if limit is None else (gap.max(), limit)
    if float(found) <= limit:
        return None
    return f"its log-probabilities differ by {float(found):.3g} nats between the two layouts"
