"""`train.tokens_per_batch`: parts of a micro-batch train as the whole of it does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from mmalign import config as configs
from mmalign.config import RunConfig
from mmalign.errors import ConfigError, DataError
from mmalign.preflight.check import check_config
from mmalign.train.checkpoint import checkpoints
from mmalign.train.loop import train
from mmalign.train.metrics import read_json
from mmalign.train.run import build_run

pytestmark = pytest.mark.runs
SIZES = [
    (3, 2, 9),
    (40, 4, 1),
    (1, 30, 12),
    (8, 8, 8),
    (20, 1, 25),
    (5, 3, 3),
    (60, 9, 2),
    (2, 2, 2),
]
MOST = 200


def write_config(folder: Path, start: Path, **sections: Any) -> Path:
    """Eight pairs of very unequal lengths; all of them are one micro-batch."""
    folder.mkdir(exist_ok=True)
    rows = [
        {"id": f"row-{i}", "prompt": "a b " * n, "chosen": "c " * k, "rejected": "d e " * m}
        for i, (n, k, m) in enumerate(SIZES)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw: dict[str, Any] = {
        "model": {"path": str(start), "dtype": "float64"},
        "data": {"train": str(folder / "pairs.jsonl")},
        "objective": {"name": "dpo"},
        "train": {"num_steps": 3, "batch_size": 8, "num_threads": 1, "optimizer": "sgd", "lr": 0.1},
        "output": str(folder / "run"),
    }
    for name, values in sections.items():
        raw[name] = {**raw.get(name, {}), **values}
    path = folder / "config.yaml"
    path.write_text(json.dumps(raw))
    return path


def config_of(folder: Path, start: Path, **sections: Any) -> RunConfig:
    return configs.load(write_config(folder, start, **sections))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "run/final/model.safetensors")


def logged(folder: Path) -> list[dict[str, float]]:
    return [
        {name: value for name, value in line.items() if not name.endswith("per_second")}
        for line in read_json(folder / "run/metrics.jsonl")
    ]


@pytest.mark.parametrize("objective", ["dpo", "sft"])  # sft: a mean over all tokens of a step
@pytest.mark.parametrize("backward", ["joint", "per_candidate"])
def test_parts_give_the_loss_and_weights_of_the_whole(
    tmp_path: Path, tiny_llama_dir: Path, objective: str, backward: str
) -> None:
    """Llama's norms compute in float32, whatever the dtype."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    given = {"objective": {"name": objective}}
    train(config_of(whole, tiny_llama_dir, **given))
    bounded = {"tokens_per_batch": MOST, "backward": backward}
    train(config_of(parts, tiny_llama_dir, **given, train=bounded))
    for a, b in zip(logged(whole), logged(parts), strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6)
    start = load_file(tiny_llama_dir / "model.safetensors")
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], value, rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(weights(whole)[name].float(), start[name].float()) for name in start)


def test_parts_are_bounded_and_hold_each_row_once(tmp_path: Path, tiny_llama_dir: Path) -> None:
    config = config_of(tmp_path / "run", tiny_llama_dir, train={"tokens_per_batch": MOST})
    run = build_run(config, check_config(config))
    batch = next(run.batches())
    parts = run.parts(batch)
    assert len(parts) > 2
    assert sorted(row for part in parts for row in part.ids) == sorted(batch.ids)
    sizes = [size for part in parts for size in part.inputs.read().sizes()]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes == sorted(batch.inputs.read().sizes(), reverse=True)
    for part in parts:
        assert sum(part.inputs.read().sizes()) <= MOST
        fed = run.adapter._arrange(part).input_ids.numel()  # responses' last tokens are not fed
        assert fed == sum(part.inputs.read().sizes()) - 2 * len(part.ids)


