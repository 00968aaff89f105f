"""Two processes (gloo, CPU) against one process with twice the batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy_adapter import toy_config

from mmalign.train.loop import train
from mmalign.train.metrics import read_json

RUN_TOY = Path(__file__).with_name("run_toy.py")


def torchrun(config: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Start CONFIG on two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*command, str(RUN_TOY), str(config), *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


COMMON = ("model.dtype=float64", "train.optimizer=sgd", "train.num_steps=5", "train.accumulate=2")


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("backward", ["joint", "per_candidate"])
def test_two_processes_equal_one_with_the_double_batch(tmp_path: Path, backward: str) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    train(toy_config(one, *COMMON, "train.batch_size=4"))
    # Seven eval rows in batches of three: the processes get different numbers of batches.
    options = (*COMMON, "train.batch_size=2", f"train.backward={backward}", "train.save_every=3")
    toy_config(two, *options, "train.eval_batch_size=3")
    done = torchrun(two / "config.json", *options, "train.eval_batch_size=3")
    assert done.returncode == 0, done.stderr

    expected = load_file(one / "run/final/model.safetensors")
    found = load_file(two / "run/final/model.safetensors")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-13)

    for a, b in zip(read_json(one / "run/metrics.jsonl"), read_json(two / "run/metrics.jsonl"), strict=True):
        for name in a.keys() - {"rows_per_second", "tokens_per_second"}:
            assert b[name] == pytest.approx(a[name], rel=1e-6, abs=1e-9), (name, a["step"])
    rows_one, rows_two = (
        [row["id"] for row in read_json(run / "run/eval.jsonl")[-1]["rows"]] for run in (one, two)
    )
    assert rows_one == rows_two
    assert {p.name for p in (two / "run/checkpoint-5").glob("process-*")} == {
        "process-0.pt",
        "process-1.pt",
    }
