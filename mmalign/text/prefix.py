"""A batch of candidates as rows of tokens: which state predicts which token, nothing twice.

Two layouts with the same scores. `packed`: one row for the whole batch, each distinct prompt once,
then each of its distinct responses, positions restarting at the prompt's end; no padding.
`plain`: a right-padded row for each distinct (prompt, response), for any causal model.

The first token of every response is predicted from the last token of the prompt, and the last token
of a response predicts nothing, so it is not fed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from mmalign.text.attention import Segments

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor
    from transformers import PreTrainedModel

Layout = Literal["packed", "plain"]
Tokens = tuple[int, ...]
Prompt = tuple[int, Tokens]  # what it shows, by number, and its tokens


@dataclass(frozen=True, slots=True)
class Piece:
    """A prompt in the flattened [R * T] tokens of the rows, and the responses that follow it."""

    context: int  # number of what the prompt shows, of `context_index`; 0 where it is only text
    start: int  # place of the prompt's first token
    length: int  # tokens of the prompt
    responses: tuple[tuple[int, int], ...]  # place of the first token, and tokens


@dataclass(frozen=True, slots=True)
class Rows:
    """Tokens to feed, and where the scores of a batch come from.

    M is the number of tokens with a score; one shared by several candidates is computed once.
    """

    input_ids: Tensor  # [R, T]
    position_ids: Tensor | None  # [R, T], or [3, R, T] of three kinds; None: 0, 1, 2, ...
    segments: Segments | None  # of the one row of the packed layout
    states: Tensor  # [M]  place in the flattened [R * T] of the state that predicts
    targets: Tensor  # [M]  token ids
    slots: Tensor  # [B, K, L]  place in [M] of each response token's score
    mask: Tensor  # [B, K, L]  the scored tokens
    prompt_slots: Tensor | None  # [B, K, P]  the same for prompt tokens
    prompt_mask: Tensor | None  # [B, K, P]  without the first token, which nothing predicts
    pieces: tuple[Piece, ...] = ()
    feed: Callable[[PreTrainedModel], Fed] | None = None  # None: the model is fed token ids

    def responses(self, scores: Tensor) -> Tensor:  # [M, ...] -> [B, K, L, ...]
        """Scores of response tokens, left-aligned; 0 where the mask is False."""
        return _spread(scores, self.slots, self.mask)

    def from_responses(self, values: Tensor) -> Tensor:  # [B, K, L, ...] -> [M, ...]
        """The reverse of `responses`; 0 for prompt tokens."""
        scores = values.new_zeros(len(self.targets), *values.shape[3:])
        scores[self.slots[self.mask]] = values[self.mask]
        return scores

    def prompts(self, scores: Tensor) -> Tensor | None:  # [M] -> [B, K, P]
        """Scores of prompt tokens; 0 where the mask is False; None unless asked for."""
        if self.prompt_slots is None or self.prompt_mask is None:
            return None
        return _spread(scores, self.prompt_slots, self.prompt_mask)


@dataclass(frozen=True, slots=True)
class Fed:
    """What a pass runs where a model is fed more than token ids."""

    body: PreTrainedModel  # the part that has the attention layers
    inputs: Mapping[str, Any]  # its keywords


def arrange(inputs: Mapping[str, Tensor], layout: Layout, *, prompts: bool = False) -> Rows:
    """Lay out a batch.

    Args:
        inputs: prompt_ids, prompt_mask [B, K, P] and response_ids, response_mask [B, K, L];
            response_scored [B, K, L] where some of those tokens are not scored; context_index
            [B, K] where prompts of equal tokens may show different things.
        layout: packed or plain.
        prompts: Whether prompt tokens are scored too.
    """
    device = inputs["prompt_ids"].device
    pairs = list(zip(_prompts(inputs), _tokens(inputs, "response"), strict=True))
    groups: dict[Prompt, dict[Tokens, None]] = {}
    for prompt, response in pairs:
        groups.setdefault(prompt, {})[response] = None
    width = max(len(prompt[1]) + max(len(response) - 1, 0) for prompt, response in pairs)

    ids: list[int] = []
    positions: list[int] = []
    segments: list[tuple[int, tuple[int, ...]]] = []
    states: list[int] = []
    targets: list[int] = []
    pieces: list[Piece] = []
    places: dict[tuple[Prompt, Tokens], int] = {}
    prompt_places: dict[Prompt, int] = {}
    for key, responses in groups.items():
        context, prompt = key
        length, start = len(prompt), len(ids)
        follow: list[tuple[int, int]] = []
        if layout == "packed":
            ids += prompt
            positions += range(length)
            segments.append((length, tuple(len(r) - 1 for r in responses if len(r) > 1)))
        if prompts:
            prompt_places[key] = len(targets)
            states += range(start, start + length - 1)
            targets += prompt[1:]
        for response in responses:
            if layout == "plain":
                start = len(ids)
                ids += prompt
            after = len(ids)
            follow.append((after, max(len(response) - 1, 0)))
            ids += response[:-1]
            positions += range(length, length + len(response[:-1]))
            if layout == "plain":
                ids += prompt[-1:] * (start + width - len(ids))  # no earlier token sees them
                pieces.append(Piece(context, start, length, (follow.pop(),)))
            places[key, response] = len(targets)
            states += [start + length - 1, *range(after, after + len(response) - 1)][
                : len(response)
            ]
            targets += response
        if layout == "packed":
            pieces.append(Piece(context, start, length, tuple(follow)))

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    def slots(starts: list[int], mask: Tensor, skipped: int) -> Tensor:
        steps = torch.arange(mask.shape[-1], device=device) - skipped
        return torch.where(mask, tensor(starts).view(*mask.shape[:2], 1) + steps, 0)

    packed = layout == "packed"
    prompt_mask = scored_prompts(inputs) if prompts else None
    return Rows(
        input_ids=tensor(ids).view(1 if packed else -1, len(ids) if packed else width),
        position_ids=tensor(positions)[None] if packed else None,
        segments=Segments(tuple(segments)) if packed else None,
        states=tensor(states),
        targets=tensor(targets),
        slots=slots([places[pair] for pair in pairs], inputs["response_mask"], 0),
        mask=scored_responses(inputs),
        prompt_slots=None
        if prompt_mask is None
        else slots([prompt_places[prompt] for prompt, _ in pairs], prompt_mask, 1),
        prompt_mask=prompt_mask,
        pieces=tuple(pieces),
    )


def scored_responses(inputs: Mapping[str, Tensor]) -> Tensor:  # [B, K, L]
    """Which response tokens of a batch are scored; its `inputs` are those of `arrange`."""
    real = inputs["response_mask"]
    return real & inputs["response_scored"] if "response_scored" in inputs else real


def scored_prompts(inputs: Mapping[str, Tensor]) -> Tensor:  # [B, K, P]
    """Which prompt tokens of a batch can be scored: all but the first, which nothing predicts."""
    mask = inputs["prompt_mask"].clone()
    mask[..., 0] = False
    return mask


def _prompts(inputs: Mapping[str, Tensor]) -> list[Prompt]:
    """Context and tokens of every candidate's prompt, row by row."""
    tokens = _tokens(inputs, "prompt")
    if "context_index" not in inputs:
        return [(0, prompt) for prompt in tokens]
    return list(zip(inputs["context_index"].flatten().tolist(), tokens, strict=True))


def _tokens(inputs: Mapping[str, Tensor], name: str) -> list[Tokens]:
    """The real tokens of every candidate, row by row."""
    ids = inputs[f"{name}_ids"].flatten(0, 1).tolist()
    lengths = inputs[f"{name}_mask"].sum(-1).flatten().tolist()
    return [tuple(row[:length]) for row, length in zip(ids, lengths, strict=True)]


def _spread(scores: Tensor, slots: Tensor, mask: Tensor) -> Tensor:
    trail = scores.shape[1:]
    if not len(scores):  # a batch without any scored token still has a graph behind it
        return scores.sum() + scores.new_zeros(*mask.shape, *trail)
    return scores[slots].masked_fill(~mask.view(*mask.shape, *(1 for _ in trail)), 0.0)
