"""Pictures to latents and back: the VAE of a pipeline, or pixels where it has none."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from mmalign.diffusion import tiny_vae
from mmalign.diffusion.pipeline import (
    component,
    component_fingerprint,
    denoiser_config,
    has_component,
    read_json,
)
from mmalign.diffusion.weights import load_part
from mmalign.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mmalign.config import DiffusionConfig

PIXELS_AT_ONCE = 1 << 20  # four pictures of 512 x 512, which take 3 GiB to encode, 4 to decode
_LAYOUT = torch.channels_last  # a sixth less time on a CPU; nothing of a VAE is saved again


class Vae:
    """An autoencoder, frozen; its latents are scaled as the denoiser was trained on them.

    z = (raw - shift) * scale, with shift and scale numbers, or one a channel.

    Attributes:
        factor: Pixels a side of one latent.
        channels: C of the latents.
        is_random: Whether encoding has a spread (a variational autoencoder).
    """

    def __init__(
        self, model: nn.Module, config: dict[str, Any], path: str | Path, revision: str | None
    ) -> None:
        self.model, self._config = model.to(memory_format=_LAYOUT), config  # pyright: ignore
        self._path, self._revision = path, revision
        self.channels = int(config["latent_channels"])
        self.factor = _factor(config)
        self.is_random = config.get("_class_name") == "AutoencoderKL"
        shift = config.get("latents_mean") or config.get("shift_factor") or 0.0
        spread = config.get("latents_std") or 1.0
        self._shift = torch.tensor(shift, dtype=torch.float32).view(1, -1, 1, 1)
        scale = torch.tensor(config.get("scaling_factor") or 1.0, dtype=torch.float32)
        self._scale = (scale / torch.tensor(spread)).view(1, -1, 1, 1)

    @classmethod
    def load(
        cls,
        path: str | Path,
        dtype: torch.dtype = torch.float32,
        *,
        revision: str | None = None,
    ) -> Self:
        """The autoencoder in the vae/ of a pipeline.

        Args:
            path: Pipeline folder or hub name.
            dtype: In which it computes; what it returns is float32.
            revision: Of a hub repository.

        Raises:
            ConfigError: It is missing or of a kind that is not supported.
        """
        folder = component(path, "vae", revision)
        config = read_json(folder / "config.json")
        kind = config.get("_class_name")
        if tiny_vae.is_tiny(config):
            return cls(tiny_vae.load(folder, dtype), config, path, revision)
        if kind not in ("AutoencoderKL", "AutoencoderTiny"):
            raise ConfigError(
                f"pipeline {path}: vae/ is a {kind}; supported are AutoencoderKL, "
                "AutoencoderTiny and tiny autoencoders with pooled blocks"
            )
        import diffusers

        model = load_part(getattr(diffusers, kind), folder, dtype)
        return cls(model.requires_grad_(False), dict(model.config), path, revision)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of its files and of the dtype it computes in."""
        return f"{component_fingerprint(self._path, 'vae', self._revision)} {self._dtype}"

    def to(self, device: torch.device | str) -> Self:
        """Move it."""
        self.model.to(device)
        self._shift, self._scale = self._shift.to(device), self._scale.to(device)
        return self

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the scaled latents, both float32 [N, C, H/f, W/f].

        Args:
            pixels: [N, 3, H, W] in [-1, 1].

        Raises:
            ConfigError: A size that the factor does not divide, or values that are not finite.
        """
        check_size(pixels.shape[-2:], self.factor)
        parts = [self._encode(part) for part in pixels.split(self._at_once(pixels, 1))]
        mean = (torch.cat([mean for mean, _ in parts]) - self._shift) * self._scale
        std = torch.cat([std for _, std in parts]) * self._scale.abs()
        self._check_finite(mean, "encoding")
        return mean.contiguous(), std.contiguous()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:  # [N, C, h, w] -> [N, 3, h f, w f]
        """Scaled latents to pixels around [-1, 1], float32."""
        raw = latents.float() / self._scale + self._shift
        parts = raw.to(self._dtype).split(self._at_once(latents, self.factor))
        pixels = torch.cat([self._decode(part).float() for part in parts])
        self._check_finite(pixels, "decoding")
        return pixels.contiguous()

    def _encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Unscaled mean and spread in float32."""
        found: Any = self.model.encode(pixels.to(self._dtype, memory_format=_LAYOUT))  # pyright: ignore[reportCallIssue]
        if not self.is_random:
            mean = getattr(found, "latents", found).float()
            return mean, torch.zeros_like(mean)
        return found.latent_dist.mean.float(), found.latent_dist.std.float()

    def _decode(self, raw: Tensor) -> Tensor:
        found: Any = self.model.decode(raw)  # pyright: ignore[reportCallIssue]
        return getattr(found, "sample", found)

    def _at_once(self, pictures: Tensor, factor: int) -> int:
        """How many pictures go through together: not more than memory is planned for."""
        area = pictures.shape[-1] * pictures.shape[-2] * factor**2
        return max(1, PIXELS_AT_ONCE // area)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def _check_finite(self, values: Tensor, doing: str) -> None:
        if bool(torch.isfinite(values).all()):
            return
        advice = "its weights are damaged, or the picture is"
        if self._dtype == torch.float16:
            advice = (
                "float16 overflows in it, as in the VAE of SDXL. Use diffusion.vae_dtype: float32 "
                "(or bfloat16), or put a VAE repaired for float16 (sdxl-vae-fp16-fix) into the "
                "pipeline's vae/"
            )
        raise ConfigError(
            f"the VAE of {self._path} gave values that are not finite while {doing}: {advice}"
        )


class PixelSpace:
    """The interface of `Vae` for denoisers that work on pixels: nothing is encoded.

    Args:
        channels: 3 for colours; 1 for grey, the mean of the three.
    """

    factor = 1
    is_random = False

    def __init__(self, channels: int) -> None:
        if channels not in (1, 3):
            raise ConfigError(
                f"a denoiser of {channels} channels does not work on pixels, which have 1 or 3; "
                "the pipeline lacks its vae/"
            )
        self.channels = channels
        self.fingerprint = f"pixels {channels}"

    def to(self, device: torch.device | str) -> Self:
        """Itself."""
        return self

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The pixels [N, channels, H, W] in float32, and a spread of 0."""
        mean = pixels.float()
        if self.channels == 1:
            mean = mean.mean(dim=1, keepdim=True)
        return mean, torch.zeros_like(mean)

    def decode(self, latents: Tensor) -> Tensor:
        """The pixels as they are, in float32."""
        return latents.float()


def load_vae(
    path: str | Path, diffusion: DiffusionConfig, *, revision: str | None = None
) -> Vae | PixelSpace:
    """The pipeline's autoencoder in `diffusion.vae_dtype`, or pixels where it has none.

    Raises:
        ConfigError: It cannot be loaded, or its latents are not those of the denoiser.
    """
    channels = int(denoiser_config(path, revision).get("in_channels", 4))
    if not has_component(path, "vae", revision):
        return PixelSpace(channels)
    vae = Vae.load(path, getattr(torch, diffusion.vae_dtype), revision=revision)
    if vae.channels != channels:
        raise ConfigError(
            f"pipeline {path}: the VAE has {vae.channels} latent channels, but the denoiser "
            f"reads {channels}; the folder's parts are of different models"
        )
    return vae


def factor_of(path: str | Path, revision: str | None = None) -> int:
    """Pixels a side of one latent, by the VAE's settings alone; 1 without a VAE."""
    if not has_component(path, "vae", revision):
        return 1
    return _factor(read_json(component(path, "vae", revision, weights=False) / "config.json"))


def check_size(size: tuple[int, ...] | torch.Size, factor: int) -> None:
    """Refuse pictures that are no whole number of latents.

    Raises:
        ConfigError: Naming the size and the factor.
    """
    height, width = size
    if height % factor or width % factor:
        raise ConfigError(
            f"pictures of {height} x {width} pixels (height x width) cannot be encoded: each side "
            f"must be a multiple of {factor}, the size of one latent. Change diffusion.resolution "
            "or diffusion.bucket_multiple"
        )


def _factor(config: dict[str, Any]) -> int:
    """Pixels a side of one latent."""
    if "downscale" in config:
        return int(config["downscale"])
    blocks = config.get("block_out_channels") or config.get("encoder_block_out_channels") or ()
    return 2 ** (len(blocks) - 1)
