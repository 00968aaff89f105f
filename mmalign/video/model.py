"""Video language models of transformers: loading one, its parts, what it hands its text model."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmalign.config import ModelConfig
from mmalign.errors import ConfigError, MmalignError
from mmalign.models.batch import WHOLE, ModelInputs
from mmalign.text import packing
from mmalign.text.model import FAULTS, describe, in_mode, loading, refusing, require_whole
from mmalign.text.packing import Rows
from mmalign.text.tokenizer import num_embedded

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Rows are fed to the language model itself, media already among their embeddings. That is right
# only where the outer model would hand it nothing else. What is known here is carried on: features
# for deeper layers, and masks that follow from the kinds of tokens. All else is refused by its
# name.

_DEEP = {
    "deepstack_visual_embeds": "visual_pos_masks",  # one a layer, from the first on
    "deepstack_features": "vision_mask",  # by the number of their layer
}
"""What language models take features for deeper layers as, and the tokens that have them."""

_CARRIED = {"inputs_embeds", "position_ids", "attention_mask", *_DEEP, *_DEEP.values()}
_TRIED = 4  # tokens of a trial, the second and third of an image


def handed(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords that the language model is called with; those that say nothing are left out.

    Args:
        model: Without a peft wrapper around it.
        inputs: Of its body, without a mask.

    Raises:
        ConfigError: One of them is neither carried on nor told by the kinds of tokens.
    """
    with _recorded(language_model(model)) as seen:
        model.base_model(**inputs, use_cache=False)
    kept = {name: value for name, value in seen.items() if _says(name, value)}
    lost = [n for n in kept if n not in _CARRIED and not n.endswith("token_type_ids")]
    if lost:
        raise ConfigError(
            f"model.path: {type(model).__name__} cannot be trained here: beside embeddings it "
            f"hands its language model {' and '.join(lost)}, which would be lost"
        )
    return kept


def language_model(model: PreTrainedModel) -> PreTrainedModel:
    """The part that reads tokens, media already among them.

    Raises:
        ConfigError: The class keeps it elsewhere.
    """
    body: Any = model.base_model
    found = body.get_decoder()
    if found is not body:
        return found
    raise ConfigError(
        f"model.path: {type(model).__name__} has no language model inside that could be fed "
        "media; modality video takes e.g. Qwen2.5-VL, Qwen3-VL, LLaVA-OneVision, Qwen2.5-Omni"
    )


def deep_features(seen: Mapping[str, Any], places: Tensor) -> dict[int, Tensor]:  # [n, D] each
    """Features for deeper layers, by layer, one for each token of media: 0 where it has none.

    Args:
        seen: From `handed`.
        places: [1, S], the n tokens of media.
    """
    for name, mask_name in _DEEP.items():
        if name not in seen:
            continue
        found = seen[name]
        layers = dict(found if isinstance(found, dict) else enumerate(found))
        mask = seen[mask_name]
        mask = mask[..., 0] if mask.dim() == 3 else mask
        among = mask[places].nonzero().squeeze(-1)  # a sound has no features of this kind
        count = int(places.sum())
        return {
            int(layer): x
            if len(x) == count
            else x.new_zeros(count, x.shape[-1]).index_copy(0, among, x)
            for layer, x in layers.items()
        }
    return {}


class TokenKinds:
    """Kinds of tokens, for classes whose masks or experts follow from them.

    Such a model is fed through its outer part, which makes of them what its language model needs:
    the tokens of an image see each other both ways, or have experts of their own.
    """

    def __init__(self, tell: Callable[[Tensor], dict[str, Tensor]]) -> None:
        """Know nothing of a model yet; `tell` is `Processor.token_types`."""
        self._tell = tell
        self._read: dict[int, bool] = {}

    def read_by(self, model: PreTrainedModel) -> bool:
        """Whether a model's passes depend on kinds of tokens beside their positions.

        Raises:
            ConfigError: It reads words both ways, or a kind of kinds that its processor has not.
        """
        if id(model) not in self._read:
            self._read[id(model)] = self._ask(model)
        return self._read[id(model)]

    def of(self, rows: Rows, names: Mapping[str, Any]) -> dict[str, Tensor]:  # [R, T] each
        """The kinds of laid-out tokens as the processor tells them; those of answers are text.

        Args:
            rows: The laid-out batch.
            names: Those that the model takes.
        """
        ids = rows.input_ids
        found: dict[str, Tensor] = {}
        for piece in rows.pieces:
            part = slice(piece.start, piece.start + piece.length)
            for name, kinds in self._tell(torch.tensor(piece.prompt)).items():
                if name in names:
                    new = torch.zeros(ids.numel(), dtype=torch.long)
                    found.setdefault(name, new)[part] = kinds
        return {
            name: kinds.view(ids.shape).to(ids.device, non_blocking=True)
            for name, kinds in found.items()
        }

    @torch.no_grad()
    def _ask(self, model: PreTrainedModel) -> bool:
        known = inspect.signature(type(model.base_model).forward).parameters
        asked = [name for name in known if name.endswith("token_type_ids")]
        if not asked:
            return False
        if sees_ahead(self._try(model, asked, 0).get("attention_mask")):
            raise ConfigError(
                f"model.path: {type(model).__name__} cannot be trained here: it reads the words of "
                "a prompt both ways (a prefix), and an answer would be scored by looking at it"
            )
        shown = self._try(model, asked, 1)
        follows = sees_ahead(shown.get("attention_mask"))
        return follows or any(name.endswith("token_type_ids") for name in shown)

    def _try(self, model: PreTrainedModel, asked: list[str], kind: int) -> dict[str, Any]:
        kinds = torch.zeros(1, _TRIED, dtype=torch.long, device=model.device)
        embeddings = model.get_input_embeddings()(kinds)
        kinds[:, 1:3] = kind
        inputs: dict[str, Any] = {
            "inputs_embeds": embeddings,
            "position_ids": torch.arange(_TRIED, device=model.device)[None],
        }
        what = "a pass over the kinds of some tokens"
        with in_mode(model, training=False), refusing(model, what):
            return handed(model, {**inputs, **dict.fromkeys(asked, kinds)})


