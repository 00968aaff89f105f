"""What a pass over prompts with media is fed, tried once before the first step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmalign.core import Needs
from mmalign.data.example import Asked, Example, Message
from mmalign.errors import ConfigError
from mmalign.text.model import in_mode, refusing
from mmalign.text.packing import CannotPackError, Fed, Layout, Rows, uploaded
from mmalign.text.passes import Arrange, own_logps, score_rows
from mmalign.video.encode import MARK, VideoEncoder, VideoInputs, place
from mmalign.video.model import (
    Encoded,
    TokenKinds,
    encode,
    in_precision,
    language_model,
    tower_dtype,
)
from mmalign.video.reader import FeatureStore

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    Clues = Callable[[PreTrainedModel, Encoded, Sequence[int]], Tensor]


@dataclass(slots=True)
class Contexts:
    """The contexts of one batch.

    Attributes:
        inputs: Of the batch.
        ids: Tokens that stand for features.
        frozen: Whether features are the same for policy and reference, so that they are made once.
        store: Keeps them for later batches, where they are frozen.
        kinds: Of tokens, for models that read them.
    """

    inputs: VideoInputs
    ids: frozenset[int]
    frozen: bool
    store: FeatureStore
    kinds: TokenKinds
    _made: dict[int, Encoded] = field(default_factory=dict)

    def media(self, model: PreTrainedModel, number: int) -> Encoded:
        """The features of media `number`, counted from 1, made by this model's towers."""
        assert number > 0, "a prompt that shows nothing has no features"
        if number in self._made:
            return self._made[number]
        given = self.inputs.media[number - 1]
        if given.features is not None:
            made = given.features
        elif not self.frozen:
            return encode(model, given.tensors, self.ids, self.kinds)
        else:
            with torch.no_grad():
                made = encode(model, given.tensors, self.ids, self.kinds)
            if given.key:
                self.store.put(given.key, made)
        self._made[number] = made
        return made

    def placeholders(self, number: int) -> list[int]:
        """The tokens that the features of media `number` stand for, in their order."""
        return [token for token in self.inputs.media[number - 1].written if token in self.ids]


def rope_positions(
    model: PreTrainedModel, ids: Tensor, tensors: Mapping[str, Tensor], types: Tensor | None
) -> Tensor | None:  # [3, P], or None for 0, 1, 2, ...
    """Positions of a prompt's tokens in time, height and width, as the model counts them.

    Args:
        model: Only its settings are read.
        ids: The prompt, [P], media expanded.
        tensors: What the processor gave for its media.
        types: [P], kind of each token, 0 for text; None for models that do not ask.
    """
    find = getattr(model.base_model, "get_rope_index", None)
    if find is None:
        return None
    grids = ("image_grid_thw", "video_grid_thw")
    if not any(name in tensors for name in (*grids, "feature_attention_mask")):
        return torch.arange(len(ids)).expand(3, -1)
    heard = tensors.get("feature_attention_mask")
    options: dict[str, Any] = {
        "input_ids": ids[None],
        "mm_token_type_ids": None if types is None else types[None],
        "attention_mask": torch.ones_like(ids)[None],
        "second_per_grid_ts": tensors.get("second_per_grid_ts"),
        "second_per_grids": tensors.get("video_second_per_grid"),
        "audio_seqlens": None if heard is None else heard.sum(-1),
        "use_audio_in_video": "audio_in_video" in tensors,
        **{name: tensors.get(name) for name in grids},
    }
    known = inspect.signature(find).parameters
    with refusing(model, "counting the positions of a prompt"):
        positions, _ = find(**{k: v for k, v in options.items() if k in known})
    return positions[:, 0]  # fractions of a position where a class counts time so


