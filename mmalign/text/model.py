"""Causal language models of transformers: loading one, its body, its head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mmalign.errors import CheckpointError, ConfigError
from mmalign.models.files import ADAPTER_CONFIG, weight_files
from mmalign.text import attention

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mmalign.config import ModelConfig
    from mmalign.text.prefix import Fed, Rows


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
            quantization_config=quantization(config),
        )
    except (OSError, ValueError, ImportError) as error:
        kind = _kind_with_media(path, config, revision)
        if kind:
            raise ConfigError(
                f"model.path {path!r}: is a model of text and media ({kind}); set modality: video"
            ) from error
        raise ConfigError(
            f"model.path {path!r}: cannot be loaded with model.attention {config.attention} and "
            f"dtype {config.dtype}: {error}"
        ) from error


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


def no_dropout(model: nn.Module) -> None:
    """Switch every dropout off: with it, no two scores of a token are comparable."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # rates given to functions, and layer drop
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


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


def run_body(
    model: PreTrainedModel, rows: Rows, *, all_layers: bool = False, fed: Fed | None = None
) -> Any:
    """The model without its head on laid-out rows; `last_hidden_state` is [R, T, D].

    `fed` is what `rows.feed` gave for this model, where it was called already.
    """
    body: Any = model.base_model
    options: dict[str, Any] = {"input_ids": rows.input_ids}
    if fed is None and rows.feed is not None:
        fed = rows.feed(model)
    if fed is not None:
        body, options = fed.body, dict(fed.inputs)
    if rows.position_ids is not None:
        options["position_ids"] = rows.position_ids
    if rows.segments is not None:
        attention.install(model if fed is None else body)
        # A mask of four dimensions is taken as it is: none is made, and ours reads the segments.
        options["attention_mask"] = rows.input_ids.new_ones(1, 1, 1, 1, dtype=torch.bool)
        options["segments"] = rows.segments
    # Padding is on the right, where no earlier token sees it: the plain layout needs no mask.
    return body(use_cache=False, output_hidden_states=all_layers, **options)


def scored_states(output: Tensor, rows: Rows) -> Tensor:  # [R, T, D] -> [M, D]
    """The states from which tokens are scored."""
    return output.flatten(0, 1)[rows.states]


def load_trained(policy: nn.Module, folder: Path) -> nn.Module:
    """Load what a run's `final/` holds into the policy.

    Raises:
        CheckpointError: The folder holds other weights than the policy has.
    """
    from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
    from safetensors.torch import load_file

    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    if isinstance(policy, PeftModel) != is_adapter:
        has, lacks = ("a LoRA", "has none") if is_adapter else ("whole weights", "has a LoRA")
        raise CheckpointError(f"{folder}: holds {has}, but the config's model {lacks}")
    if isinstance(policy, PeftModel):
        result = set_peft_model_state_dict(policy, load_peft_weights(str(folder), device="cpu"))
    else:
        state = {k: v for file in weight_files(folder) for k, v in load_file(file).items()}
        result = policy.load_state_dict(state, strict=False)  # tied weights are stored once
    if result.unexpected_keys:
        raise CheckpointError(
            f"{folder}: holds weights that the config's model does not have, "
            f"e.g. {result.unexpected_keys[0]}"
        )
    return policy


def require_fit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer with more tokens than the model embeds.

    Raises:
        ConfigError: They do not belong together.
    """
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    if len(tokenizer) > rows:
        raise ConfigError(
            f"model.path: the tokenizer has {len(tokenizer)} tokens, but the model embeds {rows}; "
            "they do not belong together"
        )
