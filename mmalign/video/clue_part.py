"""The clue aggregator within an adapter.

What it is asked, what it looks at, and where its clues go.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmalign.config import ClueSpec
from mmalign.errors import ConfigError, DataError
from mmalign.video.clues import ClueAggregator, frozen_copy
from mmalign.video.model import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Clues in the place of a token: any model whose input embeddings can be had takes them.
#
# The ids stay as they are, so positions in time and space, masks and generation work unchanged.

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


# The clue aggregator within an adapter: what it is asked, what it looks at, and its copy.

FOLDER = "clues"  # of a saved aggregator, inside `final/`


class CluePart(nn.Module):
    """The trained aggregator, registered with the adapter; its frozen copy, which is not.

    It looks at the model's own projected features, which get no gradient from it, and is asked by
    the embeddings of the prompt's words behind the media.
    """

    def __init__(
        self, spec: ClueSpec, model: PreTrainedModel, tokenizer: Any, kinds: Mapping[str, int]
    ):
        """Make or load the aggregator, and give its token to model and tokenizer.

        Args:
            spec: The config's `video.clues`.
            model: The base, before an adapter is attached.
            tokenizer: Gets the clue token.
            kinds: Kind of media to the id of its token.

        Raises:
            ConfigError: Loaded weights of other sizes than the model has.
        """
        super().__init__()
        self.clue_id = add_clue_token(model, tokenizer)
        self._kinds = dict(kinds)
        embeddings: Any = model.get_input_embeddings()
        width = embeddings.weight.shape[1]
        audio_width = width if "audio" in kinds else None
        if spec.path is None:
            made = ClueAggregator(
                width, audio_width, width, num_queries=spec.num_queries, width=spec.width,
                num_layers=spec.num_layers, cross_every=spec.cross_every,
                num_heads=spec.num_heads, use_global=spec.use_global, residual=spec.residual,
            )  # fmt: skip
        else:
            made = ClueAggregator.load(spec.path)
            sizes = [made.settings[f"feature_dim_{m}"] for m in "va"], made.settings["text_dim"]
            if sizes != ([width, audio_width], width):
                raise ConfigError(
                    f"video.clues.path {spec.path}: an aggregator for features of {sizes[0]} and "
                    f"a language model of {sizes[1]}, but this model's are "
                    f"{[width, audio_width]} and {width}"
                )
        wide = torch.promote_types(model.dtype, torch.float32)
        self.aggregator = made.to(wide)
        self._start = [frozen_copy(self.aggregator)]  # in a list: no submodule, never trained
        self._special = torch.tensor(sorted({*kinds.values(), self.clue_id, *_special(tokenizer)}))
        self._hook: ClueHook | None = None
        self._as_reference = False

    def count(self, seen: bool, heard: bool) -> int:
        """Clue tokens of a prompt that has images or video, and audio."""
        return self.aggregator.num_clue_tokens(seen, heard)

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Inside, clues come from the copy made at the start."""
        self._as_reference = True
        try:
            yield
        finally:
            self._as_reference = False

    def forward(
        self, model: PreTrainedModel, encoded: Encoded, prompt: Tensor
    ) -> Tensor:  # [K, Dt]
        """The clues of one prompt.

        Args:
            model: Whose embeddings the words get.
            encoded: The features of its media.
            prompt: [P] its tokens.
        """
        heard = prompt == self._kinds.get("audio", -1)
        shown = torch.isin(prompt, torch.tensor(sorted(self._kinds.values()), device=prompt.device))
        words = ~torch.isin(prompt, self._special.to(prompt.device))
        behind = int(shown.nonzero().max()) if bool(shown.any()) else -1
        asked = words & (torch.arange(len(prompt), device=prompt.device) > behind)
        asked = asked if bool(asked.any()) else words
        with torch.no_grad():
            question = model.get_input_embeddings()(prompt[asked])
        features = encoded.tokens.detach()
        sound = heard[shown]
        seen, played = features[~sound], features[sound]
        aggregator = self.aggregator
        if self._as_reference:
            aggregator = self._start[0]
            if next(aggregator.parameters()).device != prompt.device:
                aggregator.to(prompt.device)
        return aggregator(
            question[None],
            seen[None] if len(seen) else None,
            played[None] if len(played) else None,
        )[0]

    @contextmanager
    def generating(self, model: PreTrainedModel, clues: Tensor) -> Iterator[None]:
        """Generation inside sees these clues, [n, Dt] of all rows of its batch."""
        if self._hook is None:
            self._hook = ClueHook(model.get_input_embeddings(), self.clue_id)
        with self._hook.using(clues):
            yield

    def save(self, directory: Path) -> None:
        """Write the trained aggregator beside the policy's weights."""
        self.aggregator.save(directory / FOLDER)

    def restore(self, directory: Path) -> None:
        """Read what `save` wrote."""
        loaded = ClueAggregator.load(directory / FOLDER)
        self.aggregator.load_state_dict(loaded.state_dict())


def _special(tokenizer: Any) -> set[int]:
    return {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
