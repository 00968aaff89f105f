from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from toy_adapter import toy_config

from mmalign import config as configs
from mmalign.errors import CheckpointError
from mmalign.train import checkpoint
from mmalign.train.run import Run, build_run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    config = toy_config(tmp_path, "train.keep_checkpoints=2")
    config.output.mkdir()
    return build_run(config, configs.check(config))


def at(run: Run, step: int) -> Run:
    run.position.step = step
    return run


def names(run: Run) -> list[str]:
    return sorted(path.name for path in run.config.output.iterdir())


def test_only_the_newest_are_kept(run: Run) -> None:
    for step in (2, 10, 9, 11):
        checkpoint.save(at(run, step), {})
    found = [path.name for path in checkpoint.checkpoints(run.config.output)]
    assert found == ["checkpoint-10", "checkpoint-11"]
    assert names(run) == found


@pytest.mark.parametrize("moment", ["process-0.pt", "run.json", "rename"])
def test_a_crash_while_writing_leaves_the_last_one_as_it_was(
    run: Run, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine dies while a file is written, or when all files are there but not renamed."""
    good = checkpoint.save(at(run, 1), {})

    class Died(Exception):
        pass

    def die(*args: object, **keywords: object) -> None:
        if moment in ("rename", *(str(a).rsplit("/", 1)[-1] for a in args)):
            raise Died

    with monkeypatch.context() as patch:
        if moment == "rename":
            patch.setattr(os, "replace", die)
        elif moment == "run.json":
            patch.setattr(Path, "write_text", die)
        else:
            patch.setattr(torch, "save", die)
        with pytest.raises(Died):
            checkpoint.save(at(run, 2), {})

    assert ".checkpoint-2.tmp" in names(run)
    assert checkpoint.checkpoints(run.config.output) == [good]
    assert checkpoint.resume(run, {}) == good
    assert run.position.step == 1
    assert names(run) == ["checkpoint-1"], "the next run sweeps up"


def test_an_incomplete_folder_is_never_loaded(run: Run) -> None:
    """As an interrupted copy leaves it: the name is right, a file is short or missing."""
    older, newer = checkpoint.save(at(run, 1), {}), checkpoint.save(at(run, 2), {})
    weights = newer / "weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    assert checkpoint.checkpoints(run.config.output) == [older]
    weights.unlink()
    assert checkpoint.checkpoints(run.config.output) == [older]
    weights.write_bytes(whole)
    (newer / "run.json").write_text('{"files"', encoding="utf-8")
    assert checkpoint.checkpoints(run.config.output) == [older]


def test_everything_comes_back(run: Run) -> None:
    run.averages.add({"loss": torch.tensor(2.0)})
    run.adapter.average[0].fill_(3.0)
    optimizer, weight = run.optimizer, run.adapter.policy.head.weight
    weight.sum().backward()
    optimizer.step()
    saved = checkpoint.save(at(run, 4), {"a": 1})
    expected = weight.detach().clone()
    moments = {k: v.clone() for k, v in optimizer.state_dict()["state"][3].items()}
    draws = torch.rand(3)

    with torch.no_grad():
        weight.zero_()
    run.adapter.average[0].zero_()
    run.averages.pop()
    optimizer.step()
    run.position.step = 0
    assert checkpoint.resume(run, {"a": 1}) == saved
    assert torch.equal(weight, expected)
    assert all(torch.equal(v, moments[k]) for k, v in optimizer.state_dict()["state"][3].items())
    assert torch.equal(torch.rand(3), draws)
    assert float(run.adapter.average[0].mean()) == 3.0
    assert run.averages.pop() == {"loss": (2.0, 1.0)}
    assert run.position.step == 4


def test_another_run_is_refused_with_every_difference(run: Run) -> None:
    then = {"config": {"train": {"lr": 0.1, "seed": 0}}, "num_processes": 1}
    now = {"config": {"train": {"lr": 0.2, "seed": 0}}, "num_processes": 2}
    checkpoint.save(at(run, 1), then)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.resume(run, now)
    text = str(caught.value)
    assert "config.train.lr: 0.1 in the checkpoint, 0.2 now" in text
    assert "num_processes: 1 in the checkpoint, 2 now" in text
    assert "seed" not in text


def test_weights_of_another_model_are_refused(run: Run) -> None:
    saved = checkpoint.save(at(run, 1), {})
    run.adapter.policy.head.requires_grad_(False)
    with pytest.raises(CheckpointError, match=r"policy\.head"):
        checkpoint.load(saved, run)


def test_a_checkpoint_is_read_without_unpickling_code(run: Run) -> None:
    saved = checkpoint.save(at(run, 1), {})
    for name in ("optimizer.pt", "process-0.pt"):
        torch.load(saved / name, weights_only=True)
    assert json.loads((saved / "run.json").read_text())["position"]["step"] == 1
