"""Sampling: equal to diffusers' own pipelines, the same for any batch, two models for guidance."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import run_config
from torch import Tensor, nn

from mmalign.config import DiffusionConfig, LoraSpec, ModelConfig, PictureSampleSpec
from mmalign.diffusion.components import Components, load_components, load_denoiser, load_vae
from mmalign.diffusion.conditioning import PromptEncoder
from mmalign.diffusion.export import save_trained
from mmalign.diffusion.families import Condition
from mmalign.diffusion.sample import denoise, generate, load_negative, scheduler_for, start_noise
from mmalign.errors import CheckpointError, ConfigError
from mmalign.models import lora

PROMPTS = ["a red cat", "a dog"]
TARGETS = LoraSpec(rank=2, alpha=8, targets=["to_q", "to_v"])


class Studio:
    """Everything that sampling from one pipeline takes."""

    def __init__(self, folder: Path, *, size: int, **sampling: Any) -> None:
        self.config = DiffusionConfig(
            resolution=size, sampling=PictureSampleSpec.model_validate({"num_steps": 3, **sampling})
        )
        self.model_config = ModelConfig(path=str(folder))
        self.components: Components = load_components(self.model_config, self.config)
        self.decoder = load_vae(folder, self.config)
        encoder = PromptEncoder(folder)
        self.prompts, self.empty = encoder.encode(PROMPTS), encoder.encode([""])
        self.size = size

    def latents(self, model: nn.Module | None = None, **options: Any) -> Tensor:
        side = self.size // self.decoder.factor
        return denoise(
            model or self.components.denoiser,
            self.components,
            self.config,
            self.prompts,
            self.empty,
            start_noise([5, 6], (self.decoder.channels, side, side)),
            pixels=(self.size, self.size),
            **options,
        )

    def pictures(self, seeds: list[int], **options: Any) -> list[np.ndarray]:
        images = generate(
            self.components.denoiser,
            self.components,
            self.decoder,
            self.config,
            self.prompts,
            self.empty,
            seeds=seeds,
            **options,
        )
        return [np.asarray(image) for image in images]


def shaken(model: nn.Module, size: float = 0.1) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * size)
    return model


def theirs(
    folder: Path, studio: Studio, change: Callable[[Any], Any] | None = None, **options: Any
) -> Tensor:
    """Latents of diffusers' own pipeline from the same start noise."""
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if change is not None:
        pipe.scheduler = change(pipe.scheduler.config)
    spec = studio.config.sampling
    return pipe(
        PROMPTS,
        num_inference_steps=spec.num_steps,
        guidance_scale=spec.guidance,
        height=studio.size,
        width=studio.size,
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)],
        output_type="latent",
        **options,
    ).images


def sampler(name: str, **changes: Any) -> Callable[[Any], Any]:
    import diffusers

    return lambda config: getattr(diffusers, name).from_config(config, **changes)


@pytest.mark.parametrize(
    ("settings", "name", "options"),
    [
        ({"sampler": "auto"}, "DPMSolverMultistepScheduler", {}),
        ({"sampler": "ddim", "rescale": 0.7}, "DDIMScheduler", {"guidance_rescale": 0.7}),
        ({"sampler": "euler", "guidance": 1.0}, "EulerDiscreteScheduler", {}),
    ],
    ids=["dpmpp", "ddim-rescaled", "euler-unguided"],
)
def test_sd_equals_diffusers(
    sd15_dir: Path, settings: dict[str, Any], name: str, options: dict[str, Any]
) -> None:
    studio = Studio(sd15_dir, size=64, **settings)
    clip = {"clip_sample": False} if name == "DDIMScheduler" else {}
    expected = theirs(sd15_dir, studio, sampler(name, **clip), **options)
    torch.testing.assert_close(studio.latents(), expected, rtol=0.0, atol=1e-4)


def test_sdxl_equals_diffusers(sdxl_dir: Path) -> None:
    """Zeros for the missing negative prompt and the size as time ids, as its pipeline has them."""
    studio = Studio(sdxl_dir, size=64, sampler="euler")
    torch.testing.assert_close(studio.latents(), theirs(sdxl_dir, studio), rtol=0.0, atol=1e-4)


def test_sd3_equals_diffusers(sd3_dir: Path) -> None:
    studio = Studio(sd3_dir, size=64)
    torch.testing.assert_close(studio.latents(), theirs(sd3_dir, studio), rtol=0.0, atol=1e-4)


