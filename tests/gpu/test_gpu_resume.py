"""Runs on CUDA that were interrupted end in the bits of those that were not."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import picture_runs
import pytest
import torch
from devices import NEEDS_CUDA, on, text_config, write_text_config
from safetensors.torch import load_file

from mmalign import config as configs
from mmalign.preflight.check import check_config
from mmalign.train import checkpoint
from mmalign.train.loop import train
from mmalign.train.metrics import read_json
from mmalign.train.run import build_run

if TYPE_CHECKING:
    from mmalign.config import RunConfig

pytestmark = NEEDS_CUDA

SIX = {"num_steps": 6, "save_every": 2, "eval_every": 3, "keep_checkpoints": 3}
NOISY = {"rank": 4, "dropout": 0.1}  # drawn from the generator of the device
TEXT: dict[str, dict[str, Any]] = {
    "dropout": {"model": {"lora": NOISY}, "train": {**SIX, "check_reference": False}},
    "mixed": {"train": {**SIX, "mixed_precision": "bf16"}},
    "mixed whole": {"model": {"lora": None}, "train": {**SIX, "mixed_precision": "bf16"}},
    "rounded at random": {"model": {"lora": None, "dtype": "bfloat16"}, "train": SIX},
    "float32 copies": {
        "model": {"lora": None, "dtype": "bfloat16"},
        "train": {**SIX, "bf16_weights": "master"},
    },
    "ema": {"reference": {"kind": "ema", "decay": 0.8}, "train": SIX},
    "shifted": {"objective": {"name": "bco"}, "train": SIX},
}


def interrupted(config: RunConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights of six steps in one go, and of two with four more after a resume."""
    with on("cuda"):
        train(config)
        run, whole = config.output, config.output.with_name("whole")
        shutil.copytree(run, whole)
        shutil.rmtree(run / "final")
        for step in (4, 6):
            shutil.rmtree(run / f"checkpoint-{step}")
        assert train(config, resume=True).steps == 6
    return weights(whole), weights(run)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoint-6" / "weights.safetensors")


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == two.keys()
    return all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("name", TEXT)
def test_text_resumes_to_the_same_bits(name: str, gpu_llama: Path, tmp_path: Path) -> None:
    config = text_config(tmp_path, gpu_llama, **TEXT[name])
    assert same(*interrupted(config))
    lines = [read_json(tmp_path / part / "metrics.jsonl") for part in ("run", "whole")]
    for ours, theirs in zip(*lines, strict=True):
        for key in (key for key in theirs if not key.endswith("per_second")):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-6), key


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("kind", ["sd15", "sd3"])
@pytest.mark.parametrize("half", ["no", "bf16"])
def test_diffusion_resumes_to_the_same_bits(
    kind: str, half: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    data = picture_runs.write_data(tmp_path / "data", "pairs", num=7)["pairs"]
    numbers = {key: value for key, value in SIX.items() if key != "eval_every"}
    config = picture_runs.configured(
        tmp_path,
        request.getfixturevalue(f"{kind}_dir"),
        data,
        train={**numbers, "mixed_precision": half},
        objective={"name": "diffusion_dpo", "beta": 20},
        diffusion={"caption_dropout": 0.3, "flip": True},
    )
    assert same(*interrupted(config))


@pytest.mark.parametrize("name", ["mixed", "dropout"])
def test_usual_kernels_resume_nearly_alike(name: str, gpu_llama: Path, tmp_path: Path) -> None:
    whole, resumed = interrupted(text_config(tmp_path, gpu_llama, **TEXT[name]))
    if not same(whole, resumed):
        gap = max(float((whole[n] - resumed[n]).abs().max()) for n in whole)
        warnings.warn(f"{name}: not bit-equal with the usual kernels, {gap:.3g}", stacklevel=1)
    for key, value in whole.items():
        assert torch.allclose(value, resumed[key], rtol=1e-2, atol=1e-3), key


def test_a_killed_command_goes_on(gpu_llama: Path, tmp_path: Path) -> None:
    numbers = {**SIX, "num_steps": 4000, "save_every": 5, "eval_every": None}
    path = write_text_config(tmp_path, gpu_llama, train=numbers)
    process = subprocess.Popen(
        [sys.executable, "-m", "mmalign", "train", str(path)],
        cwd=Path(__file__).resolve().parents[2],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run").glob("checkpoint-*")):
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    killed = max(int(p.name[11:]) for p in (tmp_path / "run").glob("checkpoint-*"))
    with on("cuda"):
        config = configs.load(path)
        assert killed < 4000
        state = torch.load(
            tmp_path / "run" / f"checkpoint-{killed}" / "process-0.pt", weights_only=True
        )
        assert state["rng"]["cuda"].numel() > 0
        run = build_run(config, check_config(config))
        checkpoint.load(tmp_path / "run" / f"checkpoint-{killed}", run)
        saved = load_file(tmp_path / "run" / f"checkpoint-{killed}" / "weights.safetensors")
        own = dict(run.adapter.named_parameters())
        assert all(torch.equal(own[name].cpu(), value) for name, value in saved.items())
        assert torch.equal(torch.cuda.get_rng_state(), state["rng"]["cuda"])
