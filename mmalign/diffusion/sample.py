"""Images from prompts: guidance by one or two models, one start noise a seed."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor

from mmalign.core.numerics import full_precision
from mmalign.diffusion.components import load_denoiser
from mmalign.diffusion.export import lora_of
from mmalign.diffusion.families import Condition
from mmalign.errors import ConfigError
from mmalign.models.merge import Change, LoraDelta, combined, open_delta

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from PIL.Image import Image
    from torch import nn

    from mmalign.config import DiffusionConfig, ModelConfig, PictureSampleSpec
    from mmalign.diffusion.components import Components, PixelSpace, Vae
    from mmalign.diffusion.process import Size
    from mmalign.models.merge import Delta


# Guidance by two predictions, of one model or of two.


def guided(
    eps_pos: Tensor, eps_neg: Tensor, guidance: float, rescale: float = 0.0
) -> Tensor:  # [N, ...]
    """The prediction moved away from a negative one.

    e = eps_neg + guidance (eps_pos - eps_neg), then
    rescale * e std(eps_pos) / std(e) + (1 - rescale) * e, std over the elements of each image.

    Linear in the predictions, so that raw outputs of any one kind may be given. Diffusion-NPO
    takes `eps_neg` from a second model: the one trained on exchanged pairs.

    Args:
        eps_pos: [N, ...] with the prompt.
        eps_neg: [N, ...] without it, or with a negative prompt, or of a negative model.
        guidance: 1 is `eps_pos` alone.
        rescale: Share of the spread that is put back, in [0, 1].

    Source: Ho & Salimans 2022, arXiv:2207.12598; rescale Lin et al. 2023, arXiv:2305.08891;
        Diffusion-NPO's released pipelines.
    """
    eps_pos, eps_neg = full_precision(eps_pos), full_precision(eps_neg)
    mixed = eps_neg + guidance * (eps_pos - eps_neg)
    if rescale == 0.0:
        return mixed
    axes = tuple(range(1, mixed.dim()))
    spread = eps_pos.std(axes, keepdim=True) / mixed.std(axes, keepdim=True)
    return rescale * (mixed * spread) + (1.0 - rescale) * mixed


# Images from prompts: a positive and, where wanted, a negative model, one start noise a seed.
#
# e = e_neg(x, t, empty) + guidance * (e_pos(x, t, prompt) - e_neg(x, t, empty))
#
# The steps are those of diffusers' schedulers; the denoiser is ours, so a pipeline without a VAE
# and a second network for the empty prompt go through the same lines.
#
# Source: Diffusion-NPO (two networks, `pipeline_*double_unet.py`), Lin et al. 2023,
#   arXiv:2305.08891
#     (rescaled guidance).
# Departs: the latents stay in float32 between steps also where the network runs in bfloat16.


def generate(
    model: nn.Module,
    components: Components,
    decoder: Vae | PixelSpace,
    diffusion: DiffusionConfig,
    prompts: Condition,
    empty: Condition | None,
    *,
    seeds: Sequence[int],
    negative_model: nn.Module | None = None,
    batch_size: int = 4,
) -> list[Image]:
    """One image a prompt.

    Args:
        model: The network to sample from; may carry adapters.
        components: What the pipeline's files say.
        decoder: Latents to pixels, on the same device.
        diffusion: `sampling`, `resolution` and the kind of prediction are read.
        prompts: N embedded prompts.
        empty: The empty prompt, one row; not needed with guidance 1 or less.
        seeds: Seed of each image's start noise. `diffusers` gives the same image for
            `generator=torch.Generator("cpu").manual_seed(seed)`.
        negative_model: A second network for the empty prompt.
        batch_size: Images at one time; no image depends on it.

    Raises:
        ConfigError: What the sampler, the guidance or the size cannot be.
    """
    height, width = picture_size(diffusion, decoder.factor)
    shape = (decoder.channels, height // decoder.factor, width // decoder.factor)
    device = next(model.parameters()).device
    pictures: list[Image] = []
    for start in range(0, len(seeds), batch_size):
        part = slice(start, start + batch_size)
        noise = start_noise(seeds[part], shape).to(device)
        latents = denoise(
            model,
            components,
            diffusion,
            prompts.rows(torch.arange(start, start + len(noise))),
            empty,
            noise,
            pixels=(height, width),
            negative_model=negative_model,
        )
        # One by one: decoding a large image takes more memory than a step of the denoiser.
        pictures += [to_picture(decoder.decode(latents[i : i + 1])[0]) for i in range(len(latents))]
    return pictures


@torch.no_grad()
def denoise(
    model: nn.Module,
    components: Components,
    diffusion: DiffusionConfig,
    prompts: Condition,
    empty: Condition | None,
    noise: Tensor,
    *,
    pixels: tuple[int, int],
    negative_model: nn.Module | None = None,
) -> Tensor:
    """Start noise to clean latents.

    Args:
        model: The network to sample from.
        components: What the pipeline's files say.
        diffusion: `sampling` and the kind of prediction are read.
        prompts: N embedded prompts.
        empty: The empty prompt, one row.
        noise: [N, C, H, W], standard normal.
        pixels: Height and width of the images, which SDXL is conditioned on.
        negative_model: A second network for the empty prompt.

    Returns:
        [N, C, H, W] in float32, or float64 where the noise is.
    """
    spec, family = diffusion.sampling, components.family
    has_guidance = spec.guidance > 1.0 and not components.is_distilled
    if negative_model is not None and not has_guidance:
        raise ConfigError(
            f"diffusion.sampling.negative is only read with guidance above 1 (found "
            f"{spec.guidance:g})"
        )
    if has_guidance and empty is None:
        raise ConfigError(f"guidance {spec.guidance:g} needs the empty prompt's embedding")
    scheduler = scheduler_for(components, diffusion, (noise.shape[-2], noise.shape[-1]))
    device, count = noise.device, len(noise)
    dtype = torch.promote_types(noise.dtype, torch.float32)
    positive = family.sized(prompts.to(device), pixels)
    if components.is_distilled:
        positive = positive.with_guidance(spec.guidance)
    negative = None
    if has_guidance and empty is not None:
        negative = family.sized(empty.to(device).repeat(count), pixels)

    def run(network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        times = t.to(device).expand(len(x))
        return family.predict(network, x, times, condition).to(dtype)

    latents = noise.to(dtype) * getattr(scheduler, "init_noise_sigma", 1.0)
    with _evaluating(model, negative_model):
        for t in scheduler.timesteps:  # on the CPU, like the scheduler's own tables
            scale = getattr(scheduler, "scale_model_input", None)
            x = latents if scale is None else scale(latents, t)
            if negative is None:
                output = run(model, x, t, positive)
            else:
                if negative_model is None:  # one network: both branches in one pass
                    both = run(model, torch.cat([x, x]), t, Condition.cat([positive, negative]))
                    pos, neg = both.chunk(2)
                else:
                    pos = run(model, x, t, positive)
                    neg = run(negative_model, x, t, negative)
                output = guided(pos, neg, spec.guidance, spec.rescale)
            latents = scheduler.step(output, t, latents, return_dict=False)[0].to(dtype)
    return latents


def start_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """[N, *shape]: each row from its own seed, drawn on the CPU, so the same on every device."""
    return torch.stack(
        [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )


def to_picture(pixels: Tensor) -> Image:
    """[C, H, W] in [-1, 1] as an 8-bit image; one channel gives a grey one."""
    from PIL import Image as pil

    levels = (pixels.float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8).cpu()
    if len(levels) == 1:
        return pil.fromarray(levels[0].numpy())
    return pil.fromarray(levels.permute(1, 2, 0).contiguous().numpy())


def picture_size(diffusion: DiffusionConfig, factor: int) -> tuple[int, int]:
    """Height and width in pixels.

    Raises:
        ConfigError: A side that is no whole number of latents.
    """
    spec = diffusion.sampling
    size = (spec.height or diffusion.resolution, spec.width or diffusion.resolution)
    if any(side % factor for side in size):
        raise ConfigError(
            f"diffusion.sampling: images of {size[0]} x {size[1]} pixels (height x width) cannot "
            f"be made: each side must be a multiple of {factor}, the size of one latent"
        )
    return size


def scheduler_for(components: Components, diffusion: DiffusionConfig, size: Size) -> Any:
    """diffusers' scheduler for `diffusion.sampling`, with its timesteps set.

    Args:
        components: What the pipeline's files say.
        diffusion: Sampler, number of steps, prediction and noise table.
        size: Height and width of the latents.

    Raises:
        ConfigError: A sampler that does not fit the prediction, or too many steps.
    """
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
    from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
        FlowMatchEulerDiscreteScheduler,
    )

    spec = diffusion.sampling
    config, process = components.scheduler_config, components.process(diffusion)
    is_flow = process.prediction == "flow"
    if spec.num_steps > process.num_timesteps:
        raise ConfigError(
            f"diffusion.sampling.num_steps is {spec.num_steps}, but the model knows "
            f"{process.num_timesteps} levels"
        )
    if spec.clip_sample and spec.sampler != "ddim":
        raise ConfigError("diffusion.sampling.clip_sample is only read with sampler: ddim")
    kind: Any
    changes: dict[str, Any] = {}
    if is_flow:
        if spec.sampler not in ("auto", "euler"):
            raise ConfigError(
                f"diffusion.sampling.sampler is {spec.sampler}, but a flow model is sampled with "
                "euler"
            )
        kind = FlowMatchEulerDiscreteScheduler
    elif spec.sampler == "ddim":
        kind, changes["clip_sample"] = DDIMScheduler, spec.clip_sample
    elif spec.sampler == "euler":
        kind = EulerDiscreteScheduler
        if process.prediction == "sample":
            raise ConfigError(
                "diffusion.sampling.sampler is euler, which cannot step with a network that "
                "predicts the clean image; use ddim or dpmpp"
            )
    else:
        kind = DPMSolverMultistepScheduler
        if config.get("beta_schedule") == "squaredcos_cap_v2":
            changes["lambda_min_clipped"] = -5.1  # as its documentation asks
    if not is_flow:
        changes["prediction_type"] = process.prediction
    if diffusion.zero_terminal_snr:
        # The last level is pure noise and must be the first step, which "leading" leaves out.
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler = kind.from_config(dict(config), **changes)
    components.family.set_timesteps(scheduler, spec.num_steps, size)
    return scheduler


@contextmanager
def _evaluating(*models: nn.Module | None) -> Iterator[None]:
    """Evaluation mode inside the block; every module's own mode comes back after it."""
    modes = [(part, part.training) for model in models if model for part in model.modules()]
    try:
        for part, _ in modes:
            part.training = False
        yield
    finally:
        for part, training in modes:
            part.training = training


