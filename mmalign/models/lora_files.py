"""LoRA files of peft, diffusers and kohya, read into one form."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmalign.errors import CheckpointError
from mmalign.models.adapter_settings import check_settings, needs_model, read_settings
from mmalign.models.files import (
    ADAPTER_CONFIG,
    UnfitError,
    denoiser_folder,
    read_tensors,
    weight_files,
)
from mmalign.models.kohya_names import PREFIX, modules_by_name
from mmalign.models.lora_checks import check_factors

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from torch import Tensor

DIFFUSERS_LORA = "pytorch_lora_weights.safetensors"

_PEFT = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "embedding_A",
    ".lora_embedding_B": "embedding_B",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}
_DIFFUSERS = _PEFT | {
    ".lora.down.weight": "A",
    ".lora.up.weight": "B",
    "_lora.down.weight": "A",  # of attention processors, before diffusers 0.22
    "_lora.up.weight": "B",
    ".alpha": "alpha",
}
_KOHYA = {".lora_down.weight": "A", ".lora_up.weight": "B", ".alpha": "alpha"}
_DENOISERS = ("unet.", "transformer.")


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """Low-rank factors by module.

    Parts of a module: A [r, in] and B [out, r] (convolutions have more axes), embedding_A and
    embedding_B, magnitude (DoRA), alpha, or full: a weight that is stored whole.
    """

    path: Path
    settings: Mapping[str, Any]  # as in peft's adapter_config.json
    parts: Mapping[str, Mapping[str, Tensor]]

    def scale(self, module: str) -> float:
        """What the product of a module's factors is multiplied by: alpha / r."""
        parts = self.parts[module]
        rank = len(parts["A"] if "A" in parts else parts["embedding_A"])
        alpha = float(parts["alpha"]) if "alpha" in parts else self.settings.get("lora_alpha", rank)
        for pattern, value in (self.settings.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                alpha = value
                break
        return alpha / (rank**0.5 if self.settings.get("use_rslora") else rank)


def is_lora(path: Path) -> bool:
    """Whether a file or folder holds a LoRA and no whole model."""
    if path.is_file():
        return path.suffix == ".safetensors"
    has_file = any((path / name).is_file() for name in (ADAPTER_CONFIG, DIFFUSERS_LORA))
    return has_file and denoiser_folder(path) == path


def read_lora(path: Path, modules: Iterable[str]) -> LoraWeights:
    """Read a LoRA.

    Args:
        path: A safetensors file in the layout of diffusers or kohya, or a folder with one or with
            an adapter of peft.
        modules: Names of the layers of the model that it is for; kohya's names say less than they.

    Raises:
        CheckpointError: A kind of file, or of tensor in it, that is not known here.
    """
    weights = _read_any(path, modules)
    check_factors(weights)
    return weights


def _read_any(path: Path, modules: Iterable[str]) -> LoraWeights:
    if (path / ADAPTER_CONFIG).is_file():
        return _read_peft(path)
    file = path if path.is_file() else path / DIFFUSERS_LORA
    tensors, metadata = read_tensors(file)
    if all(name.startswith("lora_") for name in tensors):
        return LoraWeights(path, {}, _kohya_parts(path, tensors, modules))
    settings = _diffusers_settings(path, metadata)
    return LoraWeights(path, settings, _diffusers_parts(path, tensors))


def _read_peft(folder: Path) -> LoraWeights:
    settings = read_settings(folder)
    wants = needs_model(settings)
    if wants:
        raise UnfitError(
            f"{folder}: the adapter has {wants} = {settings[wants]!r}, which is read in a live "
            "model only, and the base is none of transformers"
        )
    parts: dict[str, dict[str, Tensor]] = {}
    for file in weight_files(folder):
        for name, tensor in read_tensors(file)[0].items():
            module, part = _split(folder, name.removeprefix("base_model.model."), _PEFT)
            parts.setdefault(module, {})[part] = tensor
    return LoraWeights(folder, settings, parts)


def _diffusers_settings(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What diffusers notes of peft's settings; those of text encoders are not looked at."""
    try:
        noted = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except ValueError as error:
        raise CheckpointError(f"{path}: lora_adapter_metadata is no JSON: {error}") from error
    if not isinstance(noted, dict):
        raise CheckpointError(f"{path}: lora_adapter_metadata must hold an object, found {noted!r}")
    encoders = ("text_encoder.", "text_encoder_2.", "text_encoder_3.")
    settings = {_denoiser_key(k): v for k, v in noted.items() if not k.startswith(encoders)}
    check_settings(path, settings)
    return settings


def _diffusers_parts(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        _refuse_text_encoder(path, name)
        module, part = _split(path, _denoiser_key(name), _DIFFUSERS)
        if part == "full":
            raise CheckpointError(
                f"{path}: {name} is no part of a LoRA as peft, diffusers or kohya write it"
            )
        module = module.replace(".processor.", ".")
        module = f"{module}.0" if module.endswith(".to_out") else module
        parts.setdefault(module, {})[part] = tensor
    return parts


def _kohya_parts(
    path: Path, tensors: Mapping[str, Tensor], modules: Iterable[str]
) -> dict[str, dict[str, Tensor]]:
    known = modules_by_name(modules)
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        _refuse_text_encoder(path, name)
        layer, part = _split(path, name, _KOHYA)
        if part == "full" or not layer.startswith(PREFIX):
            raise CheckpointError(f"{path}: {name} is of a kind that cannot be read here")
        if layer not in known:
            raise CheckpointError(
                f"{path}: {layer} fits 0 tensors of the base; the adapter belongs to another model"
            )
        parts.setdefault(known[layer], {})[part] = tensor
    return parts


def _denoiser_key(name: str) -> str:
    for prefix in _DENOISERS:
        name = name.removeprefix(prefix)
    return name


def _refuse_text_encoder(path: Path, name: str) -> None:
    if name.startswith(("text_encoder", "lora_te")):
        raise CheckpointError(
            f"{path}: {name} changes a text encoder; only changes of the denoiser can be read here"
        )


def _split(path: Path, name: str, endings: Mapping[str, str]) -> tuple[str, str]:
    """Module and part of a tensor in a file."""
    for ending, part in endings.items():
        if name.endswith(ending):
            return name.removesuffix(ending), part
    if ".lora_" in name:
        raise UnfitError(f"{path}: {name} is a part of a LoRA that is not known here")
    return name, "full"  # a module saved whole (modules_to_save)
