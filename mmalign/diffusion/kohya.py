"""A trained LoRA or DoRA in the layout of kohya's trainer, which ComfyUI and others read."""

from __future__ import annotations

from datetime import UTC, datetime
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from mmalign import __version__
from mmalign.models.lora import comfyui_scale
from mmalign.models.lora_files import place_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from mmalign.config import RunConfig
    from mmalign.models.lora_files import LoraWeights, Place

_VERSIONS = {"sd": "sd_v1", "sdxl": "sdxl_base_v1-0", "sd3": "sd3"}
_ARCHITECTURES = {
    "sd": "stable-diffusion-v1",
    "sdxl": "stable-diffusion-xl-v1-base",
    "sd3": "stable-diffusion-3",
}
_IMPLEMENTATIONS = {
    "sd": "diffusers",
    "sdxl": "https://github.com/Stability-AI/generative-models",
    "sd3": "diffusers",
}
_MODULES = {"sd": "networks.lora", "sdxl": "networks.lora", "sd3": "networks.lora_sd3"}
_SD2_WIDTH = 1024  # of the text encoder's output; 768 in SD 1


def kohya_tensors(
    lora: LoraWeights, family: str, layers: int, weight_of: Callable[[str], Tensor]
) -> dict[str, Tensor]:
    """The tensors of the file; `dora_scale` is ComfyUI's.

    Args:
        lora: By diffusers' name of a layer: A [r, in], B [out, r], alpha, and a DoRA's magnitude.
        family: sd, sdxl or sd3; they name layers in different ways.
        layers: `layers_per_block` of the U-Net, `num_layers` of SD3's transformer.
        weight_of: The weight of a layer of the base, for a DoRA.
    """
    places = dict.fromkeys(place_of(module, family, layers) for module in lora.parts)
    tensors: dict[str, Tensor] = {}
    for place in places:
        tensors |= _factors(lora, place)
        if any("magnitude" in lora.parts.get(layer, {}) for layer in place.layers):
            tensors[f"{place.name}.dora_scale"] = _dora_scale(lora, place, weight_of)
    return tensors


def _factors(lora: LoraWeights, place: Place) -> dict[str, Tensor]:
    """Layers that are one in the file share its input: A below each other, B along a diagonal."""
    adapted = [layer for layer in place.layers if layer in lora.parts]
    down = torch.cat([lora.parts[layer]["A"] for layer in adapted])
    scale, (outputs, _, *rest) = lora.scale(adapted[0]), lora.parts[adapted[0]]["B"].shape
    up = down.new_zeros(len(place.layers) * outputs, len(down), *rest)
    column = 0
    for row, layer in enumerate(place.layers):
        if layer in lora.parts:
            own = lora.parts[layer]["B"].double() * (lora.scale(layer) / scale)
            columns = slice(column, column + own.shape[1])
            up[row * outputs : (row + 1) * outputs, columns] = own.to(up.dtype)
            column = columns.stop
    return {
        f"{place.name}.lora_down.weight": down,
        f"{place.name}.lora_up.weight": place.turned(up),
        f"{place.name}.alpha": torch.tensor(scale * len(down), dtype=torch.float32),
    }


def _dora_scale(
    lora: LoraWeights, place: Place, weight_of: Callable[[str], Tensor]
) -> Tensor:  # [out, 1], or [out, 1, 1, 1] of a convolution
    found: list[Tensor] = []
    for layer in place.layers:
        weight, parts = weight_of(layer), lora.parts.get(layer)
        if parts is None:  # stays as it is
            found.append(weight.double().flatten(1).norm(dim=1)[:, None])
            continue
        product = parts["B"].double().flatten(1) @ parts["A"].double().flatten(1)
        found.append(comfyui_scale(weight, lora.scale(layer) * product, parts["magnitude"]))
    return place.turned(torch.cat(found)).float()


def kohya_metadata(
    config: RunConfig,
    family: str,
    *,
    rank: int,
    alpha: float,
    prediction: str,
    text_width: int | None = None,
    for_kohya: bool = True,
) -> dict[str, str]:
    """The header that programs show to who picks a file: all values are text.

    Args:
        config: The run.
        family: sd, sdxl or sd3.
        rank: The LoRA's.
        alpha: Its numerator: the scale is alpha / rank.
        prediction: What the network predicts.
        text_width: Width of the prompt embeddings; tells SD 2 from SD 1.
        for_kohya: Whether kohya's trainer reads all of it, and so is told with what.
    """
    version, architecture = _VERSIONS[family], _ARCHITECTURES[family]
    is_v2 = family == "sd" and text_width == _SD2_WIDTH
    has_velocity = prediction == "v_prediction"
    if is_v2:
        version = "sd_v2_v" if has_velocity else "sd_v2"
        architecture = "stable-diffusion-v2-768-v" if has_velocity else "stable-diffusion-v2-512"
    spec, resolution = config.objective, config.diffusion.resolution
    objective = spec.name or " + ".join(spec.mix or {})
    told = {"modelspec.prediction_type": "v" if has_velocity else "epsilon"}
    return {
        "format": "pt",
        "ss_base_model_version": version,
        "ss_v2": str(is_v2),
        **({"ss_network_module": _MODULES[family]} if for_kohya else {}),
        "ss_network_dim": str(rank),
        "ss_network_alpha": f"{alpha:g}",
        "ss_sd_model_name": config.model.path,
        "ss_output_name": config.output.name,
        "ss_resolution": f"({resolution}, {resolution})",
        "ss_learning_rate": f"{config.train.lr:g}",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": _IMPLEMENTATIONS[family],
        "modelspec.title": f"{config.output.name} ({objective})",
        "modelspec.description": f"{objective} on {config.model.path}, mmalign {__version__}",
        "modelspec.date": datetime.now(UTC).isoformat(timespec="seconds"),
        "modelspec.resolution": f"{resolution}x{resolution}",
        **(told if prediction != "flow" else {}),
    }


def diffusers_reads(
    tensors: Mapping[str, Tensor], modules: Sequence[str], family: str, layers_per_block: int
) -> bool:
    """Whether diffusers finds just these layers in a file of kohya's layout, and no DoRA in it."""
    if family == "sd3" or any(name.endswith(".dora_scale") for name in tensors):
        return False
    from diffusers.loaders.lora_pipeline import (
        StableDiffusionLoraLoaderMixin,
        StableDiffusionXLLoraLoaderMixin,
    )
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    loader: Any = StableDiffusionLoraLoaderMixin
    if family == "sdxl":
        loader = StableDiffusionXLLoraLoaderMixin
    config = SimpleNamespace(layers_per_block=layers_per_block)
    try:
        found = loader.lora_state_dict(dict(tensors), unet_config=config)[0]
    except (ValueError, KeyError, IndexError):
        return False
    own = {name.removeprefix("unet.") for name in convert_unet_state_dict_to_peft(found)}
    return own == {f"{m}.lora_{f}.weight" for m in modules for f in ("A", "B")}