def sees_ahead(mask: Any) -> bool:
    """Whether a mask lets a token see one that follows it.

    Args:
        mask: [..., S, S], true or 0 where something is seen; one for each kind of layer; or None.

    Raises:
        ConfigError: It is of a kind that cannot be looked into.
    """
    if mask is None:
        return False
    if isinstance(mask, dict):
        return any(sees_ahead(part) for part in mask.values())
    if not isinstance(mask, torch.Tensor):
        raise ConfigError(
            f"model.attention: the masks of this model are {type(mask).__name__}s, which cannot be "
            "carried on with media; use auto or sdpa"
        )
    if mask.dim() < 4:
        return False  # padding
    seen = mask if mask.dtype == torch.bool else mask > -1.0
    return bool(seen.triu(1).any())


def _says(name: str, value: Any) -> bool:
    """Whether a keyword changes what a language model computes."""
    if value is None or isinstance(value, bool | str) or name.startswith("output_"):
        return False
    items = value.values() if isinstance(value, dict) else value
    return not (isinstance(value, dict | list | tuple) and all(v is None for v in items))


@contextmanager
def _recorded(module: nn.Module) -> Iterator[dict[str, Any]]:
    """Calls of `module` are noted and give back their input."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    seen: dict[str, Any] = {}
    names = list(inspect.signature(type(module).forward).parameters)[1:]

    def record(*given: Any, **keywords: Any) -> Any:
        seen.update(zip(names, given, strict=False))
        seen.update(keywords)
        return BaseModelOutputWithPast(last_hidden_state=seen["inputs_embeds"])

    vars(module)["forward"] = record  # on the instance: the class's own is behind it
    try:
        yield seen
    finally:
        del vars(module)["forward"]


# Every class prepares its context in its own way (newline tokens, sound between frames, features
# for deeper layers). None of that is repeated here: the model runs with its language model replaced
# by a recorder, and what would have gone in is read off.

_BETWEEN = re.compile(
    "projector|connector|merger|resampler|newline|embed_(vision|audio)|visual_embeddings_table"
)
"""What classes call the projectors beside their towers; the library has a way to ask for neither
these nor those inside."""
_INSIDE = ("merger", "deepstack_merger_list", "proj")


@dataclass(frozen=True, slots=True)
class Encoded(ModelInputs):
    """The media of a prompt as the language model takes them, in the order of their placeholders.

    Attributes:
        tokens: [n, D].
        deep: Layer to [n, D], added there (DeepStack).
    """

    tokens: Tensor = field(metadata=WHOLE)
    deep: dict[int, Tensor] = field(default_factory=dict["int", "Tensor"], metadata=WHOLE)

    def map(self, change: Callable[[Tensor], Tensor]) -> Encoded:
        """With each tensor changed."""
        deep = {layer: change(tensor) for layer, tensor in self.deep.items()}
        return Encoded(change(self.tokens), deep)

    def in_order(self, own: Sequence[int], ids: Sequence[int]) -> Encoded:
        """The features for the tokens of a prompt, which may name kinds of media in any order.

        Args:
            own: The n placeholders that the features were made for.
            ids: Those of the prompt.

        Raises:
            ConfigError: They are not the same ones.
        """
        if len(ids) != len(self.tokens):
            raise ConfigError(
                f"a prompt has {len(ids)} tokens for media, but the model made {len(self.tokens)} "
                "features; processor and model do not belong together"
            )
        if own == ids:
            return self
        by_id = (sorted(range(len(given)), key=given.__getitem__) for given in (ids, own))
        places = dict(zip(*by_id, strict=True)) if len(own) == len(ids) else {}
        order = [places[i] for i in range(len(places))]
        if [own[i] for i in order] != ids:
            raise ConfigError(
                "a prompt has other tokens for media than the model made features for; processor "
                "and model do not belong together"
            )
        index = packing.uploaded(order, self.tokens.device)
        return self.map(lambda tensor: tensor[index])

    def detached(self) -> Encoded:
        """Without a graph, on the CPU, in memory of its own."""
        return self.map(lambda tensor: tensor.detach().to("cpu", copy=True))

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        return sum(t.numel() * t.element_size() for t in (self.tokens, *self.deep.values()))

    def named(self) -> dict[str, Tensor]:
        """All its tensors: `tokens`, and `deep_LAYER`."""
        return {"tokens": self.tokens, **{f"deep_{i}": t for i, t in self.deep.items()}}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Encoded:
        """The reverse of `named`."""
        deep = {int(k[5:]): tensor for k, tensor in tensors.items() if k.startswith("deep_")}
        return cls(tensors["tokens"], deep)


def load_model(path: str, config: ModelConfig, revision: str | None = None) -> PreTrainedModel:
    """The model of a folder or hub name; of an Omni model, the thinker.

    Raises:
        ConfigError: when it cannot be loaded as a model of text and media, or lacks weights.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    try:
        settings = AutoConfig.from_pretrained(
            path, revision=revision, trust_remote_code=config.trust_remote_code
        )
        # An Omni model is a thinker, which answers in text, with a talker on top.
        settings = getattr(settings, "thinker_config", settings)
        loader: Any = AutoModelForImageTextToText
        model, found = loader.from_pretrained(path, config=settings, **loading(config, revision))
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(
            f"model.path {path!r}: cannot be loaded as a model of text and media with "
            f"model.attention {config.attention} and dtype {config.dtype}: {describe(error)}"
        ) from error
    require_whole(path, model, found)
    parts_of(model)  # refuses a model without a language model, or with a part that is unknown
    return model


