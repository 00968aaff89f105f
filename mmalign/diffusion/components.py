"""The parts of a pipeline: denoisers, and the VAE between images and latents."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from mmalign.config import DiffusionConfig, ModelConfig
from mmalign.diffusion import pipeline
from mmalign.diffusion.families import family_of
from mmalign.diffusion.process import NoiseProcess
from mmalign.errors import ConfigError
from mmalign.models.files import denoiser_folder, folder_tensors


def is_tiny(config: Mapping[str, Any]) -> bool:
    """Whether a vae/config.json is of this kind: without a class of diffusers, named by `kind`."""
    return "_class_name" not in config and str(config.get("kind", "")).startswith("tiny autoenc")


class TinyAutoencoder(nn.Module):
    """Pixels in [-1, 1] to latents and back; encoding has no spread.

    Three halvings, blocks of three convolutions in between. In the encoder's last stage and the
    decoder's first a block pools over the whole image before its convolutions, which diffusers'
    AutoencoderTiny lacks: x + conv1x1(relu(groupnorm(conv1x1(x, 4 width))), width), in 4 groups.

    Args:
        width: Channels of every block.
        latent_channels: C of the latents.
        blocks: Blocks a stage; the stage next to the pixels has one.
        magnitude: Latents are bent into [-magnitude, magnitude] before decoding.

    Source: madebyollin/taesd (taesd.py), the autoencoder of FLUX.2's latents.
    """

    STAGES = 3

    def __init__(self, width: int, latent_channels: int, blocks: int, magnitude: float) -> None:
        super().__init__()
        encoder: list[nn.Module] = [_conv(3, width), _Block(width)]
        for stage in range(self.STAGES):
            encoder.append(_conv(width, width, stride=2, bias=False))
            encoder += [_Block(width, pools=stage == self.STAGES - 1) for _ in range(blocks)]
        encoder.append(_conv(width, latent_channels))
        # In the released files the decoder's first layer has no weights: it bends.
        decoder: list[nn.Module] = [nn.Identity(), _conv(latent_channels, width), nn.ReLU()]
        for stage in range(self.STAGES):
            decoder += [_Block(width, pools=stage == 0) for _ in range(blocks)]
            decoder += [nn.Upsample(scale_factor=2), _conv(width, width, bias=False)]
        decoder += [_Block(width), _conv(width, 3)]
        self.encoder, self.decoder = nn.Sequential(*encoder), nn.Sequential(*decoder)
        self.magnitude = magnitude

    def encode(self, pixels: Tensor) -> Tensor:  # [N, 3, H, W] -> [N, C, H/8, W/8]
        """Latents; the network itself reads pixels in [0, 1]."""
        return self.encoder(pixels / 2 + 0.5)

    def decode(self, latents: Tensor) -> Tensor:  # [N, C, h, w] -> [N, 3, 8h, 8w]
        """Pixels around [-1, 1]."""
        bent = torch.tanh(latents / self.magnitude) * self.magnitude
        return self.decoder(bent) * 2 - 1


def load(folder: Path, dtype: torch.dtype) -> TinyAutoencoder:
    """The autoencoder of a folder with config.json and safetensors.

    Raises:
        ConfigError: The weights do not fit the config.
    """
    config = pipeline.read_json(folder / "config.json")
    magnitude = max(config.get("latent_range", [3]))
    model = TinyAutoencoder(
        config["width"], config["latent_channels"], config["blocks_per_stage"], magnitude
    )
    try:
        model.load_state_dict(folder_tensors(folder))
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


def _conv(ins: int, outs: int, *, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(ins, outs, 3, stride=stride, padding=1, bias=bias)


PIXELS_AT_ONCE = 1 << 20  # four images of 512 x 512, which take 3 GiB to encode, 4 to decode
_LAYOUT = torch.channels_last  # a sixth less time on a CPU; nothing of a VAE is saved again


class Vae:
    """An autoencoder, frozen; its latents are scaled as the denoiser was trained on them.

    z = (raw - shift) * scale, with shift and scale numbers, or one a channel.

    Attributes:
        factor: Pixels a side of one latent.
        channels: C of the latents.
        is_random: Whether encoding has a spread (a variational autoencoder).
    """

    def __init__(self, model: nn.Module, config: dict[str, Any], path: str | Path) -> None:
        self.model = model.to(memory_format=_LAYOUT)  # pyright: ignore[reportCallIssue]
        self._path = path
        self.channels = int(config["latent_channels"])
        self.factor = _factor(config)
        self.is_random = config.get("_class_name") == "AutoencoderKL"
        shift = config.get("latents_mean") or config.get("shift_factor") or 0.0
        spread = config.get("latents_std") or 1.0
        self._shift = torch.tensor(shift, dtype=torch.float32).view(1, -1, 1, 1)
        scale = torch.tensor(config.get("scaling_factor") or 1.0, dtype=torch.float32)
        self._scale = (scale / torch.tensor(spread)).view(1, -1, 1, 1)

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
        height, width = pixels.shape[-2:]
        if height % self.factor or width % self.factor:
            raise ConfigError(
                f"images of {height} x {width} pixels (height x width) cannot be encoded: each "
                f"side must be a multiple of {self.factor}, the size of one latent. Change "
                "diffusion.resolution or diffusion.bucket_multiple"
            )
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
        """How many images go through together: not more than memory is planned for."""
        area = pictures.shape[-1] * pictures.shape[-2] * factor**2
        return max(1, PIXELS_AT_ONCE // area)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def _check_finite(self, values: Tensor, doing: str) -> None:
        if bool(torch.isfinite(values).all()):
            return
        advice = "its weights are damaged, or the image is"
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
        self.channels = channels

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
        ConfigError: It is of a kind that is not supported, or its latents are not the denoiser's.
    """
    channels = family_of(path, revision).latent_channels(pipeline.denoiser_config(path, revision))
    if not pipeline.has_component(path, "vae", revision):
        _check_pixels(path, channels)
        return PixelSpace(channels)
    folder = pipeline.component(path, "vae", revision)
    config = pipeline.read_json(folder / "config.json")
    kind, dtype = config.get("_class_name"), getattr(torch, diffusion.vae_dtype)
    if is_tiny(config):
        vae = Vae(load(folder, dtype), config, path)
    elif kind in ("AutoencoderKL", "AutoencoderTiny"):
        import diffusers

        model = pipeline.load_part(getattr(diffusers, kind), folder, dtype)
        vae = Vae(model.requires_grad_(False), dict(model.config), path)
    else:
        raise ConfigError(
            f"pipeline {path}: vae/ is a {kind}; supported are AutoencoderKL, "
            "AutoencoderTiny and tiny autoencoders with pooled blocks"
        )
    if vae.channels != channels:
        raise ConfigError(
            f"pipeline {path}: the VAE has {vae.channels} latent channels, but the denoiser "
            f"reads {channels}; the folder's parts are of different models"
        )
    return vae


