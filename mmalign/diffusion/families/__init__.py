"""Families of image models, and which of them a pipeline is of."""

from __future__ import annotations

from pathlib import Path

from mmalign.diffusion.families.base import Condition, Family
from mmalign.diffusion.families.flux import FLUX
from mmalign.diffusion.families.sd import SD
from mmalign.diffusion.families.sd3 import SD3
from mmalign.diffusion.families.sdxl import REFINER, SDXL
from mmalign.diffusion.pipeline import denoiser_config, model_index
from mmalign.errors import ConfigError

__all__ = ["FAMILIES", "Condition", "Family", "family_of"]

FAMILIES: dict[str, Family] = {
    "sd": SD(),
    "sdxl": SDXL(),
    "sd3": SD3(),
    "flux": FLUX(),
}


def family_of(path: str | Path, revision: str | None = None) -> Family:
    """The family of a pipeline, by its denoiser; a folder may hold nothing but that.

    Raises:
        ConfigError: A pipeline that cannot be trained here, with the reason.
    """
    index, config = model_index(path, revision), denoiser_config(path, revision)
    kind, pipeline = str(config.get("_class_name", "none")), index.get("_class_name")
    if index.get("requires_aesthetics_score"):
        raise ConfigError(f"pipeline {path}: {REFINER}")
    known = [family.pipeline for family in FAMILIES.values()]
    if pipeline is not None and pipeline not in known:
        raise ConfigError(f"pipeline {path}: is a {pipeline}; supported are {', '.join(known)}")
    if "model_type" in config and "_class_name" not in config:
        raise ConfigError(
            f"pipeline {path}: is a model of transformers ({config['model_type']}), not a pipeline "
            "of diffusers; a language model is trained with modality: text"
        )
    alike = [family for family in FAMILIES.values() if family.denoiser == kind]
    if not alike:
        denoisers = dict.fromkeys(family.denoiser for family in FAMILIES.values())
        raise ConfigError(
            f"pipeline {path}: its denoiser is a {kind}; supported are {', '.join(denoisers)}"
        )
    found = next((family for family in alike if family.fits(config)), alike[0])
    found.check(path, config, revision)
    if pipeline is not None and pipeline != found.pipeline:
        raise ConfigError(
            f"pipeline {path}: model_index.json says {pipeline}, but the denoiser is wired as "
            f"{found}; the folder's parts are of different models"
        )
    return found
