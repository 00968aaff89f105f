"""What a pass over prompts with media is fed: embeddings with features in their places."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from mmalign.errors import ConfigError
from mmalign.text.packing import CannotPackError, Fed
from mmalign.video.handed import deep_inputs, language_model
from mmalign.video.model import Encoded, encode

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor
    from transformers import PreTrainedModel

    from mmalign.text.packing import Piece, Rows
    from mmalign.video.features import FeatureStore
    from mmalign.video.handed import TokenKinds

    Clues = Callable[[PreTrainedModel, Encoded, Tensor], Tensor]


@dataclass(slots=True)
class Contexts:
    """The contexts of one batch.

    Attributes:
        inputs: Of the batch; see `VideoEncoder`.
        ids: Tokens that stand for features.
        frozen: Whether features are the same for policy and reference, so that they are made once.
        store: Keeps them for later batches, where they are frozen.
        kinds: Of tokens, for models that read them.
    """

    inputs: Mapping[str, Tensor]
    ids: frozenset[int]
    frozen: bool
    store: FeatureStore
    kinds: TokenKinds
    _made: dict[int, Encoded] = field(default_factory=dict)

    def media(self, model: PreTrainedModel, number: int) -> Encoded:
        """The features of media `number`, made by this model's towers."""
        if number in self._made:
            return self._made[number]
        group = f"media/{number}/"
        given = {k.removeprefix(group): v for k, v in self.inputs.items() if k.startswith(group)}
        if "tokens" in given:
            made = Encoded.of(given)
        elif not self.frozen:
            return encode(model, given, self.ids, self.kinds)
        else:
            with torch.no_grad():
                made = encode(model, given, self.ids, self.kinds)
            if "key" in given:
                self.store.put(bytes(given["key"].tolist()).hex(), made)
        self._made[number] = made
        return made

    def shown(self, piece: Piece) -> int:
        """The number of the media that a prompt shows; 0 for none."""
        return int(self.inputs["context_media"][piece.context])


def place_positions(rows: Rows, inputs: Mapping[str, Tensor]) -> Rows:
    """The rows with positions in time, height and width where a prompt has such."""
    counted = [inputs[name] for name in inputs if name.startswith("positions/")]
    if not counted:
        return rows
    ids = rows.input_ids
    fractions = any(own.is_floating_point() for own in counted)
    dtype = torch.float32 if fractions else torch.long
    positions = torch.zeros(3, ids.numel(), dtype=dtype, device=ids.device)
    for piece in rows.pieces:
        own = inputs.get(f"positions/{piece.context}")
        if own is None:
            own = torch.arange(piece.length, device=ids.device).expand(3, -1)
        own = own[:, : piece.length].to(ids.device, dtype)
        positions[:, piece.start : piece.start + piece.length] = own
        first = own.max() + 1  # after everything shown, whichever of its three counts is highest
        for start, count in piece.responses:
            steps = torch.arange(count, device=ids.device)
            positions[:, start : start + count] = first + steps
    return replace(rows, position_ids=positions.view(3, *ids.shape))


def feed(
    model: PreTrainedModel, rows: Rows, contexts: Contexts, clue_id: int | None, clues: Clues | None
) -> Fed:
    """What the model's language part takes for these rows.

    Args:
        model: Policy or reference, without a wrapper.
        rows: The laid-out batch.
        contexts: Its media.
        clue_id: The token that stands for clues.
        clues: Makes the clues of a prompt that has such tokens.

    Raises:
        ConfigError: A prompt has another number of tokens than its media have features.
    """
    body = language_model(model)
    embeddings = model.get_input_embeddings()(rows.input_ids)
    flat, ids = embeddings.flatten(0, 1), rows.input_ids.flatten()
    wanted = torch.tensor(sorted(contexts.ids), device=ids.device)
    places: list[Tensor] = []
    values: list[Tensor] = []
    deep: list[Encoded] = []
    made: dict[int, Encoded] = {}  # with a trained tower, by this model in this pass
    for piece in rows.pieces:
        number = contexts.shown(piece)
        if not number:
            continue
        prompt = ids[piece.start : piece.start + piece.length]
        seen = torch.isin(prompt, wanted).nonzero().squeeze(-1) + piece.start
        if number not in made:
            made[number] = contexts.media(model, number).to(flat)
        encoded = made[number]
        if len(seen) != len(encoded.tokens):
            raise ConfigError(
                f"a prompt has {len(seen)} tokens for media, but the model made "
                f"{len(encoded.tokens)} features; processor and model do not belong together"
            )
        places.append(seen)
        values.append(encoded.tokens)
        deep.append(encoded)
        if clues is not None:
            places.append((prompt == clue_id).nonzero().squeeze(-1) + piece.start)
            values.append(clues(model, encoded, prompt).to(flat.dtype))
    inputs: dict[str, Any] = {"inputs_embeds": embeddings}
    if places:
        flat = flat.index_copy(0, torch.cat(places), torch.cat(values))
        inputs["inputs_embeds"] = flat.view_as(embeddings)
        inputs |= _deep(body, deep, torch.isin(rows.input_ids, wanted))
    if not contexts.kinds.read_by(model):
        return Fed(body, inputs)
    outer: Any = model.base_model
    return Fed(outer, {**inputs, **_kinds(model, rows, contexts.kinds)})


def _deep(body: PreTrainedModel, shown: list[Encoded], places: Tensor) -> dict[str, Any]:
    """Features for deeper layers: layers add them where media stand, in the order of the rows."""
    layers = {layer for encoded in shown for layer in encoded.deep}
    if not layers:
        return {}
    joined = {
        layer: torch.cat([x.deep.get(layer, torch.zeros_like(x.tokens)) for x in shown])
        for layer in sorted(layers)
    }
    return deep_inputs(body, joined, places)


def _kinds(model: PreTrainedModel, rows: Rows, kinds: TokenKinds) -> dict[str, Tensor]:
    if rows.segments is not None:
        raise CannotPackError(
            f"{type(model).__name__} reads tokens by their kind, with masks or experts of its own"
        )
    return kinds.of(rows, inspect.signature(type(model.base_model).forward).parameters)