def test_pictures_equal_diffusers(sd15_dir: Path) -> None:
    """From the seed alone to the last byte of the image, but for rounding."""
    import diffusers

    studio = Studio(sd15_dir, size=64, sampler="dpmpp")
    pipe = diffusers.DiffusionPipeline.from_pretrained(sd15_dir)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = sampler("DPMSolverMultistepScheduler")(pipe.scheduler.config)
    expected = pipe(
        PROMPTS,
        num_inference_steps=3,
        height=64,
        width=64,
        generator=[torch.Generator().manual_seed(seed) for seed in (8, 9)],
    ).images
    for ours, image in zip(studio.pictures([8, 9]), expected, strict=True):
        assert np.abs(ours.astype(int) - np.asarray(image).astype(int)).max() <= 1


def test_a_picture_depends_on_its_seed_and_not_on_its_batch(digits_dir: Path) -> None:
    studio = Studio(digits_dir, size=8, sampler="ddim", clip_sample=True)
    together = studio.pictures([3, 4])
    alone = studio.pictures([3, 4], batch_size=1)
    assert together[0].shape == (8, 8)  # one channel, no VAE: a grey image of the same size
    for one, other in zip(together, alone, strict=True):
        assert np.abs(one.astype(int) - other.astype(int)).max() <= 1
    assert np.abs(together[0].astype(int) - studio.pictures([4, 4])[0].astype(int)).max() > 10


def test_sampling_leaves_the_model_as_it_was(digits_dir: Path) -> None:
    studio = Studio(digits_dir, size=8)
    model = studio.components.denoiser.train()
    model.get_submodule("mid_block").eval()
    studio.latents()
    assert model.training
    assert not model.get_submodule("mid_block").training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_equal_negative_model_changes_nothing(digits_dir: Path) -> None:
    studio = Studio(digits_dir, size=8, guidance=2.0)
    twin = load_denoiser(str(digits_dir), studio.model_config)
    expected = studio.latents()
    torch.testing.assert_close(studio.latents(negative_model=twin), expected, rtol=0, atol=1e-5)
    other = shaken(twin)
    assert (studio.latents(negative_model=other) - expected).abs().max() > 1e-3


def test_the_negative_model_sees_the_empty_prompt_and_the_same_latents(digits_dir: Path) -> None:
    """e = e_neg(x, empty) + g (e_pos(x, prompt) - e_neg(x, empty)), written out for one step."""
    studio = Studio(digits_dir, size=8, guidance=3.0, num_steps=1, sampler="ddim")
    positive = studio.components.denoiser
    negative = shaken(load_denoiser(str(digits_dir), studio.model_config))
    noise = start_noise([5, 6], (1, 8, 8))
    scheduler = scheduler_for(studio.components, studio.config, (8, 8))
    t = scheduler.timesteps[0]
    with torch.no_grad():
        e_pos = positive(noise, t, studio.prompts.embeds).sample
        e_neg = negative(noise, t, studio.empty.embeds.expand(2, -1, -1)).sample
    expected = scheduler.step(e_neg + 3.0 * (e_pos - e_neg), t, noise).prev_sample
    found = studio.latents(negative_model=negative)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-5)


def test_bfloat16_networks_keep_float32_latents(digits_dir: Path) -> None:
    studio = Studio(digits_dir, size=8)
    exact = studio.latents()
    found = studio.latents(studio.components.denoiser.bfloat16())
    assert found.dtype == torch.float32
    assert 0 < (found - exact).abs().mean() < 0.1 * exact.abs().mean()


# Negative models from files


def lora_policy(studio: Studio) -> nn.Module:
    base = load_denoiser(studio.model_config.path, studio.model_config)
    return shaken(lora.attach(base, TARGETS, task=None))


def saved(studio: Studio, policy: nn.Module, folder: Path) -> Path:
    run = run_config(modality="diffusion", model={"path": studio.model_config.path})
    save_trained(policy, studio.components, folder, run)
    return folder


def merged_state(policy: nn.Module) -> dict[str, Tensor]:
    from copy import deepcopy

    return dict(lora.merge(deepcopy(policy)).state_dict())  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "keeps",
    [pytest.param(0.0, marks=pytest.mark.slow), pytest.param(1.0, marks=pytest.mark.slow), 0.3],
)
def test_negative_lora_beside_a_lora_policy(digits_dir: Path, tmp_path: Path, keeps: float) -> None:
    """W = base + keeps * (positive - base) + weight * (negative - base)"""
    studio = Studio(digits_dir, size=8)
    positive, other = lora_policy(studio), lora_policy(studio)
    folder = saved(studio, other, tmp_path / "final")
    spec = PictureSampleSpec(negative=folder, negative_keeps=keeps, negative_weight=0.5)
    network = load_negative(spec, studio.model_config, positive)
    assert network is not None
    assert not network.training
    base = studio.components.denoiser.state_dict()
    pos, neg = merged_state(positive), merged_state(other)
    moved = 0
    for name, tensor in network.state_dict().items():
        expected = base[name] + keeps * (pos[name] - base[name]) + 0.5 * (neg[name] - base[name])
        torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-6)
        moved += not torch.equal(tensor, base[name])
    assert moved >= 4


