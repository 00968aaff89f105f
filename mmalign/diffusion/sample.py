"""Images from prompts: guidance by one or two models, one start noise a seed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from PIL import Image as pil
from PIL.Image import Image
from torch import Tensor, nn

from mmalign.config import DiffusionConfig, ModelConfig, PictureSampleSpec
from mmalign.core.numerics import full_precision
from mmalign.data.example import Example
from mmalign.data.sheet import sheet, write_image
from mmalign.diffusion.cache_plan import Processes, progress
from mmalign.diffusion.components import Components, PixelSpace, Vae, load_denoiser
from mmalign.diffusion.estimators import noise_seed
from mmalign.diffusion.export import lora_of
from mmalign.diffusion.families import Condition
from mmalign.diffusion.inputs import Inputs
from mmalign.diffusion.pictures import Frame, cache_folder, caption_of, open_store
from mmalign.diffusion.process import Size
from mmalign.errors import ConfigError
from mmalign.models.files import state_fingerprint
from mmalign.models.merge import Change, Delta, LoraDelta, combined, open_delta
from mmalign.models.reference import in_mode


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

    e = e_neg(x, t, empty) + guidance * (e_pos(x, t, prompt) - e_neg(x, t, empty))

    The steps are those of diffusers' schedulers; the denoiser is ours, so a pipeline without a VAE
    and a second network for the empty prompt go through the same lines.

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

    Source: Diffusion-NPO (two networks, `pipeline_*double_unet.py`).
    Departs: latents stay in float32 between steps also where the network runs in bfloat16.
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
    device, dtype = noise.device, torch.promote_types(noise.dtype, torch.float32)
    positive = family.sized(prompts.to(device), pixels)
    if components.is_distilled:
        positive = positive.with_guidance(spec.guidance)
    negative = None
    if has_guidance and empty is not None:
        negative = family.sized(empty.to(device).repeat(len(noise)), pixels)

    def run(network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        times = t.to(device).expand(len(x))
        return family.predict(network, x, times, condition).to(dtype)

    latents = noise.to(dtype) * getattr(scheduler, "init_noise_sigma", 1.0)
    scale = getattr(scheduler, "scale_model_input", lambda latents, _: latents)
    networks = [model] if negative_model is None else [model, negative_model]
    with in_mode(*networks, training=False):
        for t in scheduler.timesteps:  # on the CPU, like the scheduler's own tables
            x = scale(latents, t)
            if negative is None:
                output = run(model, x, t, positive)
            elif negative_model is None:  # one network: both branches in one pass
                both = run(model, torch.cat([x, x]), t, Condition.cat([positive, negative]))
                output = guided(*both.chunk(2), spec.guidance, spec.rescale)
            else:
                pos, neg = run(model, x, t, positive), run(negative_model, x, t, negative)
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
    levels = (pixels.float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8).cpu()
    return pil.fromarray((levels[0] if len(levels) == 1 else levels.permute(1, 2, 0)).numpy())


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
    import diffusers

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
    if is_flow and spec.sampler not in ("auto", "euler"):
        raise ConfigError(
            f"diffusion.sampling.sampler is {spec.sampler}, but a flow model is sampled with euler"
        )
    if spec.sampler == "euler" and process.prediction == "sample":
        raise ConfigError(
            "diffusion.sampling.sampler is euler, which cannot step with a network that predicts "
            "the clean image; use ddim or dpmpp"
        )
    kinds = {"ddim": "DDIMScheduler", "euler": "EulerDiscreteScheduler"}
    kind = kinds.get(spec.sampler, "DPMSolverMultistepScheduler")
    changes: dict[str, Any] = {}
    if is_flow:
        kind = "FlowMatchEulerDiscreteScheduler"
    elif spec.sampler == "ddim":
        changes["clip_sample"] = spec.clip_sample
    elif spec.sampler != "euler" and config.get("beta_schedule") == "squaredcos_cap_v2":
        changes["lambda_min_clipped"] = -5.1  # as the solver's documentation asks
    if not is_flow:
        changes["prediction_type"] = process.prediction
    if diffusion.zero_terminal_snr:
        # The last level is pure noise and must be the first step, which "leading" leaves out.
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler = getattr(diffusers, kind).from_config(dict(config), **changes)
    components.family.set_timesteps(scheduler, spec.num_steps, size)
    return scheduler


def load_negative(
    spec: PictureSampleSpec, model: ModelConfig, policy: nn.Module
) -> nn.Module | None:
    """The second network of two-model guidance, on the policy's device; None where none is named.

    W_negative = W_base + negative_keeps * delta_positive + negative_weight * delta_negative, where
    delta_positive is what the run has trained. negative_keeps = 1 keeps the positive model's
    offset, as the released scripts do by default; 0 is the base with the negative change alone.

    Args:
        spec: `negative` is the final folder of a run, a LoRA (file or folder, in the layout of
            diffusers, kohya or peft), or a folder with a whole U-Net or transformer.
        model: The base that both changes are of.
        policy: The positive model, with or without adapter.

    Raises:
        CheckpointError: The negative model is of another base.

    Source: Diffusion-NPO, `gen.py` and `gen_xl.py`: negative_keeps = 1 - merge_weight,
        negative_weight = 1. Summed in float64 and rounded once.
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


