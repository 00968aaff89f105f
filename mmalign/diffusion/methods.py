"""What a method asks of the rest of a configuration, as sentences, before any weight loads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from mmalign.config import DiffusionConfig, RunConfig, TimestepSpec
from mmalign.core import presets
from mmalign.core.presets import ALIASES, PRESETS
from mmalign.diffusion.components import Components
from mmalign.diffusion.families import family_of
from mmalign.diffusion.pipeline import denoiser_config, pipeline_folder, scheduler_config
from mmalign.diffusion.process import NoiseProcess, VPSchedule
from mmalign.errors import ConfigError


def check_method(config: RunConfig) -> list[str]:
    """What the objective, the estimator and the reference ask of each other and do not get."""
    return [*_objective(config), *_estimator(config), *_pictures(config), *_sampling(config)]


def check_pipeline(config: RunConfig, components: Components) -> list[str]:
    """Settings that this pipeline has no use for."""
    problems: list[str] = []
    settings = config.diffusion
    if settings.time_ids != "measured" and not components.family.has_time_ids:
        problems.append(
            f"diffusion.time_ids is {settings.time_ids}, but only SDXL is conditioned on sizes, "
            f"and {config.model.path} is of the family {components.family}. Remove it"
        )
    default = DiffusionConfig().embedded_guidance
    if settings.embedded_guidance != default and not components.is_distilled:
        problems.append(
            f"diffusion.embedded_guidance is {settings.embedded_guidance:g}, but only models "
            f"distilled with guidance are given one, and {config.model.path} is not. Remove it"
        )
    if settings.sampling.negative is not None and components.is_distilled:
        problems.append(
            "diffusion.sampling.negative takes the place of the empty prompt, but models distilled "
            f"with guidance, as {config.model.path} is, are sampled without. Remove it"
        )
    if settings.vae_dtype != "float32" and not components.has_vae:
        problems.append(
            f"diffusion.vae_dtype is {settings.vae_dtype}, but {config.model.path} has no VAE. "
            "Remove it"
        )
    return problems


def check_other(path: str, config: RunConfig, components: Components) -> None:
    """Refuse a second denoiser that does not read and predict what the policy does.

    Args:
        path: Of the reference: a pipeline, or a denoiser alone, which has no noise schedule of its
            own and is taken to have the policy's.
        config: The run.
        components: Of the policy.

    Raises:
        ConfigError: Another family, other inputs, another prediction type or noise schedule.
    """
    family = family_of(path)
    own = {"family": components.family.name} | _inputs(components.denoiser_config)
    other = {"family": family.name} | _inputs(denoiser_config(path))
    different = next((key for key in own if own[key] != other[key]), None)
    if different is not None:
        raise ConfigError(
            f"reference {path}: its {different} is {other[different]}, that of model.path "
            f"{config.model.path} is {own[different]}. A reference must read the same latents and "
            "prompts as the policy"
        )
    if not (pipeline_folder(path) / "scheduler").is_dir():
        return
    settings = config.diffusion
    policy = family.process(components.scheduler_config, settings.prediction)
    said = scheduler_config(path)
    reference = family.process(said, "auto" if "prediction_type" in said else settings.prediction)
    if policy.prediction != reference.prediction:
        raise ConfigError(
            f"reference {path}: predicts {reference.prediction}, model.path {config.model.path} "
            f"{policy.prediction}. Their errors cannot be compared; use a reference of the same "
            "prediction type"
        )
    if not (isinstance(policy, VPSchedule) and isinstance(reference, VPSchedule)):
        return
    a, b = policy.table, reference.table
    if a.shape != b.shape or not torch.allclose(a, b):
        raise ConfigError(
            f"reference {path}: has another noise table than model.path {config.model.path}, so "
            "that a timestep is another amount of noise. Use a reference of the same schedule"
        )


def _inputs(config: dict[str, Any]) -> dict[str, Any]:
    """What a denoiser's settings say of the shapes that it reads."""
    names = ("in_channels", "cross_attention_dim", "joint_attention_dim", "pooled_projection_dim")
    return {name: config.get(name) for name in names}


def check_process(config: RunConfig, process: NoiseProcess) -> list[str]:
    """What the method and the estimator ask of the model's noise process and do not get."""
    problems: list[str] = []
    is_flow = process.prediction == "flow"
    spec = config.diffusion.estimator
    if "flow_dpo" in names_of(config) and not is_flow:
        problems.append(
            f"objective 'flow_dpo' is for flow models, but this one predicts {process.prediction}. "
            "Use diffusion_dpo"
        )
    if is_flow and spec.inversion != "exact":
        problems.append(
            f"diffusion.estimator.inversion is {spec.inversion}, which reproduces released code "
            "for noise tables, but this is a flow model. Use exact"
        )
    if spec.kind == "truncated" and (is_flow or process.ends_in_noise):
        problems.append(
            "diffusion.estimator.kind is truncated, whose walk begins at the last noise level, "
            "where this model's process keeps nothing of the image (a flow, or zero terminal SNR)"
        )
    undefined = process.ends_in_noise and process.prediction == "epsilon"
    if undefined and config.diffusion.timesteps.weighting == "sample":
        problems.append(
            "diffusion.timesteps.weighting is sample, which has no value for a model that predicts "
            "noise at the end of a table with zero terminal SNR. Use constant or min_snr"
        )
    return problems


