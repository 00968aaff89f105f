"""The clue aggregator at work in an adapter: what it is asked, what it looks at, and its copy."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mmalign.errors import ConfigError
from mmalign.video.clue_hook import ClueHook, add_clue_token
from mmalign.video.clues import ClueAggregator, frozen_copy

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor
    from transformers import PreTrainedModel

    from mmalign.config import ClueSpec
    from mmalign.video.model import Encoded

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
        hears = width if "audio" in kinds else None
        if spec.path is None:
            made = ClueAggregator(
                width, hears, width, num_queries=spec.num_queries, width=spec.width,
                num_layers=spec.num_layers, cross_every=spec.cross_every,
                num_heads=spec.num_heads, use_global=spec.use_global, residual=spec.residual,
            )  # fmt: skip
        else:
            made = ClueAggregator.load(spec.path)
            sizes = [made.settings[f"feature_dim_{m}"] for m in "va"], made.settings["text_dim"]
            if sizes != ([width, hears], width):
                raise ConfigError(
                    f"video.clues.path {spec.path}: an aggregator for features of {sizes[0]} and "
                    f"a language model of {sizes[1]}, but this model's are {[width, hears]} and "
                    f"{width}"
                )
        wide = torch.promote_types(model.dtype, torch.float32)
        self.aggregator = made.to(wide)
        self._start = [frozen_copy(self.aggregator)]  # in a list: no submodule, never trained
        self._special = torch.tensor(sorted({*kinds.values(), self.clue_id, *_special(tokenizer)}))
        self._hook: ClueHook | None = None
        self._as_reference = False

    def count(self, seen: bool, heard: bool) -> int:
        """Clue tokens of a prompt that shows pictures, and plays sound."""
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
