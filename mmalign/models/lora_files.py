"""LoRA files of peft, diffusers and kohya, read into one form."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from torch import Tensor

from mmalign.errors import CheckpointError
from mmalign.models.files import (
    ADAPTER_CONFIG,
    UnfitError,
    denoiser_folder,
    read_tensors,
    weight_files,
)
from mmalign.models.lora_settings import check_settings, needs_model, read_settings

_PAIRS = (("A", "B"), ("embedding_A", "embedding_B"))  # B [out, r, ...] after A [r, in, ...]


def check_factors(weights: LoraWeights) -> None:
    """Refuse factors that cannot be multiplied.

    Raises:
        CheckpointError: Names the module.
    """
    for module, parts in weights.parts.items():
        for down, up in ((parts.get(a), parts.get(b)) for a, b in _PAIRS):
            if down is None or up is None:
                continue
            if (
                down.dim() < 2
                or up.dim() != down.dim()
                or not len(down)
                or up.shape[1] != len(down)
            ):
                raise CheckpointError(
                    f"{weights.path}: the factors of {module} are {list(down.shape)} and "
                    f"{list(up.shape)}, which have no product"
                )
        odd = [part for part, tensor in parts.items() if not tensor.is_floating_point()]
        if odd and "full" not in odd:
            raise CheckpointError(
                f"{weights.path}: {odd[0]} of {module} holds {parts[odd[0]].dtype}, not weights"
            )


def left_out(weights: LoraWeights, adapted: Collection[str], modules: Iterable[str]) -> list[str]:
    """Modules that the settings of an adapter name and its file has nothing for.

    Args:
        weights: An adapter in the layout of peft.
        adapted: Modules of the base that the file has tensors for.
        modules: All modules of the base that have a weight.
    """
    from peft.tuners.tuners_utils import check_target_module_exists

    names = (
        "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform",
        "layers_pattern",
    )  # fmt: skip
    told = {name: weights.settings.get(name) for name in names}
    asked = SimpleNamespace(**told, target_parameters=None)
    if not asked.target_modules:
        return []
    return [n for n in modules if n not in adapted and check_target_module_exists(asked, n) is True]


# What kohya's trainer and ComfyUI call the layers of a denoiser in a LoRA file.
#
# SD 1.5 and 2: `lora_unet_` and diffusers' own name with underscores. SDXL: the name that the layer
# has in Stability's code (input_blocks, middle_block, output_blocks), with underscores too. ComfyUI
# knows both for either model; kohya's own trainer knows the one that fits the model. SD3:
# Stability's names, whose q, k and v are one layer.
#
# Source: kohya-ss/sd-scripts `networks/lora.py`, `networks/sdxl_merge_lora.py`,
#     `networks/lora_sd3.py` (what is written and read), comfyanonymous/ComfyUI `comfy/lora.py`,
#     `comfy/utils.py` (what is read).
# Departs: nothing. diffusers' own converters are no substitute: they write SD 1.5's names for every
#     model and the rank as alpha, read no file of kohya's for SD3, and leave out DoRA's scales.

PREFIX = "lora_unet_"

_IN_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_BLOCK = re.compile(
    r"(down_blocks|up_blocks)\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
)
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")

_SD3_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.(.+)")
_IN_SD3_BLOCK = {
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
}
_SD3_OUTSIDE = {
    "context_embedder": "context_embedder",
    "pos_embed.proj": "x_embedder.proj",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
}
_FUSED = {  # one layer of Stability's: the three of diffusers, in the order of their outputs
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a layer of diffusers lies in a file.

    Attributes:
        name: Of the layer in the file.
        layers: All of diffusers that it holds, in the order of their outputs.
        swapped: Whether the halves of its outputs are exchanged: shift and scale.
    """

    name: str
    layers: tuple[str, ...]
    swapped: bool = False

    def turned(self, outputs: Tensor) -> Tensor:
        """Outputs in diffusers' order, [out, ...], in the file's, or back."""
        return outputs.roll(len(outputs) // 2, 0) if self.swapped else outputs


def sd_name(module: str) -> str:
    """kohya's name of a layer of SD 1.5 or 2, given diffusers' name."""
    return PREFIX + module.replace(".", "_")


def sdxl_name(module: str, layers_per_block: int = 2) -> str:
    """kohya's name of a layer of SDXL, given diffusers' name.

    Args:
        module: e.g. down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.
        layers_per_block: Residual blocks of a down block; up blocks have one more.
    """
    return sd_name(_stability_name(module, layers_per_block))


def sd3_place(module: str, num_layers: int) -> Place:
    """Where a layer of SD3 lies in a file, given diffusers' name.

    Args:
        module: e.g. transformer_blocks.0.attn.to_q.
        num_layers: Blocks of the transformer; the last one's context is modulated like the output,
            with scale before shift in diffusers and behind it in the file.
    """
    match = _SD3_BLOCK.fullmatch(module)
    if match is None:
        name = sd_name(_SD3_OUTSIDE.get(module, module))
        return Place(name, (module,), swapped=module == "norm_out.linear")
    start, rest = f"transformer_blocks.{match[1]}.", match[2]
    for name, layers in _FUSED.items():
        if rest in layers:
            whole = tuple(start + layer for layer in layers)
            return Place(sd_name(f"joint_blocks.{match[1]}.{name}"), whole)
    swapped = rest == "norm1_context.linear" and int(match[1]) == num_layers - 1
    name = f"joint_blocks.{match[1]}.{_IN_SD3_BLOCK.get(rest, rest)}"
    return Place(sd_name(name), (module,), swapped)


def in_unet_block(module: str) -> bool:
    """Whether a layer of a U-Net is inside a transformer, residual block or change of size.

    kohya's own reader applies those; others it passes over without a word.
    """
    return bool(_BLOCK.fullmatch(module) or _MIDDLE.fullmatch(module))


def in_unet_file(module: str) -> bool:
    """Whether ComfyUI has a name for a U-Net's layer; models of other builds have more."""
    return module in _OUTSIDE or in_unet_block(module)


def in_sd3_file(module: str) -> bool:
    """The same of a layer of SD3."""
    match = _SD3_BLOCK.fullmatch(module)
    inside = {*_IN_SD3_BLOCK, *(layer for layers in _FUSED.values() for layer in layers)}
    return match[2] in inside if match else module in _SD3_OUTSIDE


def layers_of(modules: Iterable[str]) -> int:
    """`layers_per_block` of the U-Net that has these layers."""
    found = [re.match(r"down_blocks\.0\.resnets\.(\d+)\.", module) for module in modules]
    return 1 + max((int(match[1]) for match in found if match), default=1)


def places_by_name(modules: Iterable[str]) -> dict[str, Place]:
    """kohya's names, of every kind, to the layers of a denoiser that they hold."""
    modules = list(modules)
    blocks = [int(match[1]) + 1 for m in modules if (match := _SD3_BLOCK.match(m))]
    if blocks:
        places = (sd3_place(module, max(blocks)) for module in modules)
        return {place.name: place for place in places}
    layers = layers_of(modules)
    names = [(sdxl_name(module, layers), module) for module in modules]
    names += [(sd_name(module), module) for module in modules]
    return {name: Place(name, (module,)) for name, module in names}


def _stability_name(module: str, layers: int) -> str:
    if match := _BLOCK.fullmatch(module):
        side, kind, rest = match[1], match[3], match[5]
        block, layer = int(match[2]), int(match[4])
        if kind == "downsamplers":
            return f"input_blocks.{(layers + 1) * (block + 1)}.0.{rest.replace('conv', 'op')}"
        if kind == "upsamplers":  # behind a resnet and an attention, as in all blocks that have one
            return f"output_blocks.{(layers + 1) * block + layers}.2.{rest}"
        place = 1 if kind == "attentions" else 0
        rest = rest if place else _IN_RESNET.get(rest, rest)
        if side == "down_blocks":
            return f"input_blocks.{(layers + 1) * block + layer + 1}.{place}.{rest}"
        return f"output_blocks.{(layers + 1) * block + layer}.{place}.{rest}"
    if match := _MIDDLE.fullmatch(module):
        kind, layer, rest = match[1], int(match[2]), match[3]
        if kind == "attentions":
            return f"middle_block.{2 * layer + 1}.{rest}"
        return f"middle_block.{2 * layer}.{_IN_RESNET.get(rest, rest)}"
    return _OUTSIDE.get(module, module)


_KOHYA_ENCODERS = {
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
}
_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
_BODY = "text_model."  # CLIP's, which some versions of transformers write and others do not


def part_of(name: str) -> str:
    """The text encoder that a tensor changes; "" for one of the denoiser."""
    for prefix, part in _KOHYA_ENCODERS.items():
        if name.startswith(prefix):
            return part
    return next((part for part in _ENCODERS if name.startswith(f"{part}.")), "")


def layers_by_name(part: str, modules: Iterable[str]) -> dict[str, Place]:
    """kohya's names of an encoder's layers, each with the layer as the encoder's files have it."""
    found: dict[str, Place] = {}
    prefixes = [prefix for prefix, owner in _KOHYA_ENCODERS.items() if owner == part]
    for module in modules:
        inner = module.removeprefix(_BODY)
        for prefix in prefixes:
            for name in (module, inner, f"{_BODY}{inner}"):
                key = prefix + name.replace(".", "_")
                found.setdefault(key, Place(key, (module,)))
    return found


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
        counts = sorted(Counter(map(part_of, names)).items())
        told = ", ".join(f"{count} of {part}" for part, count in counts)
        log.warning(
            "%s: %d tensors that change text encoders are left out (%s)", path, len(names), told
        )
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
                f"{path}: {name} is not a part of a LoRA as peft, diffusers or kohya write it"
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
        return name.removeprefix(f"{part}.")
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
