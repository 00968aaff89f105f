"""Two processes (gloo, CPU) against one process with twice the batch: replicated and sharded."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy_adapter import toy_config

from mmalign.errors import ConfigError
from mmalign.train.loop import train
from mmalign.train.metrics import read_json

pytestmark = pytest.mark.usefixtures("toy")
RUN_TOY = Path(__file__).with_name("run_toy.py")


def torchrun(config: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Start CONFIG on two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}
    return subprocess.run(
        [*command, str(RUN_TOY), str(config), *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


COMMON = ("model.dtype=float64", "train.optimizer=sgd", "train.num_steps=5", "train.accumulate=2")


@pytest.mark.slow
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

    for a, b in zip(
        read_json(one / "run/metrics.jsonl"), read_json(two / "run/metrics.jsonl"), strict=True
    ):
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


@pytest.mark.slow
def test_two_processes_count_the_tokens_of_a_step_together(tmp_path: Path) -> None:
    """Responses differ in length, so that each micro-batch alone has another mean."""
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    common = ("objective={name: sft}", "model.dtype=float64", "train.optimizer=sgd", "data.eval=[]")
    train(toy_config(one, *common, "train.num_steps=3", "train.batch_size=8"))
    options = (*common, "train.num_steps=3", "train.batch_size=2", "train.accumulate=2")
    toy_config(two, *options)
    done = torchrun(two / "config.json", *options)
    assert done.returncode == 0, done.stderr
    expected = load_file(one / "run/final/model.safetensors")
    found = load_file(two / "run/final/model.safetensors")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-13)
    losses = [[line["loss"] for line in read_json(run / "run/metrics.jsonl")] for run in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "ddp in bfloat16"])
def test_two_processes_resume_to_the_same_bits(tmp_path: Path, kind: str) -> None:
    """Both with AdamW, whose state is saved by accelerate where it is sharded."""
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    half = kind == "ddp in bfloat16"
    dtype = ("model.dtype=bfloat16",) if half else ()
    train(toy_config(one, "train.batch_size=4", *dtype, average=False))
    toy_config(two, average=False)
    variables = {"TOY_FSDP": "1"} if kind == "fsdp2" else {}
    options = ("train.batch_size=2", "train.save_every=3", *dtype)
    assert torchrun(two / "config.json", *options, **variables).returncode == 0
    final = two / "run/final/model.safetensors"
    whole = final.read_bytes()
    expected = load_file(one / "run/final/model.safetensors")
    rtol, atol = (0.05, 0.02) if half else (1e-4, 1e-5)
    for name, value in load_file(final).items():
        torch.testing.assert_close(value, expected[name], rtol=rtol, atol=atol)

    shutil.rmtree(two / "run/final")
    shutil.rmtree(two / "run/checkpoint-8")
    resumed = torchrun(two / "config.json", *options, "--resume", **variables)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming after step 6" in resumed.stderr
    assert final.read_bytes() == whole


@pytest.mark.slow
def test_a_sharded_run_refuses_a_reference_that_follows_the_policy(tmp_path: Path) -> None:
    toy_config(tmp_path)  # the toy keeps a moving average unless told not to
    done = torchrun(tmp_path / "config.json", TOY_FSDP="1")
    assert done.returncode != 0
    assert "ConfigError: reference.kind is auto, which follows" in done.stderr
    assert not (tmp_path / "run").exists()


def test_processes_that_accelerate_does_not_see_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.state import PartialState

    PartialState(cpu=True)
    launched = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
    for name, value in {**launched, "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="2 processes were launched, but accelerate sees one"):
        train(toy_config(tmp_path))
