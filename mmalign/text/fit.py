"""Whether tokenizer and model belong together: ids that the model embeds, and one end token."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from mmalign.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mmalign.text.encode import Encoder

log = logging.getLogger(__name__)

MORE = 1.1
"""Rows of a table over tokens of its tokenizer: spare ones are a few in a hundred."""


def require_frame(encoder: Encoder, embedded: int, key: str) -> None:
    """Refuse a model without a token that stands in every row.

    A tokenizer may have more tokens than the model embeds: some families share one among models of
    several kinds. What rows use is checked where they are encoded.

    Args:
        encoder: Of the rows.
        embedded: How many tokens the model embeds.
        key: Of the config, that names the model.

    Raises:
        ConfigError: naming the token.
    """
    largest = max(encoder.frame_ids, default=0)
    if largest >= embedded:
        raise ConfigError(
            f"{key}: every row is written with {_named(encoder.tokenizer, largest)}, but the model "
            f"embeds {embedded} tokens, 0 to {embedded - 1}: the two do not belong together, or "
            "the tokenizer got tokens that the model did not"
        )


def compare(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Say it where the tokenizer seems to be another model's, by its end token or its size.

    Another end token alone says little of a tokenizer with a chat template that writes it: whoever
    teaches a model to chat gives the tokenizer one. It is in doubt where what the model's config
    names is no special token here, or where the sizes differ too.
    """
    end: Any = tokenizer.eos_token_id
    stops, embedded = _stops(model), num_embedded(model)
    added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
    taught = str(tokenizer.eos_token) in str(getattr(tokenizer, "chat_template", None))
    foreign = not taught or not stops <= special or embedded > MORE * len(tokenizer)
    if end is not None and stops and end not in stops and foreign:
        log.warning(
            "the tokenizer ends a text in %s, but the model's config in %s; if the tokenizer is "
            "not this model's own, its tokens mean something else to the model",
            _named(tokenizer, int(end)),
            ", ".join(_named(tokenizer, stop) for stop in sorted(stops)),
        )
    if embedded > 2 * len(tokenizer):
        log.warning(
            "the tokenizer has %s tokens, but the model embeds %s; if the tokenizer is not this "
            "model's own, its tokens mean something else to the model",
            len(tokenizer),
            embedded,
        )


def _stops(model: PreTrainedModel) -> set[int]:
    """Where the model's own files say that a text ends."""
    found: list[Any] = [getattr(model.config.get_text_config(), "eos_token_id", None)]
    if model.generation_config is not None:
        found.append(model.generation_config.eos_token_id)
    lists = [ids if isinstance(ids, list) else [ids] for ids in found if ids is not None]
    return {token for ids in lists for token in ids if type(token) is int and token >= 0}


def num_embedded(model: PreTrainedModel) -> int:
    """Rows of the model's table of tokens."""
    table: Any = model.get_input_embeddings()
    return int(table.weight.shape[0])


def require_ids(
    ids: Iterable[int], embedded: int, tokenizer: PreTrainedTokenizerBase, where: str
) -> None:
    """Refuse a row with a token that the model does not have.

    Raises:
        DataError: naming row and token.
    """
    largest = max(ids, default=0)
    if largest >= embedded:
        raise DataError(
            f"{where}: has the token {_named(tokenizer, largest)}, but the model embeds "
            f"{embedded} tokens, 0 to {embedded - 1}; take it out of the text, or use a model "
            "that has it"
        )


def _named(tokenizer: Any, token: int) -> str:
    return f"{tokenizer.convert_ids_to_tokens(token)!r} (id {token})"
