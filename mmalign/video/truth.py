"""Whether what rows show is scored as their model does: tried once, before the first step.

The truth is the model's own forward pass on its processor's own output for the whole prompt: ids,
pixels, grids, times and kinds of tokens. None of what is done here for speed takes part in it:
media expanded by themselves, features made once, positions made beforehand, rows packed.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from mmalign.core import Needs
from mmalign.data.example import Asked
from mmalign.errors import ConfigError
from mmalign.text.model import in_mode, refusing
from mmalign.text.passes import own_logps, score_rows
from mmalign.video.model import tower_dtype
from mmalign.video.prompt import place

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor
    from transformers import PreTrainedModel

    from mmalign.data.example import Example
    from mmalign.text.logps import Heads
    from mmalign.text.packing import Layout
    from mmalign.text.passes import Arrange
    from mmalign.video.encode import VideoEncoder

_NATS, _NATS_HALF = 1e-3, 0.05


def first_shown(examples: Iterable[Example]) -> tuple[Example, ...]:
    """The first row of each mix of clips, pictures and sounds, with its first answer alone."""
    found: dict[tuple[bool, ...], Example] = {}
    for row in examples:
        shown = tuple(map(bool, (row.media.videos, row.media.images, row.media.sounds)))
        if any(shown) and row.candidates and shown not in found:
            answer = replace(row.candidates[0], role="", prompt=None, media=None)
            found[shown] = replace(row, candidates=(answer,), labels=row.labels[:1])
    return tuple(found.values())


@torch.no_grad()
def require_true(
    model: PreTrainedModel, heads: Heads, encoder: VideoEncoder, row: Example, arrange: Arrange,
    layout: Layout,
) -> None:  # fmt: skip
    """Refuse a model whose answer to a row with media is not scored as its own forward does it.

    In float32 and wider every token must be within 0.001 nats. Half precision rounds each pass by
    itself, and may send a token to another expert: there half of the tokens must be within 0.05.

    Args:
        model: Without a wrapper.
        heads: Know its output layer.
        encoder: Of the rows.
        row: From `first_shown`.
        arrange: Lays out a batch, without clues.
        layout: How the run's rows are laid out.

    Raises:
        ConfigError: naming the class and the number.
        DataError: The row cannot be shown.
    """
    name = type(model).__name__
    before = encoder.num_clues, encoder.uses_spans
    encoder.num_clues, encoder.uses_spans = None, False  # the class knows nothing of them
    try:
        batch = encoder.collate([row], Needs()).to(model.device)
    finally:
        encoder.num_clues, encoder.uses_spans = before
    prompt, response = (
        batch.inputs[f"{part}_ids"][0, 0][batch.inputs[f"{part}_mask"][0, 0]]
        for part in ("prompt", "response")
    )
    inputs = _own_inputs(model, encoder, row, prompt, len(response))
    what = f"its own forward pass on what its processor makes of row {row.id!r}"
    with in_mode(model, training=False):
        with refusing(model, what):
            logps = own_logps(model, torch.cat([prompt, response]), len(response), **inputs)
        rows = arrange(batch, layout)
        ours, dtype = score_rows(model, heads, rows)
    truth = logps.gather(-1, response[:, None]).squeeze(-1)
    gaps = (ours[0, 0] - truth)[rows.mask[0, 0]].abs()
    wide = dtype in (torch.float32, torch.float64)
    found, limit = (gaps.max(), _NATS) if wide else (gaps.median(), _NATS_HALF)
    if not float(found) <= limit:
        raise ConfigError(
            f"model.path: {name} cannot be trained here: an answer of row {row.id!r} is scored "
            f"{float(found):.3g} nats away from {what.removesuffix(f' of row {row.id!r}')} "
            f"(at most {limit:g} in {str(dtype).removeprefix('torch.')})"
        )


def _own_inputs(
    model: PreTrainedModel, encoder: VideoEncoder, row: Example, prompt: Tensor, count: int
) -> dict[str, Any]:
    """What the model's own forward takes for a row, beside ids; the `count` of an answer are text.

    Raises:
        ConfigError: The processor writes another prompt.
    """
    processor, where = encoder.processor, row.id
    placed = place(row.prompt, row.media, where)
    asked = Asked(placed, row.template) if row.template else placed
    text = encoder.render.context(asked, where)
    tensors = processor.whole(text, encoder.reader.show(row.media), where)
    own = tensors["input_ids"][0].tolist()
    _require_same(encoder, own, prompt.tolist(), where)
    whole = len(own) == len(prompt)  # else what was cut is text
    tensors |= {} if whole else processor.token_types(prompt.cpu()[None])
    heads = [inspect.signature(type(part).forward).parameters for part in (model, model.base_model)]
    given: dict[str, Any] = {}
    for key, value in tensors.items():
        if key == "input_ids" or not any(key in known for known in heads):
            continue
        if key == "attention_mask":
            given[key] = torch.ones(1, len(prompt) + count, dtype=torch.long, device=model.device)
            continue
        if key.endswith("token_type_ids"):
            value = torch.nn.functional.pad(value, (0, count))
        floats = value.is_floating_point() and value.dim() > 1
        given[key] = value.to(model.device, tower_dtype(model) if floats else value.dtype)
    return {**given, "use_audio_in_video": True} if "audio_in_video" in tensors else given


def _require_same(encoder: VideoEncoder, own: list[int], ours: list[int], where: str) -> None:
    """Refuse a prompt that the processor writes in other tokens.

    The last ones of a prompt may have merged with an answer, and a long one is cut.
    """
    if own[: len(ours)] == ours or encoder.cut_prompt(own, where) == ours:
        return
    at = next((i for i, (a, b) in enumerate(zip(own, ours, strict=False)) if a != b), len(own))
    tokens = [encoder.tokenizer.decode(ids[at : at + 3]) for ids in (own, ours)]
    raise ConfigError(
        f"model.path: {type(encoder.processor.inner).__name__} writes the prompt of row {where!r} "
        f"in {len(own)} tokens and not in {len(ours)}; from token {at} on it has {tokens[0]!r} and "
        f"not {tokens[1]!r}, so that answers would be scored after another prompt than the model's"
    )
