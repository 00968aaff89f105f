"""Completions of prompts, for reports and `mmalign sample`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmalign.models.drawing import answer_seeds
from mmalign.text.decoding import complete
from mmalign.text.padding import batches, left_padded
from mmalign.text.thoughts import opener

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from mmalign.data.example import Asked, Prompt
    from mmalign.text.encode import Encoder


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
    """An answer as text, whole: thoughts and tool calls are marked by special tokens, which stay.

    Where the context ends in an opened thought, so does what opens it: the answer's first words
    could not be told from an answer otherwise.
    """
    before = encoder.tokenizer.decode(list(context[-32:]), skip_special_tokens=False)
    opened = opener(str(before))
    text = encoder.tokenizer.decode(list(tokens), skip_special_tokens=False)
    return f"{opened.tag}{opened.space}{text}" if opened else str(text)
