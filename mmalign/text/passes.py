"""One pass of a model over laid-out rows, and the scores of its states."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from mmalign.errors import ConfigError
from mmalign.models.reference import Cached, NoReference
from mmalign.text.body import rope_limits, run_body, runs_apart, scored_states
from mmalign.text.logps import TokenStats, response_logps
from mmalign.text.masks import record_activations
from mmalign.text.model import causal_model

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor, nn

    from mmalign.core import Needs
    from mmalign.models.reference import Reference
    from mmalign.text.head import Head, Heads
    from mmalign.text.prefix import Rows

Keep = Literal["layers", "activations"]


@dataclass(frozen=True, slots=True)
class Scored:
    """What one pass of a model leaves behind for the M scored tokens of a batch."""

    states: Tensor  # [M, D]
    head: Head
    layers: Tensor | None = None  # [J, M, D]  states after every layer, for a learned mask
    activations: Mapping[str, Sequence[Tensor]] | None = None  # [R, T] each, for MaPO's mask


def run_model(model: nn.Module, rows: Rows, heads: Heads, keep: Keep | None = None) -> Scored:
    """Run a model's body once over the rows.

    Args:
        model: In a peft wrapper or not.
        rows: The laid-out batch.
        heads: Knows the model's head.
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
    return Scored(states, heads.of(inner), layers, activations)


def score(
    policy: Scored, rows: Rows, needs: Needs, block_size: int, reference: Scored | None = None
) -> TokenStats:
    """Statistics of every scored token, [M]: one pass over the head, or over both, in blocks."""
    head = policy.head
    return response_logps(
        policy.states,
        head.weight,
        head.bias,
        rows.targets,
        ref_hidden=None if reference is None else reference.states,
        ref_weight=None if reference is None else reference.head.weight,
        ref_bias=None if reference is None else reference.head.bias,
        kl=needs.kl,
        log_sum_p2=needs.log_sum_p2,
        scale=head.scale,
        softcap=head.softcap,
        block_size=block_size,
    )


def scoring_models(policy: nn.Module, reference: Reference) -> Iterator[nn.Module]:
    """Every model that scores: the policy, and references that are models of their own."""
    yield policy
    seen = {id(causal_model(policy))}
    if isinstance(reference, Cached | NoReference):
        return
    for _, member in reference.members():
        with member.active() as model:
            if id(causal_model(model)) not in seen:
                seen.add(id(causal_model(model)))
                yield model
