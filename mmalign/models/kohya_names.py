"""What kohya's trainer and ComfyUI call the layers of a denoiser in a LoRA file.

SD 1.5 and 2: `lora_unet_` and diffusers' own name with underscores. SDXL: the name that the layer
has in Stability's code (input_blocks, middle_block, output_blocks), with underscores too. ComfyUI
knows both for either model; kohya's own trainer knows the one that fits the model. SD3: Stability's
names, whose q, k and v are one layer.

Source: kohya-ss/sd-scripts `networks/lora.py`, `networks/sdxl_merge_lora.py`,
    `networks/lora_sd3.py` (what is written and read), comfyanonymous/ComfyUI `comfy/lora.py`,
    `comfy/utils.py` (what is read).
Departs: nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

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
    return PREFIX + _stability_name(module, layers_per_block).replace(".", "_")


def sd3_place(module: str, num_layers: int) -> Place:
    """Where a layer of SD3 lies in a file, given diffusers' name.

    Args:
        module: e.g. transformer_blocks.0.attn.to_q.
        num_layers: Blocks of the transformer; the last one's context is modulated like the output,
            with scale before shift in diffusers and behind it in the file.
    """
    match = _SD3_BLOCK.fullmatch(module)
    if match is None:
        name = _SD3_OUTSIDE.get(module, module)
        return Place(_flat(name), (module,), swapped=module == "norm_out.linear")
    start, rest = f"transformer_blocks.{match[1]}.", match[2]
    for name, layers in _FUSED.items():
        if rest in layers:
            whole = tuple(start + layer for layer in layers)
            return Place(_flat(f"joint_blocks.{match[1]}.{name}"), whole)
    swapped = rest == "norm1_context.linear" and int(match[1]) == num_layers - 1
    name = f"joint_blocks.{match[1]}.{_IN_SD3_BLOCK.get(rest, rest)}"
    return Place(_flat(name), (module,), swapped)


def place_of(module: str, family: str, layers: int) -> Place:
    """Where a layer lies in a file.

    Args:
        module: Its name in diffusers.
        family: sd, sdxl or sd3.
        layers: `layers_per_block` of SDXL's U-Net, `num_layers` of SD3's transformer.
    """
    if family == "sd3":
        return sd3_place(module, layers)
    name = sdxl_name(module, layers) if family == "sdxl" else sd_name(module)
    return Place(name, (module,))


def is_known(module: str, family: str) -> bool:
    """Whether ComfyUI has a name for a layer; there are others in models of other builds."""
    if family != "sd3":
        return module in _OUTSIDE or kohya_reads(module, family)
    match = _SD3_BLOCK.fullmatch(module)
    inside = {*_IN_SD3_BLOCK, *(layer for layers in _FUSED.values() for layer in layers)}
    return match[2] in inside if match else module in _SD3_OUTSIDE


def kohya_reads(module: str, family: str) -> bool:
    """Whether kohya's own reader applies a layer; others it passes over without a word.

    In U-Nets it looks inside transformers, residual blocks and changes of size only.
    """
    return family == "sd3" or bool(_BLOCK.fullmatch(module) or _MIDDLE.fullmatch(module))


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
    kinds: tuple[Callable[[str], str], ...] = (sd_name, lambda name: sdxl_name(name, layers))
    return {
        kind(module): Place(kind(module), (module,))
        for kind in reversed(kinds)
        for module in modules
    }


def _flat(name: str) -> str:
    return PREFIX + name.replace(".", "_")


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