def _objective(config: RunConfig) -> Iterator[str]:
    names, settings = names_of(config), config.diffusion
    in_errors = sorted(
        name for name in names if name in PRESETS and PRESETS[name]().unit == "error"
    )
    if in_errors and settings.logp_scale != 0.5:
        yield (
            f"diffusion.logp_scale is {settings.logp_scale}, but objective {in_errors[0]!r} has "
            "its constants per unit of error, which is logp_scale 0.5. Change beta instead"
        )
    if "ld_alpha" in config.objective.keywords:
        yield "objective.ld_alpha acts on the tokens of a response; an image has none. Remove it"
    if "diffusion_npo" in names and not config.data.swap:
        yield (
            "objective 'diffusion_npo' learns from exchanged pairs, but data.swap is false. Set "
            "data.swap: true, or use diffusion_dpo"
        )


def _estimator(config: RunConfig) -> Iterator[str]:
    names, spec = names_of(config), config.diffusion.estimator
    if "inpo" in names and spec.kind != "ddim_inversion":
        yield (
            f"objective 'inpo' scores at inverted images, but diffusion.estimator.kind is "
            f"{spec.kind}. Set it to ddim_inversion, or use diffusion_dpo"
        )
    if spec.kind == "truncated" or "self_npo" in names:
        yield from _self_npo(config)
    if spec.kind != "forward":
        if config.reference.kind == "cached":
            yield (
                "reference.kind is cached, which needs noised samples that do not change, but "
                f"diffusion.estimator.kind is {spec.kind}. Use a live reference, or kind: forward"
            )
        if config.diffusion.noise_offset:
            yield (
                f"diffusion.noise_offset is {config.diffusion.noise_offset}, but only "
                f"estimator.kind: forward reads it (found {spec.kind}). Remove it"
            )
    draws = config.diffusion.num_draws
    if config.reference.kind != "cached" and draws != DiffusionConfig().num_draws:
        yield (
            f"diffusion.num_draws is {draws}, but only reference.kind: cached stores draws (found "
            f"{config.reference.kind}). Remove it"
        )
    if spec.network == "reference" and not _has_one_reference(config):
        yield (
            "diffusion.estimator.network is reference, but this run has no single frozen "
            f"reference (reference.kind {config.reference.kind}). Use network: policy"
        )


def _pictures(config: RunConfig) -> Iterator[str]:
    settings = config.diffusion
    if settings.estimator.generated:
        changed = {"flip": settings.flip, "buckets": settings.buckets}
        changed["crop"] = settings.crop != "center"
        for name in (name for name, is_set in changed.items() if is_set):
            yield (
                f"diffusion.{name} is for images of the data, but estimator.generated makes "
                "others. Remove it"
            )
    elif not settings.shared_crop and settings.crop == "center":
        yield "diffusion.shared_crop is only read with crop: random (found center). Remove it"


def _sampling(config: RunConfig) -> Iterator[str]:
    spec = config.diffusion.sampling
    if spec.negative is None:
        return
    if spec.guidance <= 1.0:
        yield (
            f"diffusion.sampling.negative is only read with guidance above 1 (found "
            f"{spec.guidance:g})"
        )
    if not spec.negative.exists():
        yield f"diffusion.sampling.negative is {spec.negative}: there is no such file or folder"


def _self_npo(config: RunConfig) -> Iterator[str]:
    names, settings = names_of(config), config.diffusion
    kind = settings.estimator.kind
    if names != ["self_npo"]:
        yield (
            f"objective {', '.join(names)} and diffusion.estimator.kind {kind} do not go together: "
            "truncated serves the objective self_npo alone, in no mix"
        )
    elif kind != "truncated":
        yield (
            "objective 'self_npo' learns from its teacher's walks, but diffusion.estimator.kind "
            f"is {kind}. Set it to truncated"
        )
    if kind == "truncated" and settings.timesteps != TimestepSpec():
        yield (
            "diffusion.timesteps chooses noise levels and weights of predictions, but "
            "estimator.kind: truncated draws its own and compares clean images. Remove it"
        )


def names_of(config: RunConfig) -> list[str]:
    """Presets of the objective, by their own names."""
    asked = config.objective.mix or [config.objective.name or ""]
    return [ALIASES.get(name, name) for name in asked]


def _has_one_reference(config: RunConfig) -> bool:
    if config.reference.kind in ("none", "mixture", "cached"):
        return False
    return presets.from_config(config.objective).needs.reference
