"""Text on CUDA: the numbers of a CPU, whole runs by the commands, caches across devices."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from devices import (
    HALF,
    NEEDS_CUDA,
    cached,
    changed,
    command,
    exact,
    first_step,
    near,
    on,
    text_config,
)
from devices import write_text_config as write_config

from mmalign import config as configs
from mmalign.train.loop import train
from mmalign.train.metrics import read_json

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = NEEDS_CUDA

WHOLE: dict[str, Any] = {"model": {"lora": None}}
MASKS = {"objective": {"name": "sparse_po"}, "text": {"masks": {"kind": "learned"}}}
CASES: dict[str, dict[str, Any]] = {
    "lora": {},
    "whole": WHOLE,
    "checkpointed": {**WHOLE, "model": {"lora": None, "gradient_checkpointing": True}},
    "dora": {"model": {"lora": {"rank": 4, "dora": True}}},
    "ema": {"reference": {"kind": "ema", "decay": 0.5}},
    "kl": {"objective": {"name": "tdpo2"}},
    "kl of whole": {"objective": {"name": "tdpo2"}, **WHOLE},
    "masks": MASKS,
    "unpaired": {"objective": {"name": "kto"}},
    "shifted": {"objective": {"name": "bco"}},
    "without reference": {"objective": {"name": "simpo"}, **WHOLE},
    "mean of tokens": {"objective": {"name": "sft"}, **WHOLE},
    "divergence": {"objective": {"name": "f_dpo", "divergence": "js"}},
    "per candidate": {"train": {"backward": "per_candidate"}},
    "long blocks": {"text": {"block_size": 7}, **WHOLE},
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_in_float32_is_that_of_a_cpu(name: str, gpu_llama: Path, tmp_path: Path) -> None:
    config = text_config(tmp_path, gpu_llama, **CASES[name])
    with exact():
        near(first_step(config, "cuda"), first_step(config, "cpu"), loss=1e-4, gradient=1e-4)


HALVES: dict[str, dict[str, Any]] = {
    "mixed lora": HALF,
    "mixed whole": {**HALF, **WHOLE},
    "mixed kl": {**HALF, "objective": {"name": "tdpo2"}},
    "bfloat16 lora": {"model": {"dtype": "bfloat16"}},
    "bfloat16 whole": {"model": {"dtype": "bfloat16", "lora": None}},
}


@pytest.mark.parametrize("name", HALVES)
def test_a_step_in_bfloat16_is_near_float32(name: str, gpu_llama: Path, tmp_path: Path) -> None:
    half = text_config(tmp_path, gpu_llama, **HALVES[name])
    full = changed(half, model={"dtype": "float32"}, train={"mixed_precision": "no"})
    near(first_step(half, "cuda"), first_step(full, "cpu"), loss=0.05, gradient=0.15)


RUNS: dict[str, dict[str, Any]] = {
    "lora": {},
    "whole": {"model": {"lora": None}, "train": {"lr": 1e-3}},
    "mixed": {"train": {"mixed_precision": "bf16", "num_steps": 6}},
    "mixed whole": {"model": {"lora": None}, "train": {"mixed_precision": "bf16", "lr": 1e-3}},
    "bfloat16": {"model": {"dtype": "bfloat16"}},
    "rounded at random": {"model": {"dtype": "bfloat16", "lora": None}, "train": {"lr": 1e-3}},
    "float32 copies": {
        "model": {"dtype": "bfloat16", "lora": None},
        "train": {"bf16_weights": "master", "lr": 1e-3},
    },
    "ema": {"reference": {"kind": "ema", "decay": 0.9}, "model": {"lora": None}},
    "per candidate": {"train": {"backward": "per_candidate", "mixed_precision": "bf16"}},
    "adafactor": {"train": {"optimizer": "adafactor", "lr": 1e-3}},
    "workers": {"data": {"num_workers": 2}},
}


@pytest.mark.parametrize("name", RUNS)
def test_the_commands(name: str, gpu_llama: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path, gpu_llama, **RUNS[name])
    with on("cuda"):
        command("train", path)
        assert "reward_accuracy" in command("eval", path)
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("Tell what the cat does.\nWhy?\n", encoding="utf-8")
        for how in ("sample.temperature=0", "sample.temperature=1"):
            out = tmp_path / "answers.jsonl"
            command("sample", path, how, "--prompts", prompts, "--out", out)
            again = tmp_path / "again.jsonl"
            command("sample", path, how, "--prompts", prompts, "--out", again)
            assert out.read_text(encoding="utf-8") == again.read_text(encoding="utf-8")
    run = tmp_path / "run"
    assert (run / "report.html").stat().st_size > 10_000
    environment = json.loads((run / "env.json").read_text(encoding="utf-8"))
    assert environment["device"] == "cuda"
    assert environment["device_name"] == torch.cuda.get_device_name()
    steps = [line for line in read_json(run / "metrics.jsonl") if "loss" in line]
    bound = 5e-3 if "bf" in str(RUNS[name]) else 1e-5
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=bound)
    assert steps[-1]["loss"] < steps[0]["loss"]
    state = torch.load(run / f"checkpoint-{steps[-1]['step']}/process-0.pt", weights_only=True)
    assert state["rng"]["cuda"].dtype == torch.uint8


def test_weights_from_cuda_go_on_on_a_cpu(gpu_llama: Path, tmp_path: Path) -> None:
    """A checkpoint is of no device: the same run resumes elsewhere and scores alike."""
    config = text_config(tmp_path, gpu_llama, train={"num_steps": 4, "save_every": 2})
    with on("cuda"):
        train(config)
        there = command("eval", tmp_path / "config.json")
    with on("cpu"):
        here = command("eval", tmp_path / "config.json")
    numbers = [float(line.split()[1]) for line in there.splitlines()[1:]]
    assert numbers == pytest.approx(
        [float(line.split()[1]) for line in here.splitlines()[1:]], rel=2e-2, abs=2e-3
    )


@pytest.mark.parametrize("loss", ["dpo", "tdpo2"])
@pytest.mark.parametrize("half", [False, True], ids=["float32", "mixed"])
def test_a_cached_reference(loss: str, half: bool, gpu_llama: Path, tmp_path: Path) -> None:
    """Written on CUDA it trains there, and on a CPU, from log 2 on."""
    sections: dict[str, Any] = {"objective": {"name": loss}, **(HALF if half else {})}
    live = text_config(tmp_path, gpu_llama, **sections)
    stored = changed(live, reference={"kind": "cached"})
    assert "15 rows written" in cached(live, "cuda")
    bounds = {"loss": 0.02, "gradient": 0.1} if half else {"loss": 1e-3, "gradient": 1e-2}
    near(first_step(stored, "cuda"), first_step(live, "cuda"), **bounds)
    near(first_step(stored, "cpu"), first_step(live, "cpu"), **bounds)
    with on("cuda"):
        train(stored)
    first = next(line for line in read_json(stored.output / "metrics.jsonl") if "loss" in line)
    if loss == "dpo":
        assert first["loss"] == pytest.approx(math.log(2), abs=5e-3 if half else 1e-4)


def test_a_frozen_copy_of_a_partly_trained_model_moves_as_a_whole() -> None:
    from mmalign.models.reference import FrozenCopy

    policy = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    policy[0].requires_grad_(False)  # the first parameters are shared with the copy
    reference = FrozenCopy(policy)
    policy.to("cuda")
    with reference.active() as module:
        assert {p.device.type for p in module.parameters()} == {"cuda"}
        x = torch.ones(2, 3, device="cuda")
        assert torch.equal(module(x), policy(x))


def test_dry_run_says_the_memory_of_the_device(
    gpu_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = text_config(tmp_path, gpu_llama)
    with on("cuda"):
        train(config, dry_run=True)
    told = capsys.readouterr().out
    mebibytes = float(told.split("memory")[1].split()[0].replace(",", ""))
    assert mebibytes < 512, "of the device, not of the process"
    assert "policy and reference agree" in told
    assert configs.dump(config)
