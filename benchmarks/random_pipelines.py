"""Pipelines of SD 1.5's and SDXL's true architectures with random weights, and pairs for them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from pathlib import Path

BEGIN, END, VOCABULARY = "<|startoftext|>", "<|endoftext|>", 49408

SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
}
UNETS: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768},  # the rest are diffusers' defaults
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "cross_attention_dim": 2048,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
TINY_UNETS: dict[str, dict[str, Any]] = {
    "sd15": {"block_out_channels": (32, 32, 64, 64), "layers_per_block": 1},
    "sdxl": {
        "block_out_channels": (32, 32, 64),
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "transformer_layers_per_block": 1,
    },
}
VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
}
CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
CLIP_G: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}


def write_pipeline(
    folder: Path, model: str, dtype: torch.dtype, device: str, *, tiny: bool
) -> None:
    """A pipeline of the family `model`; tiny: with narrow layers, to try the program.

    Args:
        folder: Where it goes.
        model: "sd15" or "sdxl".
        dtype: Of the stored weights.
        device: Where weights are drawn.
        tiny: Keep the wiring, not the size.
    """
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    is_xl = model == "sdxl"
    unet, vae, clips = dict(UNETS[model]), dict(VAE), [dict(CLIP_L), dict(CLIP_G)]
    if tiny:
        narrow = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        clips = [{**clip, **narrow, "hidden_size": 32, "projection_dim": 32} for clip in clips]
        unet |= {**TINY_UNETS[model], "cross_attention_dim": 64 if is_xl else 32}
        vae |= {"block_out_channels": (32,) * 4, "layers_per_block": 1}
        if is_xl:
            unet["projection_class_embeddings_input_dim"] = 32 + 6 * 256
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 512, "eos_token_id": 513}
    settings = [CLIPTextConfig(**clip, **tokens, pad_token_id=513) for clip in clips]
    torch.manual_seed(0)
    with torch.device(device):
        parts: dict[str, Any] = {
            "unet": UNet2DConditionModel(**unet),
            "vae": AutoencoderKL(**vae, scaling_factor=0.13025 if is_xl else 0.18215),
            "text_encoder": CLIPTextModel(settings[0]),
        }
        if is_xl:
            parts["text_encoder_2"] = CLIPTextModelWithProjection(settings[1])
    index: dict[str, Any] = {"_class_name": f"StableDiffusion{'XL' if is_xl else ''}Pipeline"}
    for name, part in parts.items():
        part.to(dtype).save_pretrained(folder / name)
        library = "transformers" if name.startswith("text") else "diffusers"
        index[name] = [library, type(part).__name__]
    for name in ("tokenizer", "tokenizer_2") if is_xl else ("tokenizer",):
        _tokenizer().save_pretrained(folder / name)
        index[name] = ["transformers", "CLIPTokenizer"]
    DDPMScheduler(**SCHEDULE, prediction_type="epsilon").save_pretrained(folder / "scheduler")
    index["scheduler"] = ["diffusers", "DDPMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")


def write_pairs(folder: Path, num: int, resolution: int) -> Path:
    """Pairs of images of noise, each with a caption of its own; returns the file."""
    from PIL import Image

    rng = np.random.default_rng(0)
    rows: list[dict[str, str]] = []
    for i in range(num):
        row = {"id": f"row-{i}", "prompt": f"picture number {i} of a benchmark"}
        for side in ("chosen", "rejected"):
            pixels = rng.integers(0, 256, (resolution, resolution, 3), dtype=np.uint8)
            row[f"image_{side}"] = f"{i}-{side}.png"
            Image.fromarray(pixels).save(folder / row[f"image_{side}"])
        rows.append(row)
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def _tokenizer() -> Any:
    """CLIP's over single bytes."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), BEGIN, END]
    vocabulary: Any = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)
