"""Denoisers on CUDA: the numbers of a CPU, whole runs, caches, images and files."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import picture_runs
import pytest
import torch
from devices import HALF, NEEDS_CUDA, cached, changed, command, exact, first_step, near, on
from PIL import Image

from mmalign.train.loop import train
from mmalign.train.metrics import read_json

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from mmalign.config import RunConfig

    Make = Callable[..., RunConfig]

pytestmark = NEEDS_CUDA

FAMILIES = ("sd15", "sdxl", "sd3")
WHOLE: dict[str, Any] = {"model": {"lora": None}}
GENTLE = {"name": "diffusion_dpo", "beta": 20}  # far from where a pair is decided


@pytest.fixture
def make(tmp_path: Path, request: pytest.FixtureRequest) -> Make:
    """Config of a run of a family on pairs of images, with sections exchanged."""
    files = picture_runs.write_data(tmp_path / "data", "pairs", "prompts", num=6)

    def made(family: str, /, *, rows: str = "pairs", **sections: Any) -> RunConfig:
        folder = request.getfixturevalue(f"{family}_dir")
        sections = {"objective": GENTLE, **sections}
        return picture_runs.configured(tmp_path, folder, files[rows], **sections)

    return made


INVERSION = {"kind": "ddim_inversion", "num_steps": 4}
CASES: dict[str, dict[str, Any]] = {
    "lora": {},
    "whole": WHOLE,
    "checkpointed": {"model": {"lora": None, "gradient_checkpointing": True}},
    "dora": {"model": {"lora": {"rank": 2, "alpha": 4, "dora": True}}},
    "per candidate": {"train": {"backward": "per_candidate"}},
    "weighted": {"diffusion": {"timesteps": {"weighting": "sample"}}},
}
OF_TABLES: dict[str, dict[str, Any]] = {  # not of flows
    "inversion": {"objective": {"name": "inpo", "beta": 20}, "diffusion": {"estimator": INVERSION}},
    "renoise": {
        "objective": {"name": "smpo", "beta": 20},
        "diffusion": {"estimator": {"kind": "renoise", "num_steps": 3}},
    },
    "divergence": {"objective": {"name": "f_dpo", "divergence": "js"}},
}


STEPS = [(family, name) for family in FAMILIES for name in CASES]
STEPS += [("sd15", name) for name in OF_TABLES]


@pytest.mark.parametrize(("family", "name"), STEPS)
def test_a_step_in_float32_is_that_of_a_cpu(family: str, name: str, make: Make) -> None:
    config = make(family, **{**CASES, **OF_TABLES}[name])
    with exact():
        found, expected = first_step(config, "cuda"), first_step(config, "cpu")
    near(found, expected, loss=1e-3, gradient=5e-3)


HALVES = [(family, name) for family in FAMILIES for name in ("lora", "whole", "bfloat16")]


@pytest.mark.parametrize(("family", "name"), [*HALVES, ("sd15", "inversion")])
def test_a_step_in_bfloat16_is_near_float32(family: str, name: str, make: Make) -> None:
    sections: dict[str, Any] = {"bfloat16": {"model": {"dtype": "bfloat16"}}, **CASES, **OF_TABLES}
    half = make(family, **{**HALF, **sections[name]})
    full = changed(half, model={"dtype": "float32"}, train={"mixed_precision": "no"})
    near(first_step(half, "cuda"), first_step(full, "cpu"), loss=0.1, gradient=0.25)


RUNS: dict[str, dict[str, Any]] = {
    "float32": {},
    "mixed": HALF,
    "bfloat16": {"model": {"dtype": "bfloat16"}, **HALF},
    "whole": {"model": {"lora": None}, "train": {"lr": 1e-4}},
    "whole in bfloat16": {"model": {"lora": None, "dtype": "bfloat16"}, "train": {"lr": 1e-4}},
    "dora": {"model": {"lora": {"rank": 2, "alpha": 4, "dora": True}}},
    "ema": {"reference": {"kind": "ema", "decay": 0.9}},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", RUNS)
def test_the_commands(family: str, name: str, make: Make, tmp_path: Path) -> None:
    held_out = {"data": {"eval_fraction": 0.3}, "sample": {"num_prompts": 1}}
    config = make(family, **RUNS[name], **held_out, objective={"name": "diffusion_dpo"})
    path, run = tmp_path / "config.json", config.output
    with on("cuda"):
        command("train", path)
        assert "reward_accuracy" in command("eval", path)
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("a cat\na red dog\n", encoding="utf-8")
        command("sample", path, "--prompts", prompts, "--out", tmp_path / "pictures")
    assert len(list((tmp_path / "pictures").glob("0*.png"))) == 2
    assert (run / "report.html").stat().st_size > 10_000
    assert json.loads((run / "env.json").read_text(encoding="utf-8"))["device"] == "cuda"
    steps = [line for line in read_json(run / "metrics.jsonl") if "loss" in line]
    half = any(word in str(RUNS[name]) for word in ("bf16", "bfloat16"))
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-3 if half else 1e-4)
    assert len(steps) == 2
    assert list((run / "final").rglob("*.safetensors"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("half", [False, True], ids=["float32", "mixed"])
def test_caches(family: str, half: bool, make: Make) -> None:
    """Latents, embeddings and reference errors of CUDA: trained on there, and on a CPU."""
    sections: dict[str, Any] = {"diffusion": {"num_draws": 2}, "reference": {"kind": "cached"}}
    config = make(family, **sections, **(HALF if half else {}))
    said = cached(config, "cuda")
    assert "latents" in said and "reference errors" in said  # noqa: PT018
    found, elsewhere = first_step(config, "cuda"), first_step(config, "cpu")
    near(found, elsewhere, loss=0.05, gradient=0.1 if half else 0.02)
    with on("cuda"):
        train(config)
    first = next(line for line in read_json(config.output / "metrics.jsonl") if "loss" in line)
    assert first["loss"] == pytest.approx(math.log(2), abs=0.05 if half else 1e-3)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_latents_are_those_of_a_cpu(dtype: str, make: Make, tmp_path: Path) -> None:
    from mmalign.diffusion.components import load_vae

    config = make("sd15", diffusion={"vae_dtype": dtype})
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    full = make("sd15")
    with exact():
        expected = load_vae(full.model.path, full.diffusion).encode(pixels)
        found = load_vae(config.model.path, config.diffusion).to("cuda").encode(pixels.to("cuda"))
    bound = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 0.1}[dtype]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        assert float((ours.cpu() - theirs).abs().max()) < bound * max(
            1.0, float(theirs.abs().max())
        )


def test_pictures_are_nearly_those_of_a_cpu(make: Make, tmp_path: Path) -> None:
    """The start noise is drawn on the CPU, so a seed means the same image everywhere."""
    sampling = {"sampling": {"num_steps": 4, "guidance": 3.0}}
    for family in FAMILIES:
        config = make(family, diffusion=sampling)
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("a cat\n", encoding="utf-8")
        shown: list[np.ndarray[Any, Any]] = []
        for device in ("cpu", "cuda"):
            out = tmp_path / family / device
            with on(device), exact():
                path = tmp_path / "config.json"
                command("sample", path, "--base", "--prompts", prompts, "--out", out)
            shown.append(np.asarray(Image.open(out / "0000.png"), float))
        assert np.abs(shown[0] - shown[1]).max() <= 4
        assert config.diffusion.sampling.num_steps == 4


def test_self_npo_from_prompts_alone(make: Make) -> None:
    """A teacher, clean images that the model makes, and two conditions."""
    estimator = {"kind": "truncated", "num_steps": 4, "num_moves": 1, "generated": True}
    config = make(
        "sd15",
        rows="prompts",
        objective={"name": "self_npo"},
        diffusion={"estimator": estimator, "sampling": {"num_steps": 2}},
        **HALF,
    )
    with on("cuda"):
        train(config)
    lines = read_json(config.output / "metrics.jsonl")
    assert all(line["grad_norm"] > 0.0 for line in lines if "loss" in line)


@pytest.mark.parametrize("half", [False, True], ids=["float32", "mixed"])
def test_a_policy_that_inverts_gets_a_gradient(half: bool, make: Make) -> None:
    """The policy runs without a gradient and then with one, in one pass."""
    config = make("sd15", **OF_TABLES["inversion"], **(HALF if half else {}))
    step = first_step(config, "cuda")
    assert all(float(g.abs().max()) > 0.0 for n, g in step.gradients.items() if "lora_B" in n)