def test_a_row_that_alone_is_too_large_does_not_pass(tmp_path: Path, tiny_llama_dir: Path) -> None:
    """Nor where the batch is not one of rows that a survey has seen."""
    config = config_of(tmp_path / "run", tiny_llama_dir)
    run = build_run(config, check_config(config))
    with pytest.raises(ConfigError, match="is 150, but row-6 has 164 tokens"):
        run.adapter.split(next(run.batches()), 150)


def test_a_gradient_does_not_depend_on_the_rows_beside_it(
    tmp_path: Path, tiny_llama_dir: Path
) -> None:
    config = config_of(tmp_path / "run", tiny_llama_dir)
    run = build_run(config, check_config(config))
    batch = next(run.batches())

    def gradient(rows: list[int], of: int) -> torch.Tensor:
        run.optimizer.zero_grad()
        logps = run.model(batch.take(torch.tensor(rows)), run.objective.needs)
        logps.policy[rows.index(of)].sum().backward()
        return torch.cat([p.grad.flatten() for p in run.model.parameters() if p.grad is not None])

    for of in range(3):
        alone = gradient([of], of)
        for rows in ([of, 7], [6, 5, of], list(range(8))):
            torch.testing.assert_close(gradient(rows, of), alone, rtol=1e-5, atol=1e-6)


def test_a_row_of_more_tokens_is_named_before_the_first_step(
    tmp_path: Path, tiny_llama_dir: Path
) -> None:
    config = config_of(tmp_path / "run", tiny_llama_dir, train={"tokens_per_batch": 150})
    with pytest.raises(DataError, match=r"row-4.*150 tokens.*tokens_per_batch.*has 160\. 1 more"):
        train(config)
    assert not config.output.exists()


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"objective": {"name": "kto"}}, "the rows of kto are compared"),
        ({"objective": {"name": "aot"}}, "the rows of aot are compared"),
    ],
)
def test_what_needs_a_whole_batch_is_refused(
    tmp_path: Path, tiny_llama_dir: Path, sections: dict[str, Any], said: str
) -> None:
    raw = json.loads(write_config(tmp_path / "run", tiny_llama_dir).read_text())
    raw |= {**sections, "train": {"tokens_per_batch": 500}}
    with pytest.raises(ConfigError, match=f"tokens_per_batch.*{said}"):
        check_config(RunConfig.model_validate(raw))


def test_what_has_no_tokens_is_refused(tmp_path: Path, tiny_llama_dir: Path) -> None:
    raw = json.loads(write_config(tmp_path / "run", tiny_llama_dir).read_text())
    raw |= {"modality": "diffusion", "train": {"tokens_per_batch": 500}}
    with pytest.raises(ValidationError, match=r"tokens_per_batch.*text or video"):
        RunConfig.model_validate(raw)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path, tiny_llama_dir: Path) -> None:
    bounded = {"num_steps": 30, "batch_size": 5, "tokens_per_batch": MOST, "save_every": 4}
    settings = {"model": {"dtype": "float32"}, "train": {**bounded, "optimizer": "adamw"}}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(config_of(whole, tiny_llama_dir, **settings))
    path = write_config(killed, tiny_llama_dir, **settings)
    command = [sys.executable, "-m", "mmalign", "train", str(path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 90
    while not any(line["step"] >= 10 for line in read_json(killed / "run/metrics.jsonl")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert 4 <= int(checkpoints(killed / "run")[-1].name.split("-")[1]) < 30
    assert train(configs.load(path), resume=True).steps == 30
    for name, value in weights(whole).items():
        assert torch.equal(weights(killed)[name], value), name


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path, tiny_llama_dir: Path) -> None:
    """They have different numbers of parts: one of four rows, and those of one process."""
    one, two = tmp_path / "one", tmp_path / "two"
    train(config_of(one, tiny_llama_dir, train={"tokens_per_batch": MOST}))
    path = write_config(two, tiny_llama_dir, train={"tokens_per_batch": MOST, "batch_size": 4})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, "-m", "mmalign", "train", str(path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(two)[name], value, rtol=1e-5, atol=1e-5)
    for a, b in zip(logged(one), logged(two), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
