"""Completions of prompts, for reports and `mmalign sample`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from mmalign.data.example import Prompt
    from mmalign.text.encode import Encoder


@torch.no_grad()
def generate(
    model: nn.Module,
    encoder: Encoder,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> list[str]:
    """One completion a prompt, all in one left-padded batch, in the context training scores.

    Args:
        model: In evaluation mode.
        encoder: The prompts' encoder.
        prompts: Plain or conversational.
        max_new_tokens: Tokens at most, the end token included.
        temperature: 0 takes the most likely token each time.
        top_p: Sample from the smallest set of tokens with this probability.

    Returns:
        The new text without special tokens.
    """
    from transformers import GenerationConfig

    tokenizer: Any = encoder.tokenizer
    device = next(model.parameters()).device
    rows = [encoder.encode_prompt(prompt) for prompt in prompts]
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), tokenizer.pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, width - len(row) :] = torch.tensor(row)
        mask[place, width - len(row) :] = 1
    drawn = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        eos_token_id=sorted(encoder.end_ids) or None,
        pad_token_id=tokenizer.pad_token_id,
        repetition_penalty=1.0,  # some models' own settings are not 1: not the policy then
        **drawn,
    )
    output = model.generate(  # pyright: ignore[reportCallIssue]
        input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings
    )
    return tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