def test_negative_of_whole_weights_beside_a_whole_policy(digits_dir: Path, tmp_path: Path) -> None:
    studio = Studio(digits_dir, size=8)
    positive = shaken(load_denoiser(str(digits_dir), studio.model_config))
    other = shaken(load_denoiser(str(digits_dir), studio.model_config))
    folder = saved(studio, other, tmp_path / "final")
    base, pos, neg = (m.state_dict() for m in (studio.components.denoiser, positive, other))
    for path, keeps in ((folder, 1.0), (folder / "unet", 0.0)):
        spec = PictureSampleSpec(negative=path, negative_keeps=keeps)
        network = load_negative(spec, studio.model_config, positive)
        assert network is not None
        for name, tensor in network.state_dict().items():
            expected = neg[name] + keeps * (pos[name] - base[name])
            torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-6)


def test_no_negative_model_by_default(digits_dir: Path) -> None:
    studio = Studio(digits_dir, size=8)
    assert load_negative(PictureSampleSpec(), studio.model_config, nn.Identity()) is None


# Refusals


@pytest.mark.runs
def test_what_cannot_be_sampled_is_refused(digits_dir: Path, sd15_dir: Path, sd3_dir: Path) -> None:
    studio = Studio(digits_dir, size=8, guidance=1.0)
    with pytest.raises(ConfigError, match="only read with guidance above 1"):
        studio.latents(negative_model=studio.components.denoiser)
    with pytest.raises(ConfigError, match="the model knows 1000 levels"):
        Studio(digits_dir, size=8, num_steps=1001).latents()
    with pytest.raises(ConfigError, match="only read with sampler: ddim"):
        Studio(digits_dir, size=8, clip_sample=True).latents()
    with pytest.raises(ConfigError, match=r"60 x 60 pixels .* multiple of 8"):
        Studio(sd15_dir, size=60).pictures([1, 2])
    with pytest.raises(ConfigError, match="a flow model is sampled with euler"):
        Studio(sd3_dir, size=64, sampler="ddim").latents()
    guided = Studio(digits_dir, size=8)
    guided.empty = None  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ConfigError, match="needs the empty prompt"):
        guided.latents()
    studio.components.scheduler_config["prediction_type"] = "sample"
    euler = DiffusionConfig(sampling=PictureSampleSpec(sampler="euler"))
    with pytest.raises(ConfigError, match="predicts the clean image"):
        scheduler_for(studio.components, euler, (8, 8))


def test_a_negative_model_of_another_base_is_refused(
    digits_dir: Path, sd15_dir: Path, tmp_path: Path
) -> None:
    other = Studio(sd15_dir, size=64)
    folder = saved(other, shaken(other.components.denoiser), tmp_path / "f")
    studio = Studio(digits_dir, size=8)
    spec = PictureSampleSpec(negative=folder)
    with pytest.raises(CheckpointError, match="Merge checkpoints of one model"):
        load_negative(spec, studio.model_config, studio.components.denoiser)


def test_zero_terminal_snr_starts_at_pure_noise(sd15_dir: Path) -> None:
    studio = Studio(sd15_dir, size=64)
    studio.components.scheduler_config["prediction_type"] = "v_prediction"
    spec = PictureSampleSpec(sampler="ddim", num_steps=4)
    settings = DiffusionConfig(zero_terminal_snr=True, sampling=spec)
    scheduler = scheduler_for(studio.components, settings, (8, 8))
    assert scheduler.timesteps[0] == 999
    assert scheduler.alphas_cumprod[999] == 0.0


def test_conditions_are_told_the_size_of_the_picture(sdxl_dir: Path) -> None:
    studio = Studio(sdxl_dir, size=64, sampler="euler", guidance=1.0, num_steps=1)
    seen: list[Condition] = []
    model = studio.components.denoiser
    model.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["added_cond_kwargs"]["time_ids"]),
        with_kwargs=True,
    )
    studio.latents()
    assert seen[0].tolist() == [[64, 64, 0, 0, 64, 64]] * 2  # pyright: ignore
