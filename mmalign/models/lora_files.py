"""LoRA files of peft, diffusers and kohya, read into one form."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mmalign.errors import CheckpointError
from mmalign.models.adapter_settings import check_settings, needs_model, read_settings
from mmalign.models.files import (
    ADAPTER_CONFIG,
    UnfitError,
    denoiser_folder,
    read_tensors,
    weight_files,
)
from mmalign.models.kohya_names import PREFIX, places_by_name
from mmalign.models.lora_checks import check_factors
from mmalign.models.lora_encoders import layers_by_name, left_out_of, part_of, without_part

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from torch import Tensor

Encoders = Literal["stop", "ignore", "apply"]
"""What happens to changes of text encoders beside those of the denoiser: refused, left out with a
count, or left to the caller."""

log = logging.getLogger(__name__)

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
    ".lora_linear_layer.down.weight": "A",  # of text encoders, before diffusers 0.26
    ".lora_linear_layer.up.weight": "B",
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


def read_lora(
    path: Path, modules: Iterable[str], *, part: str = "", encoders: Encoders = "stop"
) -> LoraWeights:
    """Read a LoRA.

    Args:
        path: A safetensors file in the layout of diffusers or kohya, or a folder with one or with
            an adapter of peft.
        modules: Names of the layers of the model that it is for; kohya's names say less than they.
        part: What of a pipeline to read the changes of: "text_encoder", ...; "": the denoiser.
        encoders: With the denoiser: what happens to changes of text encoders.

    Raises:
        CheckpointError: A kind of file, or of tensor in it, that is not known here.
    """
    weights = _read_any(path, modules, part, encoders)
    check_factors(weights)
    return weights


def encoders_in(path: Path) -> tuple[str, ...]:
    """The text encoders that a LoRA file changes, in order."""
    if (path / ADAPTER_CONFIG).is_file():
        return ()
    tensors, _ = read_tensors(path if path.is_file() else path / DIFFUSERS_LORA)
    return tuple(sorted({part_of(name) for name in tensors} - {""}))


def _read_any(path: Path, modules: Iterable[str], part: str, encoders: Encoders) -> LoraWeights:
    if (path / ADAPTER_CONFIG).is_file():
        return _read_peft(path)
    file = path if path.is_file() else path / DIFFUSERS_LORA
    everything, metadata = read_tensors(file)
    tensors = {name: tensor for name, tensor in everything.items() if part_of(name) == part}
    if not part:
        _look_at_encoders(path, [name for name in everything if name not in tensors], encoders)
    if all(name.startswith("lora_") for name in tensors):
        return LoraWeights(path, {}, _kohya_parts(path, tensors, modules, part))
    settings = _diffusers_settings(path, metadata, part)
    return LoraWeights(path, settings, _diffusers_parts(path, tensors, part))


def _look_at_encoders(path: Path, names: list[str], encoders: Encoders) -> None:
    """Refuse changes of text encoders, or say what of them is left out."""
    if not names or encoders == "apply":
        return
    if encoders == "ignore":
        log.warning("%s: %s", path, left_out_of(names))
        return
    raise CheckpointError(
        f"{path}: {names[0]} changes a text encoder ({len(names)} tensors do), and only the "
        "denoiser can be changed here. `mmalign merge BASE --add FILE=1 --text-encoders apply` "
        "puts both into a pipeline; `--text-encoders ignore`, or model.adapter_text_encoders: "
        "ignore, leaves the encoders as they are"
    )


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


def _diffusers_settings(path: Path, metadata: Mapping[str, str], part: str) -> dict[str, Any]:
    """What diffusers notes of peft's settings of one part of the pipeline."""
    try:
        noted = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except ValueError as error:
        raise CheckpointError(f"{path}: lora_adapter_metadata is no JSON: {error}") from error
    if not isinstance(noted, dict):
        raise CheckpointError(f"{path}: lora_adapter_metadata must hold an object, found {noted!r}")
    settings = {_key(k, part): v for k, v in noted.items() if part_of(k) == part}
    check_settings(path, settings)
    return settings


def _diffusers_parts(
    path: Path, tensors: Mapping[str, Tensor], part: str
) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, kind = _split(path, _key(name, part), _DIFFUSERS)
        if kind == "full":
            raise CheckpointError(
                f"{path}: {name} is no part of a LoRA as peft, diffusers or kohya write it"
            )
        module = module.replace(".processor.", ".")
        module = f"{module}.0" if module.endswith(".to_out") else module
        parts.setdefault(module, {})[kind] = tensor
    return parts


def _kohya_parts(
    path: Path, tensors: Mapping[str, Tensor], modules: Iterable[str], part: str
) -> dict[str, dict[str, Tensor]]:
    known = layers_by_name(part, modules) if part else places_by_name(modules)
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, kind = _split(path, name, _KOHYA)
        if name.endswith(".dora_scale"):
            raise CheckpointError(
                f"{path}: {name} is the scale of a DoRA, which programs read in different ways in "
                "this layout; give the same DoRA in the layout of diffusers"
            )
        if kind == "full" or not (part or layer.startswith(PREFIX)):
            raise CheckpointError(f"{path}: {name} is of a kind that cannot be read here")
        if layer not in known:
            raise CheckpointError(
                f"{path}: {layer} fits 0 tensors of the base; the adapter belongs to another model"
            )
        layers = known[layer].layers
        for index, module in enumerate(layers):
            rows = tensor
            if kind == "B":  # of layers that are one in the file, each has its own outputs
                rows = known[layer].turned(tensor.tensor_split(len(layers))[index])
            parts.setdefault(module, {})[kind] = rows
    return parts


def _key(name: str, part: str) -> str:
    if part:
        return without_part(name, part)
    for prefix in _DENOISERS:
        name = name.removeprefix(prefix)
    return name


def _split(path: Path, name: str, endings: Mapping[str, str]) -> tuple[str, str]:
    """Module and part of a tensor in a file."""
    for ending, part in endings.items():
        if name.endswith(ending):
            return name.removesuffix(ending), part
    if ".lora_" in name:
        raise UnfitError(f"{path}: {name} is a part of a LoRA that is not known here")
    return name, "full"  # a module saved whole (modules_to_save)
