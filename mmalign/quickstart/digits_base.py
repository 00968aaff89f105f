"""A diffusion model of handwritten digits, trained on the spot: about a minute on one core.

What comes of it is an ordinary pipeline folder of diffusers without a VAE, so nothing after this
module knows that the model is small.
"""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import mse_loss

from mmalign.models.files import usual_mode
from mmalign.quickstart.digits import NAMES, SIDE, STYLES, load, prompt

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from mmalign.quickstart.digits import Digits

NUM_STEPS = 700
_BATCH, _LR, _WARMUP = 64, 2e-3, 20
_NO_STYLE, _EMPTY = 1 / 3, 1 / 10  # shares of captions without a style word, and without any
_WIDTH, _LENGTH = 64, 8  # of the text encoder; tokens of a caption, both ends included
_START, _END, _UNKNOWN = "<|startoftext|>", "<|endoftext|>", "<|unknown|>"


def make(folder: Path, seed: int, num_steps: int = NUM_STEPS) -> Path:
    """Train a base model and write it as a pipeline folder.

    Args:
        folder: Where to write.
        seed: Decides the start, the order of the pictures, the captions and the noise.
        num_steps: Fewer for a smoke run.
    """
    torch.manual_seed(seed)
    tokenizer, encoder, unet, scheduler = _tokenizer(), _text_encoder(), _unet(), _scheduler()
    pair = _train(nn.ModuleDict({"unet": unet, "text": encoder}), tokenizer, seed, num_steps)
    pair["unet"].save_pretrained(folder / "unet")  # type: ignore[operator]
    pair["text"].save_pretrained(folder / "text_encoder")  # type: ignore[operator]
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
    return folder


def _train(networks: nn.ModuleDict, tokenizer: Any, seed: int, num_steps: int) -> nn.ModuleDict:
    """Both networks learn together to find the noise; returns their averages over the steps."""
    digits = load()
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
        ids = _ids(tokenizer, _captions(digits, rows, random))
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
    return average.eval()


def _captions(digits: Digits, rows: NDArray[np.int64], random: np.random.Generator) -> list[str]:
    """A caption for each picture: with its style, without, or empty (for guidance)."""
    found: list[str] = []
    for row, plain, empty in zip(
        rows, random.random(len(rows)) < _NO_STYLE, random.random(len(rows)) < _EMPTY, strict=True
    ):
        style = "" if plain else STYLES[digits.styles[row]]
        found.append("" if empty else prompt(int(digits.digits[row]), style))
    return found


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


def _text_encoder() -> Any:  # 0.07 M parameters
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


def _unet() -> Any:  # 1.00 M parameters
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
