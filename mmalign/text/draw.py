"""Tokens drawn from a model's own distribution, each row by its own random numbers."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.text.model import causal_model

_HALF = (torch.bfloat16, torch.float16)
_LIMIT, _LIMIT_HALF = 2e-3, 0.05  # nats: the largest difference; in half precision the mean


@dataclass(frozen=True, slots=True)
class Continuation:
    """What follows a prompt.

    Attributes:
        tokens: Without the end token.
        cut: No end token came.
        logp: Log-probability of all that was drawn, the end token included, under the model at
            temperature 1; nats.
    """

    tokens: list[int]
    cut: bool
    logp: float


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

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone."""
        self._generators = [self._generators[row] for row in rows]


def _nucleus(scores: Tensor, top_p: float) -> Tensor:
    """Minus infinity outside of the smallest set of tokens with probability `top_p`."""
    ordered, places = scores.sort(descending=True)
    shares = ordered.softmax(-1)
    outside = shares.cumsum(-1) - shares >= top_p  # those before a token are enough without it
    return scores.masked_fill(outside.scatter(-1, places, outside), -torch.inf)


class _Watch:
    """Log-probabilities of the tokens that were taken; a processor of logits that changes none."""

    def __init__(self) -> None:
        self._found: list[Tensor] = []  # [B] each
        self._before: Tensor | None = None  # [B, V]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # [B, T], [B, V] -> [B, V]
        """The scores as they are."""
        self._take(input_ids)
        self._before = scores.log_softmax(-1)
        return scores

    def of(self, output: Tensor) -> Tensor:  # [B, T] -> [B, new]
        """Those of all tokens that were generated."""
        self._take(output)
        return torch.stack(self._found, dim=-1)

    def _take(self, ids: Tensor) -> None:
        if self._before is not None:
            self._found.append(self._before.gather(-1, ids[:, -1:])[:, 0])


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
) -> list[Continuation]:
    """What transformers continues each row of a batch with.

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
    watch = _Watch()
    draws = [Draw(seeds, temperature, top_p, causal_model(model).device)] if temperature > 0 else []
    output = _generated(
        model,
        inputs,
        [watch, *draws],
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad,
    )
    new = output[:, inputs["input_ids"].shape[1] :]
    scores = watch.of(output)
    made: list[Continuation] = []
    for row, found in zip(new.tolist(), scores.tolist(), strict=True):
        tokens = list(takewhile(lambda token: token not in ends, row))
        cut = len(tokens) == len(row)
        made.append(Continuation(tokens, cut, math.fsum(found[: len(tokens) + (not cut)])))
    return made


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
    model: nn.Module, inputs: dict[str, Any], processors: Sequence[Any] = (), **settings: Any
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
        return inner.generate(**moved, generation_config=wanted, logits_processor=list(processors))
    finally:
        inner.generation_config = own


def alike(model: nn.Module, logits: Tensor, expected: Tensor) -> bool:
    """Whether two ways to the same logits differ by rounding alone; not where any is nan."""
    inner: Any = causal_model(model)
    gap = (logits.log_softmax(-1) - expected.log_softmax(-1)).abs()
    is_half = inner.dtype in _HALF or torch.is_autocast_enabled(inner.device.type)
    return bool(gap.mean() <= _LIMIT_HALF if is_half else gap.max() <= _LIMIT)
