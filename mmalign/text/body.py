"""The body of a causal language model, and one pass of it over laid-out rows."""

from __future__ import annotations

from bisect import bisect_left
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from mmalign.errors import ConfigError
from mmalign.text import attention

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from mmalign.text.prefix import Fed, Rows


def body_of(model: PreTrainedModel) -> nn.Module:
    """The part of a model whose last states its head reads.

    Raises:
        ConfigError: The class does not say which part that is.
    """
    if model.base_model is not model:
        return model.base_model
    from transformers import PreTrainedModel

    # Llama 4 and Mllama have a text model of another name than their class says.
    parts = [part for part in model.children() if isinstance(part, PreTrainedModel)]
    if len(parts) == 1:
        return parts[0]
    raise ConfigError(
        f"model.path: {type(model).__name__} has {len(parts)} models inside, where one is needed "
        "whose states its output head reads, so its tokens cannot be scored"
    )


def run_body(
    model: PreTrainedModel, rows: Rows, *, all_layers: bool = False, fed: Fed | None = None
) -> Any:
    """The model without its head on laid-out rows; `last_hidden_state` is [R, T, D].

    `fed` is what `rows.feed` gave for this model, where it was called already.
    """
    body: Any = body_of(model)
    options: dict[str, Any] = {"input_ids": rows.input_ids}
    if fed is None and rows.feed is not None:
        fed = rows.feed(model)
    if fed is not None:
        body, options = fed.body, dict(fed.inputs)
    if rows.position_ids is not None:
        options["position_ids"] = rows.position_ids
    if rows.segments is not None:
        attention.install(model if fed is None else body)
        # A mask of four dimensions is taken as it is: none is made, and ours reads the segments.
        options["attention_mask"] = rows.input_ids.new_ones(1, 1, 1, 1, dtype=torch.bool)
        options["segments"] = rows.segments
    # Padding is on the right, where no earlier token sees it: the plain layout needs no mask.
    options |= {"use_cache": False, "output_hidden_states": all_layers}
    if runs_apart(model, rows):
        return _run_apart(body, rows, options, rope_limits(model))
    return body(**options)


def scored_states(output: Tensor, rows: Rows) -> Tensor:  # [R, T, D] -> [M, D]
    """The states from which tokens are scored."""
    return output.flatten(0, 1)[rows.states]


def rope_limits(model: PreTrainedModel) -> tuple[int, ...]:
    """Lengths beyond which a model turns all positions of a pass by other angles (longrope)."""
    settings: Any = model.config.get_text_config()
    ropes: Any = getattr(settings, "rope_parameters", None) or {}
    each = [ropes, *(rope for rope in ropes.values() if isinstance(rope, dict))]
    limits = {
        int(rope["original_max_position_embeddings"])
        for rope in each
        if rope.get("rope_type") == "longrope" and rope.get("original_max_position_embeddings")
    }
    return tuple(sorted(limits))


def turns_alike(limits: tuple[int, ...], inputs: Mapping[str, Tensor]) -> bool:
    """Whether one pass over all candidates of a batch turns each as it would be turned alone."""
    if not limits:
        return True
    lengths = (inputs["prompt_mask"].sum(-1) + inputs["response_mask"].sum(-1)).flatten().tolist()
    # The last token of a response is not fed.
    return len({bisect_left(limits, n) for n in (*lengths, max(lengths) - 1)}) == 1


def runs_apart(model: PreTrainedModel, rows: Rows) -> bool:
    """Whether rows of the plain layout take more than one pass, or a wider one."""
    limits = rope_limits(model)
    return rows.segments is None and bool(limits) and set(_groups(rows, limits)) != {0}


def _groups(rows: Rows, limits: tuple[int, ...]) -> dict[int, list[int]]:
    """Numbers of the rows by how many of the limits their whole length is beyond."""
    groups: dict[int, list[int]] = {}
    for number, piece in enumerate(rows.pieces):
        fed = piece.length + sum(count for _, count in piece.responses)
        groups.setdefault(bisect_left(limits, fed + 1), []).append(number)
    return groups


def _run_apart(
    body: nn.Module, rows: Rows, options: dict[str, Any], limits: tuple[int, ...]
) -> Any:
    """One pass for each group of rows, no wider than the group's next limit."""
    if "input_ids" not in options:
        raise ConfigError(
            f"a row goes beyond {limits[0]} tokens, where {type(body).__name__} changes its rotary "
            "angles, and rows with media cannot be split there; lower data.max_prompt_length, "
            "data.max_response_length or the number of frames"
        )
    count, width = rows.input_ids.shape
    layers: list[Tensor] = []
    for beyond, numbers in _groups(rows, limits).items():
        ids = rows.input_ids[numbers]
        if beyond < len(limits):
            ids = ids[:, : limits[beyond]]
        least = limits[beyond - 1] + 1 if beyond else 0
        if ids.shape[1] < least:  # the whole row is longer than what is fed
            ids = torch.cat([ids, ids[:, -1:].expand(-1, least - ids.shape[1])], 1)
        output = body(**options | {"input_ids": ids})
        parts = output.hidden_states if options["output_hidden_states"] else ()
        for i, states in enumerate((output.last_hidden_state, *parts)):
            if i == len(layers):
                layers.append(states.new_zeros(count, width, states.shape[-1]))
            kept = states[:, :width]
            place = torch.tensor(numbers, device=ids.device)
            padded = torch.nn.functional.pad(kept, (0, 0, 0, width - kept.shape[1]))
            layers[i] = layers[i].index_copy(0, place, padded)
    return SimpleNamespace(last_hidden_state=layers[0], hidden_states=tuple(layers[1:]) or None)
