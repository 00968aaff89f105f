"""kohya's names of layers: those that published SDXL LoRAs have, and back."""

from __future__ import annotations

import pytest

from mmalign.models.lora_files import (
    in_sd3_file,
    in_unet_block,
    in_unet_file,
    layers_of,
    places_by_name,
    sd3_place,
    sd_name,
    sdxl_name,
)

SDXL = {
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    ),
    "down_blocks.2.attentions.1.proj_in": "lora_unet_input_blocks_8_1_proj_in",
    "mid_block.attentions.0.transformer_blocks.9.attn2.to_out.0": (
        "lora_unet_middle_block_1_transformer_blocks_9_attn2_to_out_0"
    ),
    "up_blocks.0.attentions.2.transformer_blocks.1.ff.net.0.proj": (
        "lora_unet_output_blocks_2_1_transformer_blocks_1_ff_net_0_proj"
    ),
    "up_blocks.1.attentions.0.proj_out": "lora_unet_output_blocks_3_1_proj_out",
    "down_blocks.0.resnets.1.conv1": "lora_unet_input_blocks_2_0_in_layers_2",
    "up_blocks.2.resnets.0.conv_shortcut": "lora_unet_output_blocks_6_0_skip_connection",
    "mid_block.resnets.1.time_emb_proj": "lora_unet_middle_block_2_emb_layers_1",
    "down_blocks.0.downsamplers.0.conv": "lora_unet_input_blocks_3_0_op",
    "up_blocks.1.upsamplers.0.conv": "lora_unet_output_blocks_5_2_conv",
    "time_embedding.linear_2": "lora_unet_time_embed_2",
    "add_embedding.linear_1": "lora_unet_label_emb_0_0",
    "conv_in": "lora_unet_input_blocks_0_0",
    "conv_out": "lora_unet_out_2",
}


@pytest.mark.parametrize("module", SDXL)
def test_sdxl_names(module: str) -> None:
    assert sdxl_name(module) == SDXL[module]


def test_sd_names_are_those_of_diffusers() -> None:
    module = "down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_out.0"
    expected = "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn2_to_out_0"
    assert sd_name(module) == expected


def test_names_lead_back_to_layers() -> None:
    """Also in a U-Net with one residual block a level, whose blocks are numbered otherwise."""
    known = places_by_name([*SDXL, "down_blocks.0.resnets.0.conv1"])
    for module, name in SDXL.items():
        assert known[name].layers == known[sd_name(module)].layers == (module,)
    small = ["down_blocks.0.resnets.0.conv1", "down_blocks.1.attentions.0.proj_in"]
    assert layers_of(small) == 1
    assert places_by_name(small)["lora_unet_input_blocks_3_1_proj_in"].layers == (small[1],)


def test_layers_of_sd3_share_a_place() -> None:
    """q, k and v are one layer there; the last context's modulation has its halves exchanged."""
    block = "transformer_blocks.1."
    whole = tuple(f"{block}attn.to_{part}" for part in "qkv")
    places = {sd3_place(module, 3) for module in whole}
    (place,) = places
    assert (place.name, place.layers) == ("lora_unet_joint_blocks_1_x_block_attn_qkv", whole)
    known = places_by_name([*whole, f"{block}ff_context.net.2", "proj_out"])
    assert known[place.name] == place
    assert known["lora_unet_joint_blocks_1_context_block_mlp_fc2"].layers == (
        f"{block}ff_context.net.2",
    )
    swapped = [sd3_place(f"transformer_blocks.{i}.norm1_context.linear", 3).swapped for i in (1, 2)]
    assert swapped == [False, True]
    assert sd3_place("norm_out.linear", 3).swapped


def test_what_kohya_passes_over() -> None:
    outside = [module for module in SDXL if not in_unet_block(module)]
    assert outside == ["time_embedding.linear_2", "add_embedding.linear_1", "conv_in", "conv_out"]
    assert all(in_unet_file(module) for module in SDXL)
    assert not in_unet_file("encoder_hid_proj")
    assert not in_sd3_file("transformer_blocks.0.attn.norm_q")
