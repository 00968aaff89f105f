"""One call for all families: equal to the pipelines' own, and clear where something is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mmalign.config import ModelConfig
from mmalign.diffusion.components import load_denoiser
from mmalign.diffusion.families import FAMILIES, Condition
from mmalign.errors import ConfigError, NeedsError


def denoiser_of(folder: Path, **settings: Any) -> Any:
    return load_denoiser(str(folder), ModelConfig(path=str(folder), **settings))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for the order of sums, which differs between two matrix libraries."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def inputs(family: str, rows: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """Latents, timesteps and a condition of the tiny pipelines."""
    width, pooled, places = {"sd": (32, 0, 77), "sdxl": (80, 24, 77), "sd3": (64, 40, 333)}[family]
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    x = normal(rows, 16 if family == "sd3" else 4, 8, 8)
    t = torch.tensor([10.0, 800.0]) if family == "sd3" else torch.tensor([10, 800])
    ids = torch.tensor([[64.0, 96, 0, 3, 64, 64]] * rows) if family == "sdxl" else None
    told = Condition(normal(rows, places, width), normal(rows, pooled) if pooled else None, ids)
    return x, t[:rows], told


@torch.no_grad()
def test_equal_to_the_pipelines_own_networks(sd15_dir: Path, sdxl_dir: Path, sd3_dir: Path) -> None:
    import diffusers

    x, t, told = inputs("sd")
    unet = diffusers.StableDiffusionPipeline.from_pretrained(sd15_dir).unet
    expected = unet(x, t, encoder_hidden_states=told.embeds).sample
    close(FAMILIES["sd"].predict(denoiser_of(sd15_dir), x, t, told), expected)

    x, t, told = inputs("sdxl")
    unet = diffusers.StableDiffusionXLPipeline.from_pretrained(sdxl_dir).unet
    added = {"text_embeds": told.pooled, "time_ids": told.time_ids}
    expected = unet(
        x, t, encoder_hidden_states=told.embeds, added_cond_kwargs=added, return_dict=False
    )[0]
    close(FAMILIES["sdxl"].predict(denoiser_of(sdxl_dir), x, t, told), expected)

    x, t, told = inputs("sd3")
    transformer = diffusers.StableDiffusion3Pipeline.from_pretrained(sd3_dir).transformer
    expected = transformer(
        hidden_states=x,
        timestep=t,
        encoder_hidden_states=told.embeds,
        pooled_projections=told.pooled,
    ).sample
    close(FAMILIES["sd3"].predict(denoiser_of(sd3_dir), x, t, told), expected)


@torch.no_grad()
@pytest.mark.parametrize(("name", "family"), [("sd15", "sd"), ("sdxl", "sdxl"), ("sd3", "sd3")])
def test_rows_do_not_see_each_other(name: str, family: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(f"{name}_dir")
    model = denoiser_of(folder, dtype="float64")
    x, t, told = inputs(family, dtype=torch.float64)
    both = FAMILIES[family].predict(model, x, t, told)
    for row in range(2):
        one = slice(row, row + 1)
        alone = FAMILIES[family].predict(model, x[one], t[one], told.rows(one))
        torch.testing.assert_close(alone, both[one], rtol=1e-9, atol=1e-11)


@torch.no_grad()
def test_every_part_of_a_condition_counts(sdxl_dir: Path) -> None:
    model = denoiser_of(sdxl_dir)
    x, t, told = inputs("sdxl")
    assert told.pooled is not None
    assert told.time_ids is not None
    first = FAMILIES["sdxl"].predict(model, x, t, told)
    others = [
        Condition(told.embeds + 1, told.pooled, told.time_ids),
        Condition(told.embeds, told.pooled + 1, told.time_ids),
        Condition(told.embeds, told.pooled, told.time_ids + 40),
    ]
    assert all(not torch.equal(first, FAMILIES["sdxl"].predict(model, x, t, c)) for c in others)


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_inputs_follow_the_networks_dtype(sdxl_dir: Path, dtype: str) -> None:
    x, t, told = inputs("sdxl")
    found = FAMILIES["sdxl"].predict(denoiser_of(sdxl_dir, dtype=dtype), x, t, told)
    assert found.dtype == getattr(torch, dtype)
    exact = FAMILIES["sdxl"].predict(denoiser_of(sdxl_dir), x, t, told)
    tolerance = 0.05 if dtype == "bfloat16" else 1e-4
    torch.testing.assert_close(found.float(), exact, rtol=tolerance, atol=tolerance)


def test_what_sdxl_misses_is_named(sdxl_dir: Path) -> None:
    model = denoiser_of(sdxl_dir)
    x, t, told = inputs("sdxl")
    with pytest.raises(NeedsError, match="SDXL needs time ids"):
        FAMILIES["sdxl"].predict(model, x, t, Condition(told.embeds, told.pooled))
    with pytest.raises(NeedsError, match="SDXL needs pooled embeddings"):
        FAMILIES["sdxl"].predict(model, x, t, Condition(told.embeds, None, told.time_ids))
    five = told.time_ids[:, :5]
    with pytest.raises(NeedsError, match=r"6 time ids an image .* found 5"):
        FAMILIES["sdxl"].predict(model, x, t, Condition(told.embeds, told.pooled, five))


def test_what_sd3_misses_is_named(sd3_dir: Path) -> None:
    x, t, told = inputs("sd3")
    with pytest.raises(NeedsError, match="SD3 needs pooled embeddings"):
        FAMILIES["sd3"].predict(denoiser_of(sd3_dir), x, t, Condition(told.embeds))


def test_embeddings_of_another_model_are_refused(sd15_dir: Path) -> None:
    x, t, _ = inputs("sd")
    _, _, other = inputs("sdxl")
    with pytest.raises(ConfigError, match="80 numbers a token, but the denoiser reads 32"):
        FAMILIES["sd"].predict(denoiser_of(sd15_dir), x, t, other)


def test_conditions_are_cut_repeated_and_joined() -> None:
    told = Condition(torch.arange(6.0).view(3, 1, 2), torch.arange(3.0)[:, None])
    assert len(told) == 3
    assert told.rows(torch.tensor([2, 0])).embeds[:, 0, 0].tolist() == [4.0, 0.0]
    repeated = told.repeat(2)
    assert repeated.pooled is not None
    assert repeated.pooled[:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert repeated.time_ids is None
    joined = Condition.cat([told, told.rows(slice(0, 1))])
    assert joined.embeds[:, 0, 0].tolist() == [0.0, 2.0, 4.0, 0.0]
    with pytest.raises(NeedsError, match="only some of them have pooled"):
        Condition.cat([told, Condition(told.embeds)])


def test_time_ids_keep_their_precision() -> None:
    told = Condition(torch.ones(1, 1, 2), torch.ones(1, 2), torch.tensor([[1025.0] * 6]))
    low = told.to("cpu", torch.bfloat16)
    assert low.embeds.dtype == torch.bfloat16
    assert low.time_ids is not None
    assert low.time_ids[0, 0] == 1025
