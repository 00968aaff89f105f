"""Causal language models of transformers: loading one, its body, its head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mmalign.errors import ConfigError
from mmalign.text import attention
from mmalign.text.logps import Head

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from mmalign.config import ModelConfig
    from mmalign.text.prefix import Rows

_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


def load_model(path: str, config: ModelConfig, revision: str | None = None) -> PreTrainedModel:
    """The model of a folder or hub name.

    Raises:
        ConfigError: when it cannot be loaded as a causal language model.
    """
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            path,
            revision=revision,
            trust_remote_code=config.trust_remote_code,
            dtype=getattr(torch, config.dtype),
            attn_implementation=config.attention,
            quantization_config=_quantization(config),
        )
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(
            f"model.path {path!r}: cannot be loaded with model.attention {config.attention} and "
            f"dtype {config.dtype}: {error}"
        ) from error


def no_dropout(model: nn.Module) -> None:
    """Switch every dropout off: with it, no two scores of a token are comparable."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # rates given to functions, and layer drop
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _quantization(config: ModelConfig) -> Any:
    if config.quantization is None:
        return None
    from transformers import BitsAndBytesConfig

    if config.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, config.dtype),
    )


def causal_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a peft wrapper, its adapters in place."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model  # pyright: ignore


def run_body(model: PreTrainedModel, rows: Rows, *, all_layers: bool = False) -> Any:
    """The model without its head on laid-out rows; `last_hidden_state` is [R, T, D]."""
    options: dict[str, Any] = {}
    if rows.segments is not None:
        attention.install(model)
        # A mask of four dimensions is taken as it is: none is made, and ours reads the segments.
        options["attention_mask"] = rows.input_ids.new_ones(1, 1, 1, 1, dtype=torch.bool)
        options |= {"segments": rows.segments, "position_ids": rows.position_ids}
    # Padding is on the right, where no earlier token sees it: the plain layout needs no mask.
    return model.base_model(
        input_ids=rows.input_ids, use_cache=False, output_hidden_states=all_layers, **options
    )


def scored_states(output: Tensor, rows: Rows) -> Tensor:  # [R, T, D] -> [M, D]
    """The states from which tokens are scored."""
    return output.flatten(0, 1)[rows.states]


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
    expected = model(input_ids=ids, use_cache=False).logits[0]
    states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
    wide = torch.promote_types(expected.dtype, torch.float32)
    expected = expected.to(wide)
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(layer.weight.dtype, 3e-2)
    tolerance *= float(expected.abs().max().clamp(min=1e-3))
    named = [getattr(settings, name, None) for name in _SCALES]
    scales = [1.0, *(s for v in named if v for s in (float(v), 1.0 / float(v)))]
    for scale in dict.fromkeys(scales):
        for softcap in dict.fromkeys([getattr(settings, "final_logit_softcapping", None), None]):
            logits = _head(model, scale, softcap).logits(states)
            if logits.shape == expected.shape and (logits - expected).abs().max() <= tolerance:
                return scale, softcap
    raise ConfigError(
        f"model.path: {type(model).__name__} does something to its logits that is not a linear "
        "head with a scale and a soft cap, so log-probabilities computed from its hidden states "
        "would be wrong"
    )
