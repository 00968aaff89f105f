"""FLUX: equal to its own pipeline in prompts, velocity, timesteps, samples and exported LoRAs."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from picture_runs import Data, configured, write_data
from torch import Tensor

from mmalign.config import DiffusionConfig, ModelConfig, PictureSampleSpec
from mmalign.diffusion.adapter import DiffusionAdapter
from mmalign.diffusion.components import load_components, load_vae
from mmalign.diffusion.conditioning import PromptEncoder, load_tokenizers
from mmalign.diffusion.export import load_trained
from mmalign.diffusion.families import FAMILIES, Condition
from mmalign.diffusion.process import RectifiedFlow
from mmalign.diffusion.sample import denoise, start_noise
from mmalign.diffusion.tools import DiffusionTools
from mmalign.models.lora_files import DIFFUSERS_LORA
from mmalign.models.merge import merge_checkpoints
from mmalign.preflight.check import check_config
from mmalign.train.loop import train

FLUX = FAMILIES["flux"]
PROMPTS = ["a red cat", "a dog"]
both = pytest.mark.parametrize("name", ["flux_dir", "schnell_dir"])


def loaded(folder: Path, **options: Any) -> Any:
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

    pipe: Any = FluxPipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def pipeline(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return loaded(folder, torch_dtype=dtype)


def packed(x: Tensor) -> Tensor:
    """[N, C, h, w] as tokens of 2 x 2 latents; written out by hand."""
    n, c, h, w = x.shape
    return x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, -1, 4 * c)


def condition(guidance: float | None) -> Condition:
    generator = torch.Generator().manual_seed(3)
    told = Condition(*(torch.randn(*s, generator=generator) for s in ((2, 7, 64), (2, 24))))
    return told if guidance is None else told.with_guidance(guidance)


@torch.no_grad()
def test_prompts_are_those_of_the_pipeline(flux_dir: Path) -> None:
    embeds, pooled, _ = pipeline(flux_dir).encode_prompt([*PROMPTS, ""], device="cpu")
    found = PromptEncoder(flux_dir).encode([*PROMPTS, ""])
    assert found.embeds.shape == (3, 512, 64)
    assert torch.equal(found.embeds, embeds)
    assert found.pooled is not None
    assert torch.equal(found.pooled, pooled)
    assert load_tokenizers(flux_dir).limit == 512


@torch.no_grad()
@both
def test_velocity_is_that_of_the_transformer(name: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(name)
    guidance = 2.5 if name == "flux_dir" else None
    told, x = condition(guidance), torch.randn(2, 16, 4, 6)
    ids = torch.tensor([[0.0, i, j] for i in range(2) for j in range(3)])
    expected = (
        pipeline(folder)
        .transformer(
            hidden_states=packed(x),
            timestep=torch.tensor([0.01, 0.8]),
            guidance=None if guidance is None else torch.full((2,), guidance),
            pooled_projections=told.pooled,
            encoder_hidden_states=told.embeds,
            txt_ids=torch.zeros(7, 3),
            img_ids=ids,
        )
        .sample
    )
    model = load_components(ModelConfig(path=str(folder)), DiffusionConfig()).denoiser
    found = FLUX.predict(model, x, torch.tensor([10.0, 800.0]), told)
    torch.testing.assert_close(packed(found), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_timesteps_of_half_precision_are_the_pipelines(flux_dir: Path) -> None:
    """Of 1000 timesteps 500 stay distinct; a script that divides in float32 has 183 others."""
    t, half = torch.arange(1.0, 1001.0), torch.bfloat16
    seen: list[Tensor] = []
    components = load_components(
        ModelConfig(path=str(flux_dir), dtype="bfloat16"), DiffusionConfig()
    )
    model: Any = components.denoiser
    model.time_text_embed.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    told = condition(3.5).rows(torch.zeros(1000, dtype=torch.long))
    FLUX.predict(model, torch.zeros(1000, 16, 2, 2), t, told)
    (found,) = seen
    assert torch.equal(found, t.to(half) / 1000 * 1000)
    assert len(found.unique()) == 500
    assert int((found != (t / 1000).to(half) * 1000).sum()) == 183
    pipe = pipeline(flux_dir, half)
    own: list[Tensor] = []
    hook = pipe.transformer.time_text_embed.register_forward_pre_hook(
        lambda _, given: own.append(given[0])
    )
    pipe("a cat", num_inference_steps=8, height=32, width=32, output_type="latent")
    hook.remove()
    seen.clear()
    FLUX.predict(model, torch.zeros(8, 16, 2, 2), pipe.scheduler.timesteps, told.rows(slice(8)))
    assert torch.equal(seen[0], torch.cat(own))


def test_levels_follow_the_size_of_an_image(flux_dir: Path, schnell_dir: Path) -> None:
    """Levels of a walk are those of the sampler at that size; without the shift they are even."""
    for folder, num in ((flux_dir, 8), (schnell_dir, 4)):
        components = load_components(ModelConfig(path=str(folder)), DiffusionConfig())
        process = components.process(DiffusionConfig())
        ends: list[float] = []
        for size in ((64, 64), (128, 96)):
            scheduler = pipeline(folder).scheduler
            FLUX.set_timesteps(scheduler, num, size)
            levels = process.at(size).grid(num)
            torch.testing.assert_close(
                torch.tensor(levels[:0:-1], dtype=torch.float32), scheduler.sigmas[:-1]
            )
            assert process.at(size) is process.at(size)
            ends.append(float(process.at(size).timestep(torch.tensor([0.5]))))
        assert (ends[0] < ends[1]) == (folder == flux_dir)
    shift = FAMILIES["flux"].process({"_class_name": "FlowMatch", "use_dynamic_shifting": True})
    assert isinstance(shift.at((64, 64)), RectifiedFlow)
    # mu is 1.15 at 4096 tokens, 128 x 128 latents: 1024 x 1024 pixels.
    assert shift.at((128, 128)).shift == pytest.approx(2.718281828**1.15)  # pyright: ignore


@both
def test_samples_are_those_of_the_pipeline(name: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(name)
    found = ours(folder)
    torch.testing.assert_close(found, theirs(folder, pipeline(folder)), rtol=0.0, atol=1e-4)


def ours(folder: Path, model: Any = None, guidance: float = 1.0) -> Tensor:
    spec = PictureSampleSpec(num_steps=3, guidance=guidance)
    settings = DiffusionConfig(resolution=64, sampling=spec)
    components = load_components(ModelConfig(path=str(folder)), settings)
    encoder, vae = PromptEncoder(folder), load_vae(folder, settings)
    model = components.denoiser if model is None else model
    noise, size = start_noise([5, 6], (16, 8, 8)), (64, 64)
    told = encoder.encode(PROMPTS)
    latents = denoise(model, components, settings, told, None, noise, pixels=size)
    return vae.decode(latents)


def theirs(folder: Path, pipe: Any, guidance: float = 1.0) -> Tensor:
    images = pipe(
        PROMPTS,
        num_inference_steps=3,
        guidance_scale=guidance,
        height=64,
        width=64,
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)],
        output_type="latent",
    ).images
    latents = pipe._unpack_latents(images, 64, 64, 8)
    config = pipe.vae.config
    with torch.no_grad():
        raw = latents / config.scaling_factor + config.shift_factor
        return pipe.vae.decode(raw).sample


def test_guidance_is_an_input_and_no_second_call(flux_dir: Path) -> None:
    strong = ours(flux_dir, guidance=4.0)
    torch.testing.assert_close(
        strong, theirs(flux_dir, pipeline(flux_dir), 4.0), rtol=0.0, atol=1e-4
    )
    assert not torch.allclose(strong, ours(flux_dir, guidance=1.0))


# -- runs --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return write_data(tmp_path_factory.mktemp("data"), "pairs", side=32)


SECTIONS: dict[str, dict[str, Any]] = {
    "LoRA": {"sample": {"prompts": ["a red cat"]}},
    "all weights": {"model": {"lora": None}},
    "caches": {"reference": {"kind": "cached"}, "diffusion": {"cache": "on", "num_draws": 2}},
    "inversion": {
        "objective": {"name": "inpo"},
        "diffusion": {"estimator": {"kind": "ddim_inversion", "num_steps": 2}},
    },
}


@pytest.mark.runs
@pytest.mark.parametrize(
    ("kind", "name"),
    [*((kind, "flux_dir") for kind in SECTIONS), ("LoRA", "schnell_dir")],
)
def test_two_steps_and_the_exported_files(
    kind: str, name: str, data: Data, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """What diffusers paints with the files is what the trained policy paints."""
    folder: Path = request.getfixturevalue(name)
    train_section = {"num_steps": 2, "batch_size": 2, "lr": 0.03, "num_threads": 1}
    config = configured(
        tmp_path, folder, data["pairs"], **(SECTIONS[kind] | {"train": train_section})
    )
    needs = check_config(config).needs
    if kind == "caches":
        assert "captions to write" in DiffusionTools().plan_cache(config, needs)
        assert "written" in DiffusionTools().write_cache(config, needs)
    train(config)
    final = config.output / "final"
    policy: Any = load_trained(DiffusionAdapter.build(config, needs).policy, final)
    pipe = loaded(folder)
    if config.model.lora is None:
        part = type(pipe.transformer).from_pretrained(final / "transformer")
        pipe = loaded(folder, transformer=part)
    else:
        assert [file.name for file in final.glob("*.safetensors")] == [DIFFUSERS_LORA]
        pipe.load_lora_weights(str(final))
        assert pipe.get_active_adapters()
    found = theirs(folder, pipe)
    torch.testing.assert_close(found, ours(folder, policy), rtol=0.0, atol=1e-4)
    assert (found - theirs(folder, pipeline(folder))).abs().max() > 1e-3
    if kind == "LoRA":
        merged = merge_checkpoints(folder, [(final, 1.0)], tmp_path / "merged")
        torch.testing.assert_close(theirs(folder, loaded(merged)), found, rtol=0.0, atol=1e-4)
    if config.sample.prompts:
        assert (config.output / "samples" / "step-2" / "000.png").is_file()


@pytest.mark.parametrize(
    ("name", "diffusion", "message"),
    [
        ("sd3_dir", {"embedded_guidance": 2.0}, "only models distilled with guidance are given"),
        ("schnell_dir", {"embedded_guidance": 2.0}, "only models distilled with guidance are"),
        ("flux_dir", {"sampling": {"negative": "x"}}, "models distilled with guidance, as .* are"),
        (
            "flux_dir",
            {"time_ids": "constant"},
            "only SDXL is conditioned on sizes.* of the family flux",
        ),
    ],
)
def test_settings_that_a_model_does_not_read_are_refused(
    name: str,
    diffusion: dict[str, Any],
    message: str,
    data: Data,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    from mmalign.core import Needs
    from mmalign.errors import ConfigError

    folder: Path = request.getfixturevalue(name)
    config = configured(tmp_path, folder, data["pairs"], diffusion=diffusion)
    with pytest.raises(ConfigError, match=message):
        DiffusionAdapter.build(config, Needs(reference=True))


def test_the_guidance_of_training_counts(flux_dir: Path, data: Data, tmp_path: Path) -> None:
    from mmalign.core import Needs

    scores: list[Tensor] = []
    for scale in (3.5, 1.0):
        config = configured(
            tmp_path, flux_dir, data["pairs"], diffusion={"embedded_guidance": scale}
        )
        adapter = DiffusionAdapter.build(config, Needs())
        from mmalign.models.adapter import load_usable

        rows = load_usable(config, Needs())[0]
        with torch.no_grad():
            scores.append(adapter(adapter.collate(rows, list(range(len(rows)))), Needs()).policy)
    assert not torch.equal(scores[0], scores[1])
