"""What an outer model hands its language model: every keyword noted, and carried on or refused.

Rows are fed to the language model itself, media already among their embeddings. That is right only
where the outer model would hand it nothing else. What is known here is carried on: features for
deeper layers, and masks that follow from the kinds of tokens. All else is refused by its name.
"""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from mmalign.errors import ConfigError
from mmalign.text.model import in_mode, refusing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from mmalign.text.packing import Rows

_DEEP = {
    "deepstack_visual_embeds": "visual_pos_masks",  # one a layer, from the first on
    "deepstack_features": "vision_mask",  # by the number of their layer
}
"""What language models take features for deeper layers as, and the tokens that have them."""

LANGUAGE = ("language_model", "text_model")
"""What classes call the part that reads tokens."""

_CARRIED = {"inputs_embeds", "position_ids", "attention_mask", *_DEEP, *_DEEP.values()}
_TRIED = 4  # tokens of a trial, the second and third of a picture


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
    for name in LANGUAGE:
        found = getattr(model.base_model, name, None)
        if found is not None:
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
        return {int(layer): _spread(x, among, count) for layer, x in layers.items()}
    return {}


def deep_inputs(
    body: PreTrainedModel, layers: Mapping[int, Tensor], places: Tensor
) -> dict[str, Any]:
    """Features for deeper layers as a language model takes them.

    Args:
        body: The language model.
        layers: [n, D] by layer, in the order of the rows.
        places: [R, T], the n tokens that they belong to.
    """
    known = inspect.signature(type(body).forward).parameters
    if "deepstack_features" in known:
        return {"deepstack_features": dict(layers), "vision_mask": places[..., None]}
    return {
        "deepstack_visual_embeds": [layers[i] for i in sorted(layers)],
        "visual_pos_masks": places,
    }


def _spread(features: Tensor, among: Tensor, count: int) -> Tensor:  # [n, D] -> [count, D]
    if len(features) == count:
        return features
    return features.new_zeros(count, features.shape[-1]).index_copy(0, among, features)


class TokenKinds:
    """Kinds of tokens, for classes whose masks or experts follow from them.

    Such a model is fed through its outer part, which makes of them what its language model needs:
    the tokens of a picture see each other both ways, or have experts of their own.
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
        flat = rows.input_ids.flatten()
        found: dict[str, Tensor] = {}
        for piece in rows.pieces:
            part = slice(piece.start, piece.start + piece.length)
            for name, kinds in self._tell(flat[part]).items():
                if name in names:
                    found.setdefault(name, torch.zeros_like(flat))[part] = kinds
        return {name: kinds.view_as(rows.input_ids) for name, kinds in found.items()}

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
    return not (isinstance(value, dict | list | tuple) and all(v is None for v in _items(value)))


def _items(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value


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