def place_positions(rows: Rows, counted: Mapping[int, Tensor]) -> Rows:
    """The rows with positions in time, height and width where a prompt has such.

    Args:
        rows: The laid-out batch.
        counted: Context to [3, P], positions of the tokens of its prompt.
    """
    if not counted:
        return rows
    ids = rows.input_ids
    fractions = any(own.is_floating_point() for own in counted.values())
    dtype = torch.float32 if fractions else torch.long
    positions = torch.zeros(3, ids.numel(), dtype=dtype, device=ids.device)
    for piece in rows.pieces:
        own = counted.get(piece.context)
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
    flat = embeddings.flatten(0, 1)
    places: list[int] = []  # of the features
    clued: list[int] = []  # of the clues
    values: list[Tensor] = []
    made_clues: list[Tensor] = []
    deep: list[Encoded] = []
    made: dict[int, Encoded] = {}  # with a trained tower, by this model in this pass
    for piece in rows.pieces:
        number = contexts.inputs.context_media[piece.context]
        if not number:
            continue
        seen = [i for i, token in enumerate(piece.prompt) if token in contexts.ids]
        if number not in made:
            made[number] = contexts.media(model, number).map(lambda tensor: tensor.to(flat))
        shown = [piece.prompt[i] for i in seen]
        encoded = made[number].in_order(contexts.placeholders(number), shown)
        places += [piece.start + i for i in seen]
        values.append(encoded.tokens)
        deep.append(encoded)
        if clues is not None:
            clued += [piece.start + i for i, token in enumerate(piece.prompt) if token == clue_id]
            made_clues.append(clues(model, encoded, piece.prompt).to(flat.dtype))
    inputs: dict[str, Any] = {"inputs_embeds": embeddings}
    if places:
        at = uploaded([*places, *clued], flat.device)
        filled = flat.index_copy(0, at, torch.cat([*values, *made_clues]))
        inputs["inputs_embeds"] = filled.view_as(embeddings)
        inputs |= _deep(body, deep, rows.input_ids, at[: len(places)])
    if not contexts.kinds.read_by(model):
        return Fed(body, inputs)
    if rows.segments is not None:
        raise CannotPackError(
            f"{type(model).__name__} reads tokens by their kind, with masks or experts of its own"
        )
    outer: Any = model.base_model
    names = inspect.signature(type(outer).forward).parameters
    return Fed(outer, {**inputs, **contexts.kinds.of(rows, names)})


def _deep(body: PreTrainedModel, shown: list[Encoded], ids: Tensor, at: Tensor) -> dict[str, Any]:
    """Features for deeper layers, as a language model takes them; `at` places of ids [R, T]."""
    layers = {layer for encoded in shown for layer in encoded.deep}
    if not layers:
        return {}
    joined = {
        layer: torch.cat([x.deep.get(layer, torch.zeros_like(x.tokens)) for x in shown])
        for layer in sorted(layers)
    }
    places = torch.zeros_like(ids, dtype=torch.bool).view(-1).index_fill(0, at, True).view_as(ids)
    if "deepstack_features" in inspect.signature(type(body).forward).parameters:
        return {"deepstack_features": joined, "vision_mask": places[..., None]}
    return {"deepstack_visual_embeds": list(joined.values()), "visual_pos_masks": places}


# The truth is the model's own forward pass on its processor's own output for the whole prompt: ids,
# pixels, grids, times and kinds of tokens. None of what is done here for speed takes part in it:
# media expanded by themselves, features made once, positions made beforehand, rows packed.

_NATS, _NATS_HALF = 1e-3, 0.05


def first_shown(examples: Iterable[Example]) -> tuple[Example, ...]:
    """The first row of each mix and order of clips, images and sounds, with one answer alone."""
    found: dict[tuple[object, ...], Example] = {}
    for row in examples:
        turns = row.prompt if isinstance(row.prompt, tuple) else (Message("user", row.prompt),)
        named = (mark for turn in turns for mark in MARK.findall(turn.content))
        shown = tuple(map(bool, row.media.by_kind().values()))
        key = (shown, *dict.fromkeys(named))
        if any(shown) and row.candidates and key not in found:
            answer = replace(row.candidates[0], role="", prompt=None, media=None)
            found[key] = replace(row, candidates=(answer,), labels=row.labels[:1])
    return tuple(found.values())