def _factor(config: dict[str, Any]) -> int:
    """Pixels a side of one latent."""
    if "downscale" in config:
        return int(config["downscale"])
    blocks = config.get("block_out_channels") or config.get("encoder_block_out_channels") or ()
    return 2 ** (len(blocks) - 1)


class Components:
    """A pipeline's denoiser, and what its files say.

    Attributes:
        model: The config it was loaded by.
        family: Whose it is.
        scheduler_config: Of the noise process it was trained with.
        denoiser_config: The denoiser's config.json.
        latent_channels: C of the latents, which are the pixels where there is no VAE.
        has_vae: Whether the pipeline has one.
        factor: Pixels a side of one latent; 1 without a VAE.
    """

    def __init__(self, model: ModelConfig) -> None:
        path, revision = model.path, model.revision
        self.model, self.family = model, family_of(path, revision)
        self.denoiser_config = pipeline.denoiser_config(path, revision)
        self.latent_channels = self.family.latent_channels(self.denoiser_config)
        self.has_vae = pipeline.has_component(path, "vae", revision)
        self.factor = 1
        if self.has_vae:  # by its settings alone
            folder = pipeline.component(path, "vae", revision, weights=False)
            self.factor = _factor(pipeline.read_json(folder / "config.json"))
        else:
            _check_pixels(path, self.latent_channels)
        self.scheduler_config = pipeline.scheduler_config(path, revision)

    @cached_property
    def denoiser(self) -> nn.Module:
        """The U-Net or transformer, loaded on first use."""
        return load_denoiser(self.model.path, self.model)

    @property
    def is_distilled(self) -> bool:
        """Whether the denoiser is given the scale of guidance, and needs no second call for it."""
        return self.family.is_distilled(self.denoiser_config)

    def process(self, diffusion: DiffusionConfig) -> NoiseProcess:
        """The noise process of the pipeline's scheduler.

        Raises:
            ConfigError: It is not supported, or `diffusion` contradicts it.
        """
        return self.family.process(
            self.scheduler_config, diffusion.prediction, diffusion.zero_terminal_snr
        )