def parts_of(model: PreTrainedModel) -> dict[str, str]:
    """The start of names to the part that modules and parameters belong to.

    Language model and towers are what the class itself says (`get_decoder`, `get_encoder`); another
    tower of the same class as one of them is one (Video-LLaVA's for clips).

    Returns:
        Names to `language`, `tower` or `projector`; what lies inside of something else comes first.

    Raises:
        ConfigError: There is no language model, or a part is of neither kind.
    """
    body: Any = model.base_model
    known: dict[nn.Module | None, str] = {
        **dict.fromkeys(_towers(model), "tower"),
        language_model(model): "language",
        model.get_output_embeddings(): "language",
    }
    kinds = {type(module) for module, part in known.items() if part == "tower"}
    root = next(name for name, module in model.named_modules() if module is body)
    outer = f"{root}." if root else ""
    found: dict[str, str] = {}
    for name, _ in model.named_parameters():
        depth = outer.count(".") + 1 if name.startswith(outer) else 1
        start = ".".join(name.split(".")[:depth])
        if start in found:
            continue
        held = attrgetter(start)(model)
        part = known.get(held) or ("tower" if type(held) in kinds else "")
        if not part and _BETWEEN.search(start):
            part = "projector"
        if not part:
            raise ConfigError(
                f"model.path: {type(model).__name__} has a part {start!r} "
                f"({type(held).__name__}) that is neither its language model nor a tower, nor a "
                "projector by its name, so that video.train cannot say whether it is trained. Use "
                "a class of another family"
            )
        found[start] = part
    inside = [f"{name}.{part}" for name in found if found[name] == "tower" for part in _INSIDE]
    return {**dict.fromkeys(inside, "projector"), **found}


def _towers(model: PreTrainedModel) -> list[nn.Module]:
    body: Any = model.base_model
    found = [body.get_encoder(modality=kind) for kind in ("image", "video", "audio")]
    return [tower for tower in dict.fromkeys(found) if tower is not body]


def _part(name: str, parts: Mapping[str, str]) -> str:
    return next(part for start, part in parts.items() if f"{name}.".startswith(f"{start}."))


def select_parts(model: PreTrainedModel, trained: Sequence[str]) -> None:
    """Freeze every parameter outside of the named parts."""
    parts = parts_of(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_part(name, parts) in trained)


