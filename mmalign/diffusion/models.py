"""Denoisers of pipelines: loading them, and what their files say of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mmalign.diffusion.latents import factor_of
from mmalign.diffusion.pipeline import (
    Family,
    component,
    component_fingerprint,
    denoiser_config,
    family_of,
    has_component,
    pipeline_folder,
    scheduler_config,
)
from mmalign.diffusion.weights import load_part
from mmalign.errors import ConfigError
from mmalign.models.files import denoiser_folder

if TYPE_CHECKING:
    from mmalign.config import DiffusionConfig, ModelConfig

__all__ = [
    "Components",
    "component_fingerprint",
    "family_of",
    "load_components",
    "load_denoiser",
    "scheduler_config",
]


@dataclass
class Components:
    """A pipeline's denoiser, and what its files say.

    Attributes:
        model: The config it was loaded by.
        family: "sd", "sdxl" or "sd3".
        folder: The pipeline's local folder (of a hub name: the copy's).
        scheduler_config: Of the noise process it was trained with.
        denoiser_config: The denoiser's config.json.
        latent_channels: C of the latents, which are the pixels where there is no VAE.
        has_vae: Whether the pipeline has one.
    """

    model: ModelConfig
    family: Family
    folder: Path
    scheduler_config: dict[str, Any] = field(repr=False)
    denoiser_config: dict[str, Any] = field(repr=False)
    latent_channels: int
    has_vae: bool

    @cached_property
    def denoiser(self) -> nn.Module:
        """The U-Net or transformer, loaded on first use."""
        return load_denoiser(self.model.path, self.model)


def load_components(
    model: ModelConfig, diffusion: DiffusionConfig, *, denoiser: bool = True
) -> Components:
    """Read a pipeline; VAE and text encoders stay where they are.

    Args:
        model: `path`, `revision`, `dtype` and `gradient_checkpointing` are read.
        diffusion: `resolution` and `bucket_multiple` are checked against the size of a latent.
        denoiser: Load it now and not on first use.

    Raises:
        ConfigError: A pipeline or an option that cannot be used, with the reason.
    """
    family = family_of(model.path, model.revision)
    config = denoiser_config(model.path, model.revision)
    channels = int(config.get("in_channels", 4))
    has_vae = has_component(model.path, "vae", model.revision)
    if not has_vae and channels not in (1, 3):
        raise ConfigError(
            f"pipeline {model.path}: has no vae/, and its denoiser reads {channels} channels. "
            "Without a VAE a denoiser must read pixels (1 or 3 channels)"
        )
    # A flow transformer joins latents to patches, which must come out even too.
    unit = factor_of(model.path, model.revision) * int(config.get("patch_size", 1))
    _check_sizes(model.path, diffusion, unit)
    components = Components(
        model=model,
        family=family,
        folder=pipeline_folder(model.path, model.revision),
        scheduler_config=scheduler_config(model.path, model.revision),
        denoiser_config=config,
        latent_channels=channels,
        has_vae=has_vae,
    )
    if denoiser:
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
    kind = denoiser_config(path, revision)["_class_name"]
    folder = denoiser_folder(pipeline_folder(path, revision))
    if not Path(path).is_dir():
        folder = component(path, folder.name, revision)
    import diffusers

    denoiser = load_part(getattr(diffusers, kind), folder, getattr(torch, model.dtype))
    if model.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    return denoiser


def _check_sizes(path: str, diffusion: DiffusionConfig, unit: int) -> None:
    """Refuse picture sizes that are no whole number of what the denoiser reads as one place."""
    side, near = diffusion.resolution, diffusion.resolution // unit * unit
    if side % unit:
        raise ConfigError(
            f"diffusion.resolution: pictures of {side} x {side} pixels cannot be used with {path}; "
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
