"""Output layers: the head of a model, with what the model does to its logits afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mmalign.errors import ConfigError
from mmalign.models.linear import product
from mmalign.text.body import body_of
from mmalign.text.calls import in_mode, refusing

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
_CAPS = ("final_logit_softcapping", "logits_soft_cap")


@dataclass(frozen=True, slots=True)
class Head:
    """A language model's output layer: logits = cap * tanh(scale * (h W^T + b) / cap)."""

    weight: Tensor  # [V, D]
    bias: Tensor | None = None  # [V]
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:  # [m, D] -> [m, V]
        """Logits in float32 or wider, in memory of their own."""
        out = product(hidden, self.weight, self.bias)
        if out.dtype not in (torch.float32, torch.float64):
            out = out.float()
        if self.scale != 1.0:
            out *= self.scale
        if self.softcap is not None:
            out.div_(self.softcap).tanh_().mul_(self.softcap)
        return out

    def detached(self) -> Head:
        """A copy that training does not move."""
        bias = None if self.bias is None else self.bias.detach().clone()
        return Head(self.weight.detach().clone(), bias, self.scale, self.softcap)

    def to(self, device: torch.device) -> Head:
        """The head on a device."""
        bias = None if self.bias is None else self.bias.to(device)
        return Head(self.weight.to(device), bias, self.scale, self.softcap)

    def slope(self, logits: Tensor) -> Tensor | None:
        """d logits / d (h W^T + b), elementwise; None where it is 1."""
        if self.softcap is None:
            return None if self.scale == 1.0 else logits.new_tensor(self.scale)
        return (1.0 - (logits / self.softcap) ** 2) * self.scale


class Heads:
    """Output layers of models, with what a model does to its logits afterwards."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._shapes: dict[int, tuple[float, float | None]] = {}

    def of(self, model: PreTrainedModel) -> Head:
        """The head that gives exactly the model's own logits.

        Raises:
            ConfigError: when none does.
        """
        if id(model) not in self._shapes:
            self._shapes[id(model)] = _head_shape(model)
        return _head(model, *self._shapes[id(model)])


def _head(model: PreTrainedModel, scale: float, softcap: float | None) -> Head:
    layer: Any = model.get_output_embeddings()
    return Head(layer.weight, getattr(layer, "bias", None), scale, softcap)


@torch.no_grad()
def _head_shape(model: PreTrainedModel) -> tuple[float, float | None]:
    """Scale and soft cap of the logits: those named in the config that reproduce the model's."""
    settings: Any = model.config.get_text_config()
    layer = model.get_output_embeddings()
    if not isinstance(layer, torch.nn.Linear):
        raise ConfigError(
            f"model.path: {type(model).__name__} has no linear output head "
            f"(found {type(layer).__name__}), so its tokens cannot be scored"
        )
    ids = torch.arange(1, 9, device=layer.weight.device)[None]  # any tokens
    body: Any = body_of(model)
    with (
        torch.autocast(ids.device.type, enabled=False),
        in_mode(model, training=False),
        refusing(model, "a forward pass over token ids alone"),
    ):
        expected = model(input_ids=ids, use_cache=False).logits[0]
        states = body(input_ids=ids, use_cache=False).last_hidden_state[0]
    wide = torch.promote_types(expected.dtype, torch.float32)
    expected = expected.to(wide)
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(layer.weight.dtype, 3e-2)
    tolerance *= float(expected.abs().max().clamp(min=1e-3))
    named = [getattr(settings, name, None) for name in _SCALES]
    scales = [1.0, *(s for v in named if v for s in (float(v), 1.0 / float(v)))]
    for scale in dict.fromkeys(scales):
        for softcap in dict.fromkeys([*(getattr(settings, name, None) for name in _CAPS), None]):
            logits = _head(model, scale, softcap).logits(states)
            if logits.shape == expected.shape and (logits - expected).abs().max() <= tolerance:
                return scale, softcap
    raise ConfigError(
        f"model.path: {type(model).__name__} does something to its logits that is not a linear "
        "head with a scale and a soft cap, so log-probabilities computed from its hidden states "
        "would be wrong"
    )
