"""Causal language models of transformers: loading one, and what is switched off in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mmalign.errors import ConfigError
from mmalign.text import attention

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from mmalign.config import ModelConfig


def load_model(path: str, config: ModelConfig, revision: str | None = None) -> PreTrainedModel:
    """The model of a folder or hub name.

    Raises:
        ConfigError: when it cannot be loaded as a causal language model, or lacks weights.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        loader: Any = AutoModelForCausalLM
        model, found = loader.from_pretrained(
            path,
            revision=revision,
            trust_remote_code=config.trust_remote_code,
            dtype=getattr(torch, config.dtype),
            attn_implementation=attention.wanted(config),
            quantization_config=quantization(config),
            ignore_mismatched_sizes=True,  # told with names below
            output_loading_info=True,
        )
    except SafetensorError as error:
        raise ConfigError(
            f"model.path {path!r}: its weights cannot be read as safetensors: {error}; "
            "copy the model again"
        ) from error
    except (OSError, ValueError, ImportError, RuntimeError, MemoryError) as error:
        kind = _kind_with_media(path, config, revision)
        if kind:
            raise ConfigError(
                f"model.path {path!r}: is a model of text and media ({kind}); set modality: video"
            ) from error
        attention.require_supported(config, _class_of(path, config, revision))
        raise ConfigError(
            f"model.path {path!r}: cannot be loaded with model.attention {config.attention} and "
            f"dtype {config.dtype}: {error}"
        ) from error
    _require_whole(path, model, found)
    return model


def _require_whole(path: str, model: PreTrainedModel, found: dict[str, Any]) -> None:
    """transformers fills with noise what the files lack or hold in another shape, and goes on."""
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    lacking = sorted(own.intersection(found["missing_keys"]))
    if lacking:
        raise ConfigError(
            f"model.path {path!r}: {len(lacking)} of {len(own)} weights of {type(model).__name__} "
            f"are not in its files, e.g. {lacking[0]}; copy the model again"
        )
    if found["mismatched_keys"]:
        name, there, wanted = min(found["mismatched_keys"])
        raise ConfigError(
            f"model.path {path!r}: {len(found['mismatched_keys'])} weights have another shape than "
            f"its config.json says, e.g. {name}: {list(there)}, not {list(wanted)}"
        )


def _class_of(path: str, config: ModelConfig, revision: str | None) -> type[PreTrainedModel] | None:
    """The class that a checkpoint's settings name; None where that cannot be found out."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    try:
        settings = AutoConfig.from_pretrained(
            path, revision=revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError):
        return None
    return MODEL_FOR_CAUSAL_LM_MAPPING.get(type(settings), None)  # pyright: ignore


def _kind_with_media(path: str, config: ModelConfig, revision: str | None) -> str:
    """The type of a model that takes pictures or clips and has no class for text alone; else ""."""
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto

    try:
        settings = AutoConfig.from_pretrained(
            path, revision=revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError):
        return ""
    kind = str(settings.model_type)
    takes_media = kind in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return kind if takes_media else ""


_NOISE = {"jitter_noise", "input_jitter_noise", "moe_jitter_eps"}  # of routers, in training mode


def no_dropout(model: nn.Module) -> None:
    """Switch every dropout and every jitter off: with it, no two scores of a token compare."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # rates given to functions, and layer drop
            if ("drop" in name or name in _NOISE) and isinstance(value, float):
                setattr(module, name, 0.0)


def recompute_layers(model: PreTrainedModel) -> None:
    """Keep only the inputs of layers for the backward pass.

    Raises:
        ConfigError: The class has no gradient checkpointing.
    """
    try:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise ConfigError(
            f"model.gradient_checkpointing is set, but {type(model).__name__} has none; remove it"
        ) from error


def quantization(config: ModelConfig) -> Any:
    """The settings that transformers loads quantised weights by; None for whole ones."""
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
