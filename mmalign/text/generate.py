"""Responses to prompts from the model's own distribution; no batch changes one."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mmalign.data.example import Asked, Prompt
from mmalign.errors import DataError
from mmalign.models.adapter import Generated, answer_seeds
from mmalign.text.decode import Way, continued, way_of
from mmalign.text.draw import Continuation, alike, complete, next_logits
from mmalign.text.encode import Encoder
from mmalign.text.frame import opener
from mmalign.text.model import causal_model

log = logging.getLogger(__name__)

MOST_TOKENS = 2**15
"""Tokens of prompts and responses whose keys and values a model of tokens holds at one time."""

_pads_freely: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


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
            next_logits(model, *left_padded(few, pad), pad, steps=min(steps, 2))
            for few in ([*tried, longest], *([row] for row in tried))
        )
        _pads_freely[model] = alike(model, beside[:, :2], torch.cat(alone, dim=1))
    return _pads_freely[model]


@cache
def _say(message: str) -> None:
    log.warning(message)


def generate(
    model: nn.Module,
    encoder: Encoder,
    prompts: Sequence[Prompt | Asked],
    *,
    seeds: Sequence[int] | None = None,
    **options: Any,
) -> list[str]:
    """One completion a prompt; `seeds` has one each, None: those of `answer_seeds` for seed 0."""
    seeds = answer_seeds(0, prompts) if seeds is None else seeds
    found = respond(model, encoder, prompts, 1, seeds=[[seed] for seed in seeds], **options)
    return [response.response for [response] in found]


def respond(
    model: nn.Module,
    encoder: Encoder,
    prompts: Sequence[Prompt | Asked],
    num: int,
    *,
    seeds: Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    batch_size: int | None = None,
    most_tokens: int = MOST_TOKENS,
) -> list[list[Generated]]:
    """Responses in the context that training scores; the same in any batch and order.

    Args:
        model: In evaluation mode.
        encoder: The prompts' encoder.
        prompts: Plain or conversational, with what their rows hand the chat template.
        num: Responses a prompt; it is read once for all of them.
        seeds: `num` a prompt.
        max_new_tokens: Tokens at most, the end token included.
        temperature: 0 takes the most likely token each time.
        top_p: Sample from the smallest set of tokens with this probability.
        batch_size: Responses at one time; None: as many as `most_tokens` allows.
        most_tokens: Of prompts and responses together that are in memory at one time, more only
            where one response alone has more.

    Returns:
        `num` a prompt, the text as `written` gives it.
    """
    contexts = [encoder.encode_prompt(prompt) for prompt in prompts]
    pad = encoder.pad_id
    places: dict[tuple[int, ...], list[tuple[int, int]]] = {}  # of responses, by their context
    for number, context in enumerate(contexts):
        places.setdefault(tuple(context), []).extend((number, k) for k in range(num))
    rows = [list(context) for context in places]
    answers: list[list[Any]] = [[None] * num for _ in prompts]
    for group, room in batches(model, rows, pad, max_new_tokens):
        way = way_of(model, max((rows[i] for i in group), key=len), pad)
        size = 1 if way == "alone" else batch_size or sys.maxsize
        asked = {tuple(rows[i]): places[tuple(rows[i])] for i in group}
        for part in _parts(asked, way, room, most_tokens, size):
            targets = [target for targets in part.values() for target in targets]
            made = _continuations(
                model,
                list(part),
                len(targets) // len(part),
                way,
                pad=pad,
                ends=encoder.end_ids,
                seeds=[seeds[number][k] for number, k in targets],
                max_new_tokens=room,
                temperature=temperature,
                top_p=top_p,
            )
            for (number, k), found in zip(targets, made, strict=True):
                text = written(encoder, contexts[number], found.tokens)
                answers[number][k] = Generated(text, len(found.tokens), found.cut, found.logp)
    return answers


Part = dict[tuple[int, ...], list[tuple[int, int]]]
"""Contexts to the responses that are drawn for each: as many of all."""


def _parts(asked: Part, way: Way, room: int, most: int, size: int) -> Iterator[Part]:
    """What is drawn at one time: contexts of like length and with as many responses."""
    part: Part = {}
    for context in sorted(asked, key=lambda row: (len(asked[row]), len(row))):
        targets, length = asked[context], len(context)
        each = room + (0 if way == "shared" else length)  # tokens that a response alone takes
        once = length if way == "shared" else 0
        fit = min(size, max(1, (most - once) // each))  # responses beside each other
        count = len(part) + 1
        if part and (
            len(targets) != len(next(iter(part.values())))
            or count * (once + each * len(targets)) > most
            or count * len(targets) > size
        ):
            yield part
            part = {}
        while len(targets) > fit:
            yield {context: targets[:fit]}
            targets = targets[fit:]
        part[context] = targets
    if part:
        yield part


def _continuations(
    model: nn.Module,
    contexts: Sequence[tuple[int, ...]],
    num: int,
    way: Way,
    *,
    pad: int,
    **options: Any,
) -> list[Continuation]:
    if way in ("shared", "repeated"):
        ids, mask = left_padded(contexts, pad)
        return continued(model, ids, mask, num=num, way=way, **options)
    ids, mask = left_padded([context for context in contexts for _ in range(num)], pad)
    return complete(model, {"input_ids": ids, "attention_mask": mask}, pad=pad, **options)


def written(encoder: Encoder, context: Sequence[int], tokens: Sequence[int]) -> str:
    """A response as text, whole: thoughts and tool calls are marked by special tokens, which stay.

    Where the context ends in an opened thought, so does what opens it: the response's first words
    could not be told from a response otherwise.
    """
    before = encoder.tokenizer.decode(list(context[-32:]), skip_special_tokens=False)
    opened = opener(str(before))
    text = encoder.tokenizer.decode(list(tokens), skip_special_tokens=False)
    return f"{opened.tag}{opened.space}{text}" if opened else str(text)