@torch.no_grad()
def require_true(
    model: PreTrainedModel, encoder: VideoEncoder, row: Example, arrange: Arrange, layout: Layout
) -> None:
    """Refuse a model whose answer to a row with media is not scored as its own forward does it.

    In float32 and wider every token must be within 0.001 nats. Half precision rounds each pass by
    itself, and may send a token to another expert: there half of the tokens must be within 0.05.

    Args:
        model: Without a wrapper.
        encoder: Of the rows.
        row: From `first_shown`.
        arrange: Lays out a batch, without clues.
        layout: How the run's rows are laid out.

    Raises:
        ConfigError: naming the class and the number.
        DataError: The row cannot be shown.
    """
    name = type(model).__name__
    bare = copy(encoder)
    bare.num_clues, bare.uses_spans = None, False  # the class knows nothing of them
    batch = bare.collate([row], Needs()).to(model.device)
    tokens = batch.inputs
    prompt = tokens.prompt_ids[0, 0][tokens.prompt_mask[0, 0]]
    response = tokens.response_ids[0, 0][tokens.response_mask[0, 0]]
    inputs = _own_inputs(model, encoder, row, prompt, len(response))
    what = f"its own forward pass on what its processor makes of row {row.id!r}"
    with in_mode(model, training=False):
        with refusing(model, what):
            logps = own_logps(model, torch.cat([prompt, response]), len(response), **inputs)
        rows = arrange(batch, layout)
        ours, dtype = score_rows(model, rows)
    truth = logps.gather(-1, response[:, None]).squeeze(-1)
    gaps = (ours[0, 0] - truth)[rows.mask[0, 0]].abs()
    wide = dtype in (torch.float32, torch.float64)
    found, limit = (gaps.max(), _NATS) if wide else (gaps.median(), _NATS_HALF)
    if not float(found) <= limit:
        raise ConfigError(
            f"model.path: {name} cannot be trained here: an answer of row {row.id!r} is scored "
            f"{float(found):.3g} nats away from {what.removesuffix(f' of row {row.id!r}')} "
            f"(at most {limit:g} in {str(dtype).removeprefix('torch.')})"
        )


def _own_inputs(
    model: PreTrainedModel, encoder: VideoEncoder, row: Example, prompt: Tensor, count: int
) -> dict[str, Any]:
    """What the model's own forward takes for a row, beside ids; the `count` of an answer are text.

    Raises:
        ConfigError: The processor writes another prompt.
    """
    processor, where = encoder.processor, row.id
    placed = place(row.prompt, row.media, where)
    asked = Asked(placed, row.template) if row.template else placed
    text = encoder.renderer(row.media).context(asked, where)
    tensors = processor.whole(text, encoder.reader.decode(row.media), where)
    own = tensors["input_ids"][0].tolist()
    _require_same(encoder, own, prompt.tolist(), where)
    if len(own) != len(prompt):  # what was cut is text
        tensors |= processor.token_types(prompt.cpu()[None])
    heads = [inspect.signature(type(part).forward).parameters for part in (model, model.base_model)]
    given: dict[str, Any] = {}
    for key, value in tensors.items():
        if key == "input_ids" or not any(key in known for known in heads):
            continue
        if key == "attention_mask":
            given[key] = torch.ones(1, len(prompt) + count, dtype=torch.long, device=model.device)
            continue
        if key.endswith("token_type_ids"):
            value = torch.nn.functional.pad(value, (0, count))
        given[key] = in_precision(value, tower_dtype(model)).to(model.device)
    return {**given, "use_audio_in_video": True} if "audio_in_video" in tensors else given


def _require_same(encoder: VideoEncoder, own: list[int], ours: list[int], where: str) -> None:
    """Refuse a prompt that the processor writes in other tokens.

    The last ones of a prompt may have merged with an answer, and a long one is cut.
    """
    if own[: len(ours)] == ours or encoder.cut_prompt(own, where) == ours:
        return
    at = next((i for i, (a, b) in enumerate(zip(own, ours, strict=False)) if a != b), len(own))
    tokens = [encoder.tokenizer.decode(ids[at : at + 3]) for ids in (own, ours)]
    raise ConfigError(
        f"model.path: {type(encoder.processor.inner).__name__} writes the prompt of row {where!r} "
        f"in {len(own)} tokens and not in {len(ours)}; from token {at} on it has {tokens[0]!r} and "
        f"not {tokens[1]!r}, so that answers would be scored after another prompt than the model's"
    )
