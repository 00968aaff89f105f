"""Tiny autoencoders whose middle blocks pool over the whole picture, which diffusers lacks.

Three halvings, blocks of three convolutions in between. In the encoder's last stage and the
decoder's first a block adds a term before its convolutions:
x + conv1x1(relu(groupnorm(conv1x1(x, 4 width))), width), normed in 4 groups.

Source: madebyollin/taesd (taesd.py), the autoencoder of FLUX.2's latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mmalign.errors import ConfigError
from mmalign.models.files import weight_files

if TYPE_CHECKING:
    from torch import Tensor

_STAGES = 3


def is_tiny(config: Mapping[str, Any]) -> bool:
    """Whether a vae/config.json is of this kind: without a class of diffusers, named by `kind`."""
    return "_class_name" not in config and str(config.get("kind", "")).startswith("tiny autoenc")


class TinyAutoencoder(nn.Module):
    """Pixels in [-1, 1] to latents and back; encoding has no spread.

    Args:
        width: Channels of every block.
        latent_channels: C of the latents.
        blocks: Blocks a stage; the stage next to the pixels has one.
        magnitude: Latents are bent into [-magnitude, magnitude] before decoding.
    """

    def __init__(self, width: int, latent_channels: int, blocks: int, magnitude: float) -> None:
        super().__init__()
        encoder: list[nn.Module] = [_conv(3, width), _Block(width)]
        for stage in range(_STAGES):
            encoder.append(_conv(width, width, stride=2, bias=False))
            encoder += [_Block(width, pools=stage == _STAGES - 1) for _ in range(blocks)]
        encoder.append(_conv(width, latent_channels))
        decoder: list[nn.Module] = [_Bend(magnitude), _conv(latent_channels, width), nn.ReLU()]
        for stage in range(_STAGES):
            decoder += [_Block(width, pools=stage == 0) for _ in range(blocks)]
            decoder += [nn.Upsample(scale_factor=2), _conv(width, width, bias=False)]
        decoder += [_Block(width), _conv(width, 3)]
        self.encoder, self.decoder = nn.Sequential(*encoder), nn.Sequential(*decoder)

    def encode(self, pixels: Tensor) -> Tensor:  # [N, 3, H, W] -> [N, C, H/8, W/8]
        """Latents; the network itself reads pixels in [0, 1]."""
        return self.encoder(pixels / 2 + 0.5)

    def decode(self, latents: Tensor) -> Tensor:  # [N, C, h, w] -> [N, 3, 8h, 8w]
        """Pixels around [-1, 1]."""
        return self.decoder(latents) * 2 - 1


def load(folder: Path, dtype: torch.dtype) -> TinyAutoencoder:
    """The autoencoder of a folder with config.json and safetensors.

    Raises:
        ConfigError: The weights do not fit the config.
    """
    import json

    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    magnitude = max(config.get("latent_range", [3]))
    model = TinyAutoencoder(
        config["width"], config["latent_channels"], config["blocks_per_stage"], magnitude
    )
    state = {k: v for file in weight_files(folder) for k, v in load_file(str(file)).items()}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ConfigError(f"{folder}: the weights are not those of config.json: {error}") from error
    return model.to(dtype).eval().requires_grad_(False)


class _Block(nn.Module):
    def __init__(self, width: int, *, pools: bool = False) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv(width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width)
        )
        self.pool = None
        if pools:
            inner = 4 * width
            self.pool = nn.Sequential(
                nn.Conv2d(width, inner, 1, bias=False),
                nn.GroupNorm(4, inner),
                nn.ReLU(),
                nn.Conv2d(inner, width, 1, bias=False),
            )

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


class _Bend(nn.Module):
    def __init__(self, magnitude: float) -> None:
        super().__init__()
        self.magnitude = magnitude

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / self.magnitude) * self.magnitude


def _conv(ins: int, outs: int, *, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(ins, outs, 3, stride=stride, padding=1, bias=bias)
