"""New tokens after prompts, from the model's own distribution and nothing else."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from mmalign.text.model import causal_model

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedModel


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
        ends: Tokens that end an answer.
        pad: Fills rows that have ended.
        seeds: One a row, of what is drawn for it.
        max_new_tokens: Tokens at most, the end token included.
        temperature: 0 takes the most likely token each time.
        top_p: Draw from the smallest set of tokens with this probability.
    """
    from transformers import GenerationConfig

    inner: Any = causal_model(model)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,  # `Draw` draws
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad,
    )
    moved = {k: v.to(inner.device) if hasattr(v, "to") else v for k, v in inputs.items()}
    draws = [Draw(seeds, temperature, top_p, inner.device)] if temperature > 0 else []
    with _without_own_settings(inner):
        output = inner.generate(**moved, generation_config=settings, logits_processor=draws)
    return [_before_end(row, ends) for row in output[:, inputs["input_ids"].shape[1] :].tolist()]


@torch.no_grad()
def next_logits(model: nn.Module, ids: Tensor, mask: Tensor, pad: int, steps: int) -> Tensor:
    """Logits of the first new tokens, each the most likely one; [steps, B, V], float32."""
    from transformers import GenerationConfig

    inner: Any = causal_model(model)
    settings = GenerationConfig(
        max_new_tokens=steps,
        do_sample=False,
        pad_token_id=pad,
        output_logits=True,
        return_dict_in_generate=True,
    )
    inputs = {"input_ids": ids.to(inner.device), "attention_mask": mask.to(inner.device)}
    with _without_own_settings(inner):
        return torch.stack(inner.generate(**inputs, generation_config=settings).logits)


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


@contextmanager
def _without_own_settings(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model has no generation settings.

    transformers fills whatever a given config leaves unset from the model's own: penalties, banned
    and forced tokens, further cuts of the distribution.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _before_end(tokens: list[int], ends: Collection[int]) -> list[int]:
    stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:stop]
