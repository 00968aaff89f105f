"""kohya's names of layers: those that published SDXL LoRAs have, and back."""

from __future__ import annotations

import pytest

from mmalign.models.kohya_names import layers_of, modules_by_name, sd_name, sdxl_name

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
    known = modules_by_name([*SDXL, "down_blocks.0.resnets.0.conv1"])
    for module, name in SDXL.items():
        assert known[name] == known[sd_name(module)] == module
    small = ["down_blocks.0.resnets.0.conv1", "down_blocks.1.attentions.0.proj_in"]
    assert layers_of(small) == 1
    assert modules_by_name(small)["lora_unet_input_blocks_3_1_proj_in"] == small[1]