def load_components(model: ModelConfig, diffusion: DiffusionConfig) -> Components:
    """Read a pipeline and load its denoiser; VAE and text encoders stay where they are.

    Args:
        model: `path`, `revision`, `dtype` and `gradient_checkpointing` are read.
        diffusion: `resolution` and `bucket_multiple` are checked against the size of a latent.

    Raises:
        ConfigError: A pipeline or an option that cannot be used, with the reason.
    """
    components = Components(model)
    # A flow transformer joins latents to patches, which must come out even too.
    patch = components.family.patch_size(components.denoiser_config)
    _check_sizes(model.path, diffusion, components.factor * patch)
    _ = components.denoiser
    return components


def load_denoiser(path: str, model: ModelConfig) -> nn.Module:
    """The U-Net or transformer of a pipeline, without dropout, in evaluation mode.

    Args:
        path: Pipeline folder or hub name; a folder with unet/ or transformer/; or a folder that is
            one of those.
        model: `dtype` and `gradient_checkpointing` are read; `revision` where `path` is its own.

    Raises:
        ConfigError: It cannot be loaded, or an option is not for denoisers.

    Departs: dropout is set to 0, as in every released script, whose U-Nets have none; with it the
        policy's error and the reference's could not be compared.
    """
    _check_options(model)
    revision = model.revision if path == model.path else None
    family_of(path, revision)
    kind = pipeline.denoiser_config(path, revision)["_class_name"]
    folder = denoiser_folder(pipeline.pipeline_folder(path, revision))
    if not Path(path).is_dir():
        folder = pipeline.component(path, folder.name, revision)
    import diffusers

    denoiser = pipeline.load_part(getattr(diffusers, kind), folder, getattr(torch, model.dtype))
    if model.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    return denoiser


def _check_pixels(path: str | Path, channels: int) -> None:
    """Refuse a denoiser of latents in a pipeline without a VAE."""
    if channels not in (1, 3):
        raise ConfigError(
            f"pipeline {path}: has no vae/, and its denoiser reads {channels} channels. Without a "
            "VAE a denoiser must read pixels (1 or 3 channels)"
        )


def _check_sizes(path: str, diffusion: DiffusionConfig, unit: int) -> None:
    """Refuse image sizes that are no whole number of what the denoiser reads as one place."""
    side, near = diffusion.resolution, diffusion.resolution // unit * unit
    if side % unit:
        raise ConfigError(
            f"diffusion.resolution: images of {side} x {side} pixels cannot be used with {path}; "
            f"each side must be a multiple of {unit}, the nearest are {near} and {near + unit}"
        )
    if diffusion.buckets and diffusion.bucket_multiple % unit:
        raise ConfigError(
            f"diffusion.bucket_multiple is {diffusion.bucket_multiple}; for {path} it must be a "
            f"multiple of {unit} pixels"
        )


def _check_options(model: ModelConfig) -> None:
    """Refuse the model options that only language models have."""
    if model.quantization is not None:
        raise ConfigError(
            f"model.quantization is {model.quantization}, which denoisers are not loaded with; "
            "remove it, and use dtype: bfloat16 with a LoRA to save memory"
        )
    if model.attention not in ("auto", "sdpa"):
        raise ConfigError(
            f"model.attention is {model.attention}; denoisers run with sdpa, which picks the "
            "fastest kernel by itself"
        )
    if model.trust_remote_code:
        raise ConfigError(
            "model.trust_remote_code is set, but no code of a pipeline is ever run; remove it"
        )
