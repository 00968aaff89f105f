"""Clues in the place of a token: any model whose input embeddings can be had takes them.

The ids stay as they are, so positions in time and space, masks and generation work unchanged.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from mmalign.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor, nn
    from transformers import PreTrainedModel

CLUE_TOKEN = "<|clue|>"
"""Stands for one embedding of the aggregator."""

_OPENERS = (
    "<|vision_start|>",
    "<|vision_bos|>",
    "<|audio_start|>",
    "<|audio_bos|>",
    "<|begin_of_image|>",
    "<|begin_of_video|>",
    "<img>",
)
"""What families write before a medium's token."""


def add_clue_token(model: PreTrainedModel, tokenizer: Any) -> int:
    """Make `CLUE_TOKEN` a token of its own; call it before an adapter is attached.

    The model's tables grow only where they have no spare row. A new row is the mean of the others:
    as an input it is never seen, as an output it is one more token with the mean logit, the same
    for policy and reference.

    Returns:
        Its id.
    """
    from transformers import AddedToken

    token = AddedToken(CLUE_TOKEN, special=True, normalized=False)
    tokenizer.add_tokens([token], special_tokens=True)
    clue_id: int = tokenizer.convert_tokens_to_ids(CLUE_TOKEN)
    rows = len(_weight(model.get_input_embeddings()))
    if clue_id < rows:
        return clue_id
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            if table is not None:
                weight = _weight(table)
                weight[rows:] = weight[:rows].mean(0)
    return clue_id


def insert_clues(text: str, count: int, tokens: Iterable[str]) -> str:
    """Put clue tokens before the first medium of a prompt's text.

    They stand before the marker that opens the medium: Omni finds its clips by the token right
    after that marker, and counts positions wrongly otherwise.

    Args:
        text: As the processor takes it, media not yet expanded.
        count: Clues of this prompt.
        tokens: The processor's own tokens for media.

    Raises:
        DataError: The text has none of them.
    """
    tokens = tuple(tokens)
    places = [text.index(token) for token in tokens if token in text]
    if not places:
        raise DataError(
            f"a prompt without {' or '.join(tokens)} cannot get clues: {text[:80]!r}; rows of text "
            "alone are scored without"
        )
    first = min(places)
    first -= next((len(mark) for mark in _OPENERS if text.endswith(mark, 0, first)), 0)
    return text[:first] + CLUE_TOKEN * count + text[first:]


class ClueHook:
    """Replaces embeddings of the clue token, while it is armed; gradients go on to the clues.

    It sits on the embedding module, outside of every block that is computed again in the backward
    pass, and so runs once a pass.
    """

    def __init__(self, embedding: nn.Module, clue_id: int) -> None:
        """Attach it.

        Args:
            embedding: `model.get_input_embeddings()`, of a model with or without an adapter.
            clue_id: From `add_clue_token`.
        """
        self.clue_id = clue_id
        self._clues: Tensor | None = None
        self._placed = False
        self._handle = embedding.register_forward_hook(self._fill, with_kwargs=True)

    def remove(self) -> None:
        """Detach it for good."""
        self._handle.remove()

    @contextmanager
    def using(self, clues: Tensor) -> Iterator[None]:
        """Passes inside the block see these clues where they have clue tokens, in order.

        A pass without such a token, as every step of generation after the first, is left alone.

        Args:
            clues: [n, D], of all rows of a pass one after another.

        Raises:
            ConfigError: A pass has clue tokens, but not n of them; or no pass had any.
        """
        before = self._clues, self._placed
        self._clues, self._placed = clues, False
        try:
            yield
            if len(clues) and not self._placed:
                raise ConfigError(
                    f"{len(clues)} clues were given, but no pass had a {CLUE_TOKEN} token; put "
                    "them into the prompts with insert_clues"
                )
        finally:
            self._clues, self._placed = before

    def _fill(
        self, _: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], embeddings: Tensor
    ) -> Tensor | None:
        if self._clues is None:
            return None
        ids: Tensor = args[0] if args else keywords["input"]
        places = ids == self.clue_id
        count = int(places.sum())
        if not count:
            return None
        if self._clues.shape != (count, embeddings.shape[-1]):
            raise ConfigError(
                f"a pass has {count} {CLUE_TOKEN} tokens of width {embeddings.shape[-1]}, but the "
                f"clues are of shape {list(self._clues.shape)}; every row needs as many tokens as "
                "num_clue_tokens says for what it shows"
            )
        self._placed = True
        clues = self._clues.to(embeddings.device, embeddings.dtype)
        return embeddings.masked_scatter(places[..., None], clues)


def _weight(table: nn.Module) -> Tensor:
    weight = table.weight
    assert isinstance(weight, torch.Tensor)
    return weight
