"""The diffusion model that `mmalign quickstart diffusion` ships: made of real handwritten digits.

A U-Net of a million parameters and a text encoder of 70,000 learn 1,797 images of 8 x 8 pixels in
700 steps: about a minute on one core. The weights are stored in float16. What comes of it is an
ordinary pipeline folder of diffusers, without a VAE.

    python benchmarks/quickstart_digits_base.py --output mmalign/quickstart/digits_model
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import mse_loss

from mmalign.models.files import usual_mode
from mmalign.quickstart.digits import NAMES, SIDE, Digits, ink, load, prompt

NUM_STEPS = 700
STYLES = ("light", "medium", "bold")  # thirds of the ink among the real images of a digit
_BATCH, _LR, _WARMUP = 64, 2e-3, 20
_NO_STYLE, _EMPTY = 1 / 3, 1 / 10  # shares of captions without a style word, and without any
_WIDTH, _LENGTH = 64, 8  # of the text encoder; tokens of a caption, both ends included
_START, _END, _UNKNOWN = "<|startoftext|>", "<|endoftext|>", "<|unknown|>"


def make(folder: Path, seed: int = 0, num_steps: int = NUM_STEPS) -> None:
    """Train a model and write it as a pipeline folder.

    Args:
        folder: Where to write.
        seed: Decides the start, the order of the images, the captions and the noise.
        num_steps: Fewer for a smoke run.
    """
    torch.manual_seed(seed)
    tokenizer, encoder, unet, scheduler = _tokenizer(), _text_encoder(), _unet(), _scheduler()
    pair: Any = _train(nn.ModuleDict({"unet": unet, "text": encoder}), tokenizer, seed, num_steps)
    pair["unet"].half().save_pretrained(folder / "unet")
    pair["text"].half().save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    scheduler.save_pretrained(folder / "scheduler")
    usual_mode(folder)
    index = {
        "_class_name": "StableDiffusionPipeline",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": [None, None],  # it paints pixels
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def styles_of(digits: Digits) -> NDArray[np.int64]:
    """Index in STYLES of each image, [N]: the third of its ink among those of the same digit."""
    styles = np.zeros(len(digits.digits), np.int64)
    amount = ink(digits.pixels)
    for digit in range(len(NAMES)):
        own = np.flatnonzero(digits.digits == digit)
        rank = amount[own].argsort(kind="stable").argsort(kind="stable")
        styles[own] = rank * len(STYLES) // len(own)
    return styles


def _train(networks: nn.ModuleDict, tokenizer: Any, seed: int, num_steps: int) -> nn.ModuleDict:
    """Both networks learn together to find the noise; returns their averages over the steps."""
    digits = load()
    styles = styles_of(digits)
    random = np.random.default_rng(seed)
    scheduler = _scheduler()
    clean = torch.from_numpy(digits.pixels * 2 - 1)[:, None]
    average = deepcopy(networks).requires_grad_(False)
    optimizer = torch.optim.AdamW(networks.parameters(), lr=_LR, fused=True)
    order = np.empty(0, np.int64)
    networks.train()
    for step in range(num_steps):
        if len(order) < _BATCH:
            order = np.concatenate([order, random.permutation(len(clean))])
        rows, order = order[:_BATCH], order[_BATCH:]
        ids = _ids(tokenizer, _captions(digits.digits[rows], styles[rows], random))
        x0 = clean[torch.from_numpy(rows)]
        noise = torch.randn_like(x0)
        t = torch.randint(0, scheduler.config.num_train_timesteps, (len(x0),))
        told = networks["text"](input_ids=ids).last_hidden_state
        x_t = scheduler.add_noise(x0, noise, t)
        loss = mse_loss(networks["unet"](x_t, t, encoder_hidden_states=told).sample, noise)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = _LR * min((step + 1) / _WARMUP, 1 - step / num_steps)
        nn.utils.clip_grad_norm_(networks.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        kept = min(0.99, (1 + step) / (10 + step))
        with torch.no_grad():
            for mean, new in zip(average.parameters(), networks.parameters(), strict=True):
                mean.lerp_(new, 1 - kept)
        if step % 50 == 0:
            print(f"step {step} of {num_steps}", flush=True)
    return average.eval()


def _captions(
    digits: NDArray[np.int64], styles: NDArray[np.int64], random: np.random.Generator
) -> list[str]:
    """A caption for each image: with its style, without, or empty (for guidance)."""
    plain, empty = random.random(len(digits)) < _NO_STYLE, random.random(len(digits)) < _EMPTY
    return [
        "" if empty[i] else prompt(int(digits[i]), "" if plain[i] else STYLES[styles[i]])
        for i in range(len(digits))
    ]


def _ids(tokenizer: Any, captions: Sequence[str]) -> torch.Tensor:  # [N, 8]
    return tokenizer(
        list(captions),
        padding="max_length",
        max_length=_LENGTH,
        truncation=True,
        return_tensors="pt",
    ).input_ids


def _tokenizer() -> Any:
    """Eighteen tokens: whole words, two ends, and one for everything else."""
    from transformers import AddedToken, CLIPTokenizer

    tokenizer = CLIPTokenizer(
        vocab={_START: 0, _END: 1, _UNKNOWN: 2},
        merges=[],
        unk_token=_UNKNOWN,
        model_max_length=_LENGTH,
    )
    # Whole words, so that no merges are needed to build them from letters.
    words = ("a", "handwritten", *STYLES, *NAMES)
    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=True) for word in words])
    return tokenizer


def _text_encoder() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=3 + 2 + len(STYLES) + len(NAMES),
        hidden_size=_WIDTH,
        intermediate_size=2 * _WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=_LENGTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return CLIPTextModel(config)


def _unet() -> Any:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=SIDE,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=_WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def _scheduler() -> Any:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    return DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="a new pipeline folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    make(given.output, given.seed, given.steps)


if __name__ == "__main__":
    main()
