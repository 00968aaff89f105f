"""What kohya's trainer, and so ComfyUI, calls the layers of a U-Net in a LoRA file.

SD 1.5 and 2: `lora_unet_` and diffusers' own name with underscores. SDXL: the name that the layer
has in Stability's code (input_blocks, middle_block, output_blocks), with underscores too. ComfyUI
knows both for either model; kohya's own trainer knows the one that fits the model.

Source: kohya-ss/sd-scripts `networks/lora.py` and `networks/sdxl_merge_lora.py` (what is written),
    comfyanonymous/ComfyUI `comfy/lora.py` (what is read).
Departs: nothing.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

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


def layers_of(modules: Iterable[str]) -> int:
    """`layers_per_block` of the U-Net that has these layers."""
    found = [re.match(r"down_blocks\.0\.resnets\.(\d+)\.", module) for module in modules]
    return 1 + max((int(match[1]) for match in found if match), default=1)


def modules_by_name(modules: Iterable[str]) -> dict[str, str]:
    """kohya's names, of both kinds, to diffusers' names of a U-Net's layers."""
    modules = list(modules)
    layers = layers_of(modules)
    kinds: tuple[Callable[[str], str], ...] = (sd_name, lambda name: sdxl_name(name, layers))
    return {kind(module): module for kind in reversed(kinds) for module in modules}


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
