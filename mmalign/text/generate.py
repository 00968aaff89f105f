"""Completions of prompts from the model's own distribution; no batch changes one."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from functools import cache
from itertools import takewhile
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mmalign.data.example import Asked, Prompt
from mmalign.errors import DataError
from mmalign.models.adapter import answer_seeds
from mmalign.text.encode import Encoder
from mmalign.text.frame import opener
from mmalign.text.model import causal_model

log = logging.getLogger(__name__)

_HALF = (torch.bfloat16, torch.float16)
_LIMIT, _LIMIT_HALF = 2e-3, 0.05  # nats: the largest difference; in half precision the mean
_pads_freely: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@torch.no_grad()
def complete(
    model: nn.Module,
    inputs: dict[str, Any],
    *,
    ends: Collection[int],
    pad: int,
    seeds: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
) -> list[list[int]]:
    """The new tokens of each row of a batch, without the end token.

    Args:
        model: In evaluation mode; in a peft wrapper or not.
        inputs: `input_ids` and `attention_mask`, [B, P], padded on the left, and what else the
            model takes.
        ends: Tokens that end a response.
        pad: Fills rows that have ended.
        seeds: One a row, of what is drawn for it.
        max_new_tokens: Tokens at most, the end token included.
        temperature: 0 takes the most likely token each time.
        top_p: Draw from the smallest set of tokens with this probability.
    """
    draws = [Draw(seeds, temperature, top_p, causal_model(model).device)] if temperature > 0 else []
    output = _generated(
        model,
        inputs,
        draws,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad,
    )
    new = output[:, inputs["input_ids"].shape[1] :].tolist()
    return [list(takewhile(lambda token: token not in ends, row)) for row in new]


@torch.no_grad()
def next_logits(model: nn.Module, ids: Tensor, mask: Tensor, pad: int, steps: int) -> Tensor:
    """Logits of the first new tokens, each the most likely one; [steps, B, V], float32."""
    output = _generated(
        model,
        {"input_ids": ids, "attention_mask": mask},
        max_new_tokens=steps,
        pad_token_id=pad,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(output.logits)


def _generated(
    model: nn.Module, inputs: dict[str, Any], draws: Sequence[Draw] = (), **settings: Any
) -> Any:
    """What transformers generates under these settings and no others.

    It fills whatever a given config leaves unset from the model's own: penalties, banned and forced
    tokens, further cuts of the distribution.
    """
    from transformers import GenerationConfig

    inner: Any = causal_model(model)
    moved = {k: v.to(inner.device) if hasattr(v, "to") else v for k, v in inputs.items()}
    wanted = GenerationConfig(do_sample=False, **settings)  # `Draw` draws
    own, inner.generation_config = inner.generation_config, GenerationConfig()
    try:
        return inner.generate(**moved, generation_config=wanted, logits_processor=list(draws))
    finally:
        inner.generation_config = own


class Draw:
    """Draws a token for each row with the row's own random numbers, as a processor of logits.

    Adds Gumbel noise: the largest of the sums is a draw from the softmax. Unlike a draw by
    cumulated probabilities it is another one only where two sums are as close as rounding, so a
    row's padding and neighbours, which change its logits by rounding, do not change its text.
    """

    def __init__(
        self, seeds: Sequence[int], temperature: float, top_p: float, device: torch.device
    ) -> None:
        """One generator a row; the same seed draws otherwise on another kind of device."""
        self._temperature, self._top_p = temperature, top_p
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # [B, T], [B, V] -> [B, V]
        """Scores whose largest is the drawn token."""
        exact = torch.float32 if scores.device.type == "mps" else torch.float64  # it has no float64
        scores = scores.to(exact) / self._temperature
        if self._top_p < 1:
            scores = _nucleus(scores, self._top_p)
        noise = torch.empty_like(scores)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        return scores - noise.log_()


def _nucleus(scores: Tensor, top_p: float) -> Tensor:
    """Minus infinity outside of the smallest set of tokens with probability `top_p`."""
    ordered, places = scores.sort(descending=True)
    shares = ordered.softmax(-1)
    outside = shares.cumsum(-1) - shares >= top_p  # those before a token are enough without it
    return scores.masked_fill(outside.scatter(-1, places, outside), -torch.inf)


def left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, [B, P] long, of prompts that all end in the last column."""
    ids = [torch.tensor(row) for row in rows]
    ones = [torch.ones_like(row) for row in ids]
    return (
        pad_sequence(ids, batch_first=True, padding_value=pad, padding_side="left"),
        pad_sequence(ones, batch_first=True, padding_side="left"),
    )


def batches(
    model: nn.Module, rows: Sequence[list[int]], pad: int, max_new_tokens: int
) -> list[tuple[list[int], int]]:
    """Numbers of the rows that are answered together, and how many tokens their responses may have.

    Usually all of them. Rows of different lengths are kept apart where the model counts positions
    or keeps its state without regard to padding, which is found out by trying. Responses end where
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
    _say(f"responses end at the model's {limit} positions, some before sample.max_new_tokens")
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
        _pads_freely[model] = bool(found <= limit)  # not where it is nan
    return _pads_freely[model]


@cache
def _say(message: str) -> None:
    log.warning(message)


def generate(
    model: nn.Module,
    encoder: Encoder,
    prompts: Sequence[Prompt | Asked],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seeds: Sequence[int] | None = None,
) -> list[str]:
    """One completion a prompt, in the context training scores; the same in any batch and order.

    Args:
        model: In evaluation mode.
        encoder: The prompts' encoder.
        prompts: Plain or conversational, with what their rows hand the chat template.
        max_new_tokens: Tokens at most, the end token included.
        temperature: 0 takes the most likely token each time.
        top_p: Sample from the smallest set of tokens with this probability.
        seeds: One a completion; None: those of `answer_seeds` for seed 0.

    Returns:
        The new text as `written` gives it.
    """
    rows = [encoder.encode_prompt(prompt) for prompt in prompts]
    seeds = answer_seeds(0, prompts) if seeds is None else seeds
    pad = encoder.pad_id
    answers: list[str] = [""] * len(rows)
    for group, room in batches(model, rows, pad, max_new_tokens):
        ids, mask = left_padded([rows[i] for i in group], pad)
        made = complete(
            model,
            {"input_ids": ids, "attention_mask": mask},
            ends=encoder.end_ids,
            pad=pad,
            seeds=[seeds[i] for i in group],
            max_new_tokens=room,
            temperature=temperature,
            top_p=top_p,
        )
        for i, tokens in zip(group, made, strict=True):
            answers[i] = written(encoder, rows[i], tokens)
    return answers


def written(encoder: Encoder, context: Sequence[int], tokens: Sequence[int]) -> str:
    """A response as text, whole: thoughts and tool calls are marked by special tokens, which stay.

    Where the context ends in an opened thought, so does what opens it: the response's first words
    could not be told from a response otherwise.
    """
    before = encoder.tokenizer.decode(list(context[-32:]), skip_special_tokens=False)
    opened = opener(str(before))
    text = encoder.tokenizer.decode(list(tokens), skip_special_tokens=False)
    return f"{opened.tag}{opened.space}{text}" if opened else str(text)