# The second network of two-model guidance: the base with a negative change, and a positive one.
#
# W_negative = W_base + a * delta_positive + b * delta_negative
#
# delta_positive is what the run has trained, a is `negative_keeps` and b `negative_weight`. a = 1
# keeps the positive model's offset, as the released scripts do by default; a = 0 is the base with
# the negative change alone.
#
# Source: Diffusion-NPO, `gen.py` and `gen_xl.py`: a = 1 - merge_weight, b = 1.
# Departs: nothing; summed in float64 and rounded once.


def load_negative(
    spec: PictureSampleSpec, model: ModelConfig, policy: nn.Module
) -> nn.Module | None:
    """The negative network on the policy's device; None where the config names none.

    Args:
        spec: `negative` is the final folder of a run, a LoRA (file or folder, in the layout of
            diffusers, kohya or peft), or a folder with a whole U-Net or transformer.
        model: The base that both changes are of.
        policy: The positive model, with or without adapter.

    Raises:
        CheckpointError: The negative model is of another base.
    """
    if spec.negative is None:
        return None
    network = load_denoiser(model.path, model)
    state = network.state_dict()
    with ExitStack() as files, torch.no_grad():
        deltas: list[tuple[Delta, float]] = [
            (open_delta(spec.negative, list(state), files), spec.negative_weight)
        ]
        if spec.negative_keeps:
            deltas.append((_delta_of(policy, list(state)), spec.negative_keeps))
        for name, tensor in state.items():
            if tensor.is_floating_point():
                tensor.copy_(combined(name, tensor, deltas))
    return network.to(next(policy.parameters()).device).requires_grad_(False).eval()


def _delta_of(policy: nn.Module, names: list[str]) -> Delta:
    """What a live policy changes in its base."""
    if isinstance(policy, PeftModel):
        return LoraDelta(lora_of(policy), names)
    state = policy.state_dict()

    def whole(name: str, base: Tensor) -> Change | None:
        return Change(state[name].to(base.device).double(), replaces=True)

    return whole
