"""`mmalign sample` on a model of images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import run_config
from typer.testing import CliRunner

from mmalign.cli import app
from mmalign.config import RunConfig, dump
from mmalign.core import Needs
from mmalign.models.adapter import build_adapter

SAMPLING = {"num_steps": 2, "guidance": 2.0, "sampler": "ddim", "seed": 7}


@pytest.fixture
def run(digits_dir: Path, tmp_path: Path) -> Path:
    """A run folder with trained weights, as training would leave it."""
    folder = tmp_path / "run"
    config = settings(digits_dir, folder)
    folder.mkdir()
    (folder / "config.yaml").write_text(dump(config), encoding="utf-8")
    adapter = build_adapter(config, Needs())
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    adapter.save(folder / "final")
    return folder


def settings(base: Path, output: Path) -> RunConfig:
    return run_config(
        modality="diffusion",
        model={"path": str(base), "lora": {"rank": 2}},
        objective={"name": "diffusion_dpo"},
        diffusion={"resolution": 8, "sampling": SAMPLING},
        output=str(output),
    )


def sample(*arguments: Any) -> str:
    result = CliRunner().invoke(app, ["sample", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image).astype(int)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


@pytest.mark.runs
def test_pictures_records_and_a_grid(run: Path, tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("a cat\na dog\n", encoding="utf-8")
    assert "2 images" in sample("--run", run, "--prompts", prompts, "--out", out)
    found = records(out)
    assert [(r["id"], r["prompt"], r["seed"], r["image"]) for r in found] == [
        ("0000", "a cat", 7, "0000.png"),
        ("0001", "a dog", 8, "0001.png"),
    ]
    assert found[0]["settings"]["guidance"] == 2.0
    assert sorted(p.name for p in out.iterdir()) == [
        *("0000.png", "0001.png", "grid.png", "samples.jsonl")
    ]
    assert pixels(out / "0000.png").shape == (8, 8)

    # The model of before training: the same names and seeds, other images.
    sample("--run", run, "--prompts", prompts, "--out", tmp_path / "base", "--base")
    before = records(tmp_path / "base")
    assert [(r["id"], r["seed"]) for r in before] == [(r["id"], r["seed"]) for r in found]
    assert np.abs(pixels(out / "0000.png") - pixels(tmp_path / "base" / "0000.png")).max() > 5


@pytest.mark.runs
def test_several_seeds_and_a_negative_model(run: Path, tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    prompts.write_text('{"prompt": "a cat"}\n{"prompt": "a dog"}\n', encoding="utf-8")
    given = ("--run", run, "--prompts", prompts, "--seeds", "7,3", "--grid", "2")
    sample(*given, "--out", out)
    assert [r["id"] for r in records(out)] == ["0000-7", "0000-3", "0001-7", "0001-3"]
    with Image.open(out / "grid.png") as grid:
        assert grid.height > 2 * 96

    # A negative model that is the base itself differs from the policy's own empty prompt.
    key = "diffusion.sampling.negative"
    weight = "diffusion.sampling.negative_weight=0"
    sample(*given, "--out", tmp_path / "neg", f"{key}={run / 'final'}", weight)
    gaps = [
        np.abs(pixels(out / r["image"]) - pixels(tmp_path / "neg" / r["image"])).max()
        for r in records(out)
    ]
    assert min(gaps) > 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "name a folder for the images"),
        (("--out", "OUT", "--seeds", "1,x"), "--seeds is '1,x'"),
        (("--out", "OUT", "--seeds", "1,1"), "different whole numbers"),
        (("--out", "OUT", "--grid", "0"), "--grid is 0"),
        (
            (
                *("--out", "OUT"),
                *("diffusion.sampling.guidance=1", "diffusion.sampling.negative=RUN/final"),
            ),
            "only read with guidance above 1",
        ),
    ],
)
def test_wrong_input_is_refused(
    digits_dir: Path, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    config, prompts = tmp_path / "config.yaml", tmp_path / "prompts.txt"
    config.write_text(dump(settings(digits_dir, tmp_path / "run")), encoding="utf-8")
    prompts.write_text("a cat\n", encoding="utf-8")
    given = [a.replace("OUT", str(tmp_path / "out")).replace("RUN", "run") for a in arguments]
    overrides = [a for a in given if "=" in a]
    options = [a for a in given if "=" not in a]
    result = CliRunner().invoke(
        app, ["sample", str(config), *overrides, "--prompts", str(prompts), *options]
    )
    assert result.exit_code == 1
    assert words in result.output
    assert not (tmp_path / "out").exists()
