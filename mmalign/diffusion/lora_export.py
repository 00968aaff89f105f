"""A trained LoRA as files, and who reads each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel

from mmalign.diffusion.kohya import diffusers_reads, kohya_metadata, kohya_tensors
from mmalign.diffusion.process import process_from
from mmalign.models.files import save_tensors
from mmalign.models.lora_files import DIFFUSERS_LORA, LoraWeights, is_known, kohya_reads
from mmalign.models.lora_load import TRAINED

if TYPE_CHECKING:
    from torch import Tensor

    from mmalign.config import RunConfig
    from mmalign.diffusion.models import Components

KOHYA_LORA = "mmalign_kohya.safetensors"
"""The same LoRA as `pytorch_lora_weights.safetensors`, with the names of kohya and ComfyUI."""

COMFYUI_LORA = "mmalign_comfyui.safetensors"
"""The same in that layout where kohya's own reader would pass over a part of it."""

_WIDE = (".alpha", ".dora_scale", ".lora_magnitude_vector")  # half of a magnitude's digits are lost
_NAMED = 3


def write_lora(
    policy: PeftModel, components: Components, folder: Path, config: RunConfig
) -> tuple[dict[str, str], list[str]]:
    """Write the files of a LoRA.

    Returns:
        Each file's name with who reads it; and a sentence for each file that is not written.
    """
    lora = lora_of(policy)
    dtype: torch.dtype | None = getattr(torch, config.export.dtype or "", None)
    notes: list[str] = []
    write(_for_diffusers(policy, lora, components), folder / DIFFUSERS_LORA, dtype, notes)
    readers = {DIFFUSERS_LORA: "diffusers (`pipeline.load_lora_weights`), mmalign"}
    unknown = [module for module in lora.parts if not is_known(module, components.family)]
    layers = _layers(components)
    if unknown or layers is None:
        why = f"ComfyUI has no name for {_few(unknown)}" if unknown else "its blocks differ in size"
        return readers, [f"{KOHYA_LORA} is not written: {why}; use {DIFFUSERS_LORA}", *notes]
    lacks = _what_kohya_lacks(lora, components.family)
    name = COMFYUI_LORA if lacks else KOHYA_LORA
    if lacks:
        notes.append(f"{KOHYA_LORA} is not written: {lacks}; ComfyUI reads {COMFYUI_LORA}")
    tensors = kohya_tensors(
        lora, components.family, layers, lambda module: _weight_of(policy, module)
    )
    metadata = _kohya_metadata(policy, components, config, for_kohya=not lacks)
    write((tensors, metadata), folder / name, dtype, notes)
    readers[name] = "ComfyUI" if lacks else "ComfyUI, kohya's sd-scripts"
    if diffusers_reads(tensors, list(lora.parts), components.family, layers):
        readers[name] += ", diffusers"
    return readers, notes


def lora_of(policy: PeftModel) -> LoraWeights:
    """The trained factors, by name of the layer in the base; alpha beside them."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, module in policy.get_base_model().named_modules():
        layer: Any = module
        if TRAINED not in getattr(layer, "lora_A", {}):
            continue
        down, up = layer.lora_A[TRAINED].weight, layer.lora_B[TRAINED].weight
        alpha = torch.tensor(layer.scaling[TRAINED] * len(down), dtype=torch.float64)
        own = {"A": down, "B": up, "alpha": alpha}
        if TRAINED in (getattr(layer, "lora_magnitude_vector", None) or {}):
            own["magnitude"] = layer.lora_magnitude_vector[TRAINED].weight
        parts[name] = {part: tensor.detach() for part, tensor in own.items()}
    return LoraWeights(Path("the policy"), {}, parts)


def write(
    content: tuple[dict[str, Tensor], dict[str, str]],
    file: Path,
    dtype: torch.dtype | None,
    notes: list[str],
) -> None:
    """Write tensors and header in a dtype; as they are, with a note, where it is too small."""
    tensors, metadata = content
    ready = {name: _cast(name, tensor, dtype) for name, tensor in tensors.items()}
    if dtype and not all(bool(tensor.isfinite().all()) for tensor in ready.values()):
        notes.append(f"{file.name} keeps its dtype: its numbers are too large for {dtype}")
        ready = tensors
    save_tensors(ready, file, metadata)


def times(tensor: Tensor, factor: float) -> Tensor:
    """The product, rounded once, in the tensor's dtype."""
    return (tensor.double() * factor).to(tensor.dtype)


def part_of(family: str) -> str:
    """The folder of a family's denoiser in a pipeline."""
    return "transformer" if family == "sd3" else "unet"


def _for_diffusers(
    policy: PeftModel, lora: LoraWeights, components: Components
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header; B is multiplied by the scale, which some readers do not know."""
    tensors: dict[str, Tensor] = {}
    for name, parts in lora.parts.items():
        key = f"{part_of(components.family)}.{name}"
        tensors[f"{key}.lora_A.weight"] = parts["A"]
        tensors[f"{key}.lora_B.weight"] = times(parts["B"], lora.scale(name))
        if "magnitude" in parts:
            tensors[f"{key}.lora_magnitude_vector"] = parts["magnitude"]
    spec: Any = policy.peft_config[TRAINED]
    record = {"rank": spec.r, "alpha": spec.lora_alpha, "scale_in_B": True}  # for people
    return tensors, {"format": "pt", "mmalign": json.dumps(record)}


def _what_kohya_lacks(lora: LoraWeights, family: str) -> str | None:
    """What kohya's own reader would lose of a file, in words."""
    if any("magnitude" in parts for parts in lora.parts.values()):
        return "kohya's sd-scripts know no DoRA and would leave its magnitudes out"
    lost = [module for module in lora.parts if not kohya_reads(module, family)]
    if not lost:
        return None
    return f"kohya's reader passes over {len(lost)} of {len(lora.parts)} layers ({_few(lost)})"


def _layers(components: Components) -> int | None:
    """What the names of layers depend on; None where one number does not say it."""
    key = "num_layers" if components.family == "sd3" else "layers_per_block"
    found = components.denoiser_config.get(key, 2)
    if isinstance(found, int):
        return found
    same = {int(number) for number in found}
    return same.pop() if len(same) == 1 else (None if components.family == "sdxl" else 0)


def _weight_of(policy: PeftModel, module: str) -> Tensor:
    layer: Any = policy.get_base_model().get_submodule(module)
    return getattr(layer, "base_layer", layer).weight.detach()


def _kohya_metadata(
    policy: PeftModel, components: Components, config: RunConfig, *, for_kohya: bool
) -> dict[str, str]:
    spec: Any = policy.peft_config[TRAINED]
    process = process_from(components.scheduler_config, config.diffusion.prediction)
    return kohya_metadata(
        config,
        components.family,
        rank=spec.r,
        alpha=spec.lora_alpha,
        prediction=process.prediction,
        text_width=components.denoiser_config.get("cross_attention_dim"),
        for_kohya=for_kohya,
    )


def _cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None:
        return tensor
    cast = tensor.to(dtype)
    loses = name.endswith(_WIDE) and not torch.equal(cast.to(tensor.dtype), tensor)
    return tensor if loses else cast


def _few(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
