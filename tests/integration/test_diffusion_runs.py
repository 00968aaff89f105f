"""Whole runs on tiny pipelines: interrupted and resumed, cached, and the files that come out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tiny_pictures
import torch
from PIL import Image
from safetensors.torch import load_file

from mmalign import config as configs
from mmalign.errors import ConfigError
from mmalign.inference import evaluate_checkpoint, write_cache
from mmalign.train.loop import train
from mmalign.train.metrics import read_json

if TYPE_CHECKING:
    from pathlib import Path

    from mmalign.config import RunConfig

pytestmark = pytest.mark.runs


def write_config(folder: Path, pipeline: Path, **sections: Any) -> Path:
    """A run of 6 steps of 2 pairs, 3 to evaluate on; its run folder is `folder/run`."""
    given: dict[str, Any] = {
        "modality": "diffusion",
        "model": {"path": str(pipeline), "lora": {"rank": 4, "alpha": 8}},
        "data": {
            "train": str(tiny_pictures.pairs(folder / "train", 7)),
            "eval": str(tiny_pictures.pairs(folder / "eval", 3)),
        },
        "objective": {"name": "diffusion_dpo", "beta": 2000},
        "train": {"num_steps": 6, "batch_size": 2, "lr": 1e-3, "num_threads": 1, "save_every": 2},
        "diffusion": {
            "resolution": 32,
            "flip": True,
            "caption_dropout": 0.3,
            "eval_draws": 2,
            "sampling": {"num_steps": 2, "guidance": 3.0},
        },
        "sample": {"num_prompts": 2},
        "output": str(folder / "run"),
    }
    for name, section in sections.items():
        given[name] = {**given[name], **section}
    path = folder / "config.json"
    path.write_text(json.dumps(given), encoding="utf-8")
    return path


def configured(folder: Path, pipeline: Path, *overrides: str, **sections: Any) -> RunConfig:
    return configs.load(write_config(folder, pipeline, **sections), overrides)


def last_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoint-6" / "weights.safetensors")


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(digits_dir: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path, digits_dir, diffusion={"resolution": 8})
    whole = configs.load(path, [f"output={tmp_path / 'whole'}"])
    train(whole)
    command = [sys.executable, "-m", "mmalign", "train", str(path)]
    process = subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "checkpoint-2").is_dir():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    train(configs.load(path), resume=True)
    ours, theirs = last_weights(tmp_path / "run"), last_weights(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for name in ("samples.jsonl", "eval.jsonl"):
        assert read_json(tmp_path / "run" / name) == read_json(tmp_path / "whole" / name)


def test_a_run_from_caches_never_loads_encoders(
    sd15_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ("diffusion.cache=on", "sample.num_prompts=0", "train.num_steps=2")
    config = configured(tmp_path, sd15_dir, *overrides)
    with pytest.raises(ConfigError, match="mmalign cache"):
        train(config)
    write_cache(config)
    from mmalign.diffusion import inputs
    from mmalign.diffusion.conditioning import PromptEncoder

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("loaded")

    monkeypatch.setattr(inputs, "load_vae", refuse)
    monkeypatch.setattr(PromptEncoder, "__init__", refuse)
    result = train(config)
    assert result.final_dir is not None


@pytest.mark.slow
def test_cached_errors_are_the_live_ones(sd15_dir: Path, tmp_path: Path) -> None:
    config = configured(tmp_path, sd15_dir, "reference.kind=cached", "diffusion.num_draws=3")
    write_cache(config)
    train(config)
    values = read_json(tmp_path / "run" / "metrics.jsonl")
    before = next(line for line in values if "eval_loss" in line)
    assert before["eval_loss"] == pytest.approx(np.log(2), abs=1e-3)
    logged = [line for line in values if "errors/ref_chosen" in line]
    assert len(logged) == 6


def test_exported_lora_gives_the_pictures_of_the_run(sd15_dir: Path, tmp_path: Path) -> None:
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    config = configured(tmp_path, sd15_dir, "train.lr=0.02")
    run = config.output
    train(config)
    samples = [line for line in read_json(run / "samples.jsonl") if line["step"] == 6]
    assert (run / "samples" / "step-6" / "sheet.png").is_file()
    before = Image.open(run / "samples" / "step-0" / "000.png")
    after = Image.open(run / samples[0]["image"])
    assert np.abs(np.asarray(before, float) - np.asarray(after, float)).max() > 2

    pipe = StableDiffusionPipeline.from_pretrained(sd15_dir, safety_checker=None)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    for file in ("pytorch_lora_weights.safetensors", "mmalign_kohya.safetensors"):
        pipe.load_lora_weights(str(run / "final"), weight_name=file)
        for line in samples:
            theirs = pipe(
                line["prompt"],
                num_inference_steps=2,
                guidance_scale=3.0,
                height=32,
                width=32,
                generator=torch.Generator().manual_seed(line["seed"]),
            ).images[0]
            ours = np.asarray(Image.open(run / line["image"]), float)
            assert np.abs(ours - np.asarray(theirs, float)).max() <= 1, file
        pipe.unload_lora_weights()


def test_final_weights_evaluate_as_the_run_did(sd15_dir: Path, tmp_path: Path) -> None:
    overrides = ("train.lr=0.01", "train.num_steps=2", "sample.num_prompts=0")
    config = configured(tmp_path, sd15_dir, *overrides)
    train(config)
    found = evaluate_checkpoint(config, config.output / "final").metrics
    logged = read_json(config.output / "eval.jsonl")[-1]
    for name in ("loss", "reward_accuracy", "errors/chosen_diff"):
        assert found[name] == pytest.approx(logged[name], rel=1e-4, abs=1e-6), name