def check_sampling(components: Components, diffusion: DiffusionConfig) -> None:
    """Refuse, before training, settings of `diffusion.sampling` that no image can be made with.

    Raises:
        ConfigError: A sampler that does not fit the model, or a size that does not fit the VAE.
    """
    height, width = picture_size(diffusion, components.factor)
    scheduler_for(components, diffusion, (height // components.factor, width // components.factor))


def paint(
    inputs: Inputs,
    model: nn.Module,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int] | None = None,
    negative_model: nn.Module | None = None,
    batch_size: int = 4,
) -> list[Image]:
    """One image a prompt, with the settings of `diffusion.sampling`.

    Args:
        inputs: Embeds the prompts and decodes the latents.
        model: The network to sample from.
        prompts: N prompts.
        seeds: Of each start noise; by default `diffusion.sampling.seed` and those after it.
        negative_model: A second network for the empty prompt.
        batch_size: Images at one time.
    """
    device = next(model.parameters()).device
    diffusion = inputs.config.diffusion
    first = diffusion.sampling.seed
    return generate(
        model,
        inputs.components,
        inputs.vae.to(device),
        diffusion,
        inputs.embed(prompts, device),
        inputs.empty(device) if diffusion.sampling.guidance > 1.0 else None,
        seeds=range(first, first + len(prompts)) if seeds is None else seeds,
        negative_model=negative_model,
        batch_size=batch_size,
    )


def write_samples(
    inputs: Inputs, policy: nn.Module, prompts: Mapping[str, str], run: Path, step: int
) -> list[dict[str, Any]]:
    """Write `samples/step-N/`: an image a prompt, and a sheet beside those of before training.

    Returns:
        A record a prompt, with the image's path inside the run folder.
    """
    spec = inputs.config.diffusion.sampling
    # Read again each time: it may hold a share of what the policy has learned by now.
    negative = load_negative(spec, inputs.config.model, policy)
    images = paint(inputs, policy, list(prompts.values()), negative_model=negative)
    inputs.release()
    folder, before = run / "samples" / f"step-{step}", run / "samples" / "step-0"
    names = [f"{i:03d}.png" for i in range(len(images))]
    for name, image in zip(names, images, strict=True):
        write_image(image, folder / name)
    columns: list[tuple[str, Sequence[Image]]] = [(f"step {step}", images)]
    if step and all((before / name).is_file() for name in names):
        columns.insert(0, ("before", [pil.open(before / name).convert("RGB") for name in names]))
    write_image(sheet(list(prompts.values()), columns), folder / "sheet.png")
    return [
        {"id": row, "prompt": prompt, "seed": spec.seed + i, "image": f"samples/step-{step}/{name}"}
        for i, ((row, prompt), name) in enumerate(zip(prompts.items(), names, strict=True))
    ]


class Generated:
    """Clean latents for prompts that have no image: generated by the model before training.

    Self-NPO needs images only as places to start noising from; with those of the model itself it
    needs no data but prompts. They are kept on disk, so that a resumed run goes on with the same.

    Args:
        inputs: Embeds prompts; its config says how images are generated.
        model: The network as it is before training.

    Source: Self-NPO's paper calls the method data-free.
    Departs: the released scripts start from a folder of images.
    """

    AT_ONCE = 16

    def __init__(self, inputs: Inputs, model: nn.Module) -> None:
        config = inputs.config
        self._inputs, self._model, self._seed = inputs, model, config.train.seed
        self._size = picture_size(config.diffusion, inputs.components.factor)
        sampling = config.diffusion.sampling.model_dump(mode="json", exclude={"seed", "negative"})
        self._settings = {
            "holds": "generated latents",
            "model": state_fingerprint(model),
            "sampling": json.dumps(sampling, sort_keys=True),
            "size": str(self._size),
            "seed": str(self._seed),
        }
        self._store = open_store(cache_folder(config), self._settings)

    def write(self, examples: Sequence[Example]) -> None:
        """Generate what is not there yet; every process its share.

        Images are made in the same groups whichever of them are there, so that their last bits
        do not depend on an interruption.
        """
        captions = {self._key(row): caption_of(row, 0) for row in examples}
        place = Processes.launched()
        mine = [key for key in captions if place.is_mine(key)]
        groups = [mine[i : i + self.AT_ONCE] for i in range(0, len(mine), self.AT_ONCE)]
        todo = [(group, lacking) for group in groups if (lacking := self._store.missing(group))]
        total = sum(len(lacking) for _, lacking in todo)
        with progress("clean images", total, shown=place.is_main) as seen, self._store:
            for group, lacking in todo:
                found = dict(zip(group, self._generate(group, captions), strict=True))
                for key in lacking:
                    self._store.put(key, {"mean": found[key].cpu().numpy()})
                seen(len(lacking))
        place.wait()
        # Opened again, with what the other processes wrote.
        self._store = open_store(cache_folder(self._inputs.config), self._settings)

    def get(self, example: Example, flip: bool) -> tuple[Tensor, None, list[Frame]]:
        """Latents [1, C, h, w] of a row, and its frame; there is nothing to mirror."""
        entry = self._store.get(self._key(example))
        assert entry is not None, "written before training"
        return torch.from_numpy(entry["mean"])[None], None, [Frame(self._size, (0, 0), self._size)]

    def _generate(self, keys: Sequence[str], captions: Mapping[str, str]) -> Tensor:
        inputs, components = self._inputs, self._inputs.components
        device = next(self._model.parameters()).device
        height, width = (side // components.factor for side in self._size)
        seeds = [noise_seed(self._seed, key) for key in keys]
        return denoise(
            self._model,
            components,
            inputs.config.diffusion,
            inputs.embed([captions[key] for key in keys], device),
            inputs.empty(device),
            start_noise(seeds, (components.latent_channels, height, width)).to(device),
            pixels=self._size,
        )

    def _key(self, example: Example) -> str:
        return self._store.key(caption_of(example, 0))
