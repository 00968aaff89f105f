"""Saved adapters of peft put on a live model, all of their tensors or none.

peft itself loads what fits and passes over the rest, with at most a warning.
"""

from __future__ import annotations

import logging
import re
import warnings
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from mmalign.errors import CheckpointError
from mmalign.models.files import read_tensors, weight_files

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from peft import PeftModel
    from torch import Tensor, nn

log = logging.getLogger(__name__)

TRAINED = "default"  # peft's own name; saved adapters load elsewhere as they are

LIBRARY_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    RuntimeError,
    re.error,
    SafetensorError,
)
"""What peft and transformers raise for settings and tensors that do not fit a model."""


def load_adapter(model: nn.Module, folder: Path, *, trainable: bool) -> PeftModel:
    """The model with an adapter of any kind that peft knows.

    Args:
        model: The base, of which some modules are exchanged.
        folder: adapter_config.json and adapter_model.safetensors.
        trainable: Whether its tensors are to be trained; else it is in evaluation mode. Dropout
            that the adapter was trained with is off in both.

    Raises:
        CheckpointError: It cannot be read, or does not fit the model to the last tensor.
    """
    from peft import PeftConfig, get_peft_model

    tensors = adapter_tensors(folder)
    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
        config.inference_mode = not trainable
        if getattr(config, "lora_dropout", 0.0):
            log.info(
                "%s: lora_dropout %g of its training is off here, since with it no two scores of "
                "a token are comparable",
                folder,
                config.lora_dropout,
            )
            config.lora_dropout = 0.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what does not fit is found below, tensor by tensor
            policy: Any = get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
    except LIBRARY_ERRORS as error:
        raise CheckpointError(
            f"{folder}: cannot be loaded on this model: {one_line(error)}"
        ) from error
    put_tensors(policy, tensors, folder)
    return policy if trainable else policy.eval()


def adapter_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of an adapter's folder, by the names in its file."""
    return {k: v for file in weight_files(folder) for k, v in read_tensors(file)[0].items()}


def put_tensors(policy: PeftModel, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Put the tensors of a file in the place of the adapter's own.

    Raises:
        CheckpointError: Some are missing, unknown to the model, or of another shape.
    """
    from peft import get_peft_model_state_dict

    own = get_peft_model_state_dict(policy, adapter_name=TRAINED, save_embedding_layers=False)
    if own.keys() != tensors.keys():
        _convert(policy, tensors, where)  # names of an older class, or a misfit
        return
    odd = next((name for name, tensor in own.items() if tensor.shape != tensors[name].shape), None)
    if odd is not None:
        raise CheckpointError(
            f"{where}: {odd} is {list(tensors[odd].shape)} there and {list(own[odd].shape)} in the "
            "model; the adapter belongs to another model"
        )
    with torch.no_grad():
        for name, tensor in own.items():  # views of the adapter's own
            tensor.copy_(tensors[name])


def _convert(policy: PeftModel, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Put tensors by peft's own conversion of names, and see that nothing was passed over."""
    from peft import set_peft_model_state_dict

    _check_wrapped(policy, tensors, where)
    try:
        result = set_peft_model_state_dict(policy, dict(tensors), adapter_name=TRAINED)
    except LIBRARY_ERRORS as error:
        raise CheckpointError(f"{where}: does not fit the model: {one_line(error)}") from error
    own = _own_names(policy)
    missing = sorted(own.intersection(result.missing_keys))
    unknown = sorted(result.unexpected_keys)
    if missing or unknown:
        raise CheckpointError(_misfit(where, missing, unknown, len(own)))


def _misfit(where: Path, missing: Sequence[str], unknown: Sequence[str], total: int) -> str:
    parts: list[str] = []
    if missing:
        first = missing[0].replace(f".{TRAINED}", "")
        parts.append(f"{len(missing)} of {total} tensors are missing, the first is {first}")
    if unknown:
        first = unknown[0].replace(f".{TRAINED}", "")
        parts.append(f"{len(unknown)} fit no module of the model, the first is {first}")
    hint = "it belongs to another model" if unknown else "copy it again"
    return f"{where}: the adapter does not fit the model: {'; '.join(parts)}; {hint}"


def _own_names(policy: PeftModel) -> set[str]:
    """Names of the adapter's tensors in the model's state."""
    names = policy.state_dict().keys()
    own = {name for name in names if f".{TRAINED}." in f"{name}."}
    config: Any = policy.peft_config[TRAINED]
    bias = getattr(config, "bias", "none")
    biases = {name for name in names if name.endswith(".bias") and name not in own}
    if bias == "all":
        own |= biases
    elif bias.endswith("_only"):
        own |= {name for name in biases if name.endswith(".base_layer.bias")}
    return own


def _check_wrapped(policy: PeftModel, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Modules and tokens saved whole: peft raises a bare KeyError where they are missing."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    for name, module in policy.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            wanted = [f"{name}.{key}" for key in module.adapter_state_dict_load_map(TRAINED)]
            missing = [key for key in wanted if key not in tensors]
            if missing:
                raise CheckpointError(_misfit(where, missing, [], len(tensors) + len(missing)))


def one_line(error: BaseException) -> str:
    """A library's message in one line, without the headline that torch puts first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].startswith("Error(s) in loading state_dict"):
        more = f" (and {len(lines) - 2} more)" if len(lines) > 2 else ""
        return lines[1] + more
    return " ".join(lines)[:300] or type(error).__name__
