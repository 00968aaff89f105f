"""A trained LoRA in the layout of kohya's trainer, which ComfyUI and other programs read."""

from __future__ import annotations

from datetime import UTC, datetime
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from mmalign import __version__
from mmalign.models.kohya_names import sd_name, sdxl_name

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from mmalign.config import RunConfig

_VERSIONS = {"sd": "sd_v1", "sdxl": "sdxl_base_v1-0"}
_ARCHITECTURES = {"sd": "stable-diffusion-v1", "sdxl": "stable-diffusion-xl-v1-base"}
_IMPLEMENTATIONS = {
    "sd": "diffusers",
    "sdxl": "https://github.com/Stability-AI/generative-models",
}
_SD2_WIDTH = 1024  # of the text encoder's output; 768 in SD 1


def kohya_tensors(
    factors: Mapping[str, Mapping[str, Tensor]], family: str, layers_per_block: int
) -> dict[str, Tensor]:
    """The tensors of the file.

    Args:
        factors: By diffusers' name of a layer: A [r, in], B [out, r] and alpha, a scalar.
        family: sd or sdxl; they name layers in different ways.
        layers_per_block: Of the U-Net's config.
    """
    tensors: dict[str, Tensor] = {}
    for module, parts in factors.items():
        name = sdxl_name(module, layers_per_block) if family == "sdxl" else sd_name(module)
        tensors[f"{name}.lora_down.weight"] = parts["A"]
        tensors[f"{name}.lora_up.weight"] = parts["B"]
        tensors[f"{name}.alpha"] = parts["alpha"].to(parts["A"].dtype)
    return tensors


def kohya_metadata(
    config: RunConfig,
    family: str,
    *,
    rank: int,
    alpha: float,
    prediction: str,
    text_width: int | None = None,
) -> dict[str, str]:
    """The header that programs show to who picks a file: all values are text.

    Args:
        config: The run.
        family: sd or sdxl.
        rank: The LoRA's.
        alpha: Its numerator: the scale is alpha / rank.
        prediction: What the network predicts.
        text_width: Width of the prompt embeddings; tells SD 2 from SD 1.
    """
    version, architecture = _VERSIONS[family], _ARCHITECTURES[family]
    is_v2 = family == "sd" and text_width == _SD2_WIDTH
    has_velocity = prediction == "v_prediction"
    if is_v2:
        version = "sd_v2_v" if has_velocity else "sd_v2"
        architecture = "stable-diffusion-v2-768-v" if has_velocity else "stable-diffusion-v2-512"
    spec, resolution = config.objective, config.diffusion.resolution
    objective = spec.name or " + ".join(spec.mix or {})
    return {
        "format": "pt",
        "ss_base_model_version": version,
        "ss_v2": str(is_v2),
        "ss_network_module": "networks.lora",
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
        "modelspec.prediction_type": "v" if has_velocity else "epsilon",
    }


def readable(
    tensors: Mapping[str, Tensor], modules: Sequence[str], family: str, layers_per_block: int
) -> bool:
    """Whether diffusers finds just these layers in a file of kohya's layout."""
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