def lora_targets(model: PreTrainedModel, trained: Sequence[str], wanted: Sequence[str]) -> str:
    """A pattern for peft: linear layers of the named parts.

    Args:
        model: Without adapters.
        trained: Parts of `parts_of`.
        wanted: Last names of modules; empty for all linear layers but the output head.

    Raises:
        ConfigError: It fits nothing.
    """
    head, parts = model.get_output_embeddings(), parts_of(model)
    linear = (n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head)
    there = [name for name in linear if _part(name, parts) in trained]
    ends = tuple(f".{name}" for name in wanted)
    names = [name for name in there if not wanted or f".{name}".endswith(ends)]
    if not names:
        last = ", ".join(sorted({name.rpartition(".")[2] for name in there})) or "none"
        raise ConfigError(
            f"model.lora.targets: {', '.join(wanted) or 'all-linear'} fits no linear layer of "
            f"{', '.join(trained) or 'no part'} (video.train) in {type(model).__name__}; it has "
            f"{last}"
        )
    # Layer numbers are left open: `model.language_model.layers.7.mlp.up_proj` stands for all.
    shapes = sorted({re.sub(r"\\\.\d+(?=\\\.)", r"\\.\\d+", re.escape(name)) for name in names})
    return "|".join(shapes)


def media_ids(model: PreTrainedModel) -> frozenset[int]:
    """Ids of the tokens that stand for features."""
    config: Any = model.config
    names = ("image_token", "video_token", "audio_token")
    ids = [getattr(config, f"{n}_{end}", None) for n in names for end in ("id", "index")]
    ids += getattr(config, "visual_indicator_token_ids", None) or []  # Ovis 2: ends of an image
    return frozenset(int(i) for i in ids if i is not None)


def encode(
    model: PreTrainedModel, tensors: Mapping[str, Tensor], ids: frozenset[int], kinds: TokenKinds
) -> Encoded:
    """Run the towers and projectors on the media of one prompt.

    Args:
        model: Without a peft wrapper around it; adapters inside take part.
        tensors: From the processor, `input_ids` [1, S] of the placeholders among them.
        ids: Tokens that stand for features.
        kinds: Whether what follows from kinds of tokens is seen to elsewhere.

    Raises:
        ConfigError: Another number of features than of tokens for them, or what a language model
            is handed beside them is not carried on.
    """
    input_ids = tensors["input_ids"]
    known = inspect.signature(type(model.base_model).forward).parameters.keys() - {"attention_mask"}
    dtype = tower_dtype(model)
    given = {k: in_precision(v, dtype) for k, v in tensors.items() if k in known}
    # Positions are made elsewhere, for whole prompts; given here, so that none are made twice.
    given["position_ids"] = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    try:
        seen = handed(model, given)
    except (MmalignError, torch.OutOfMemoryError):
        raise
    except FAULTS as error:
        raise ConfigError(
            f"{type(model).__name__} cannot encode what its processor made of the media "
            f"({describe(error)}). Model and processor (config.json, preprocessor_config.json) "
            "must belong together"
        ) from error
    if sees_ahead(seen.get("attention_mask")) and not kinds.read_by(model):
        raise ConfigError(
            f"model.path: {type(model).__name__} cannot be trained here: tokens of its media see "
            "each other both ways, by a mask that would be lost"
        )
    places = torch.isin(input_ids, torch.tensor(sorted(ids), device=input_ids.device))  # [1, S]
    _require_seen(model, input_ids, places, seen["inputs_embeds"])
    return Encoded(seen["inputs_embeds"][places], deep_features(seen, places))


@torch.no_grad()
def _require_seen(model: PreTrainedModel, ids: Tensor, places: Tensor, features: Tensor) -> None:
    """Refuse media that left no trace, and traces of media where no token of theirs stands.

    A model may pass over a tensor that it does not know, or put features in places of its own.
    """
    known = ids.clamp(max=num_embedded(model) - 1)
    own = model.get_input_embeddings()(known).to(features.dtype)
    moved = (own != features).any(-1)  # [1, S]
    for token in ids[places].unique():
        if not bool(moved[ids == token].any()):
            raise ConfigError(
                f"{type(model).__name__} did not look at all media: its token {int(token)} still "
                "has its own embedding. Model and processor do not belong together"
            )
    others = ids[moved & ~places]
    if len(others):
        raise ConfigError(
            f"model.path: {type(model).__name__} cannot be trained here: it puts what it sees in "
            f"the place of the token {int(others[0])} too, which its config does not name"
        )


def in_precision(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Pixels in a precision; times and masks as they are."""
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dim() > 1 else tensor


def tower_dtype(model: PreTrainedModel) -> torch.dtype:
    """What the pixels must be in: that of the first convolution or projection of a tower."""
    for tower in _towers(model):
        for parameter in tower.parameters():
            if parameter.is_floating_point():
                return parameter.dtype
    return model.dtype
