from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from toy_adapter import toy_config

from mmalign.errors import CheckpointError
from mmalign.preflight.check import check_config
from mmalign.train import checkpoint
from mmalign.train.run import Run, build_run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    config = toy_config(tmp_path, "train.keep_checkpoints=2")
    config.output.mkdir()
    return build_run(config, check_config(config))


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
    assert checkpoint.resume(run, {}, {}) == good
    assert run.position.step == 1
    assert names(run) == ["checkpoint-1"], "the next run sweeps up"


def flip(path: Path, place: float) -> None:
    """Change one bit at a share of the file's length."""
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 0x04
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "name", ["weights.safetensors", "optimizer.pt", "state.safetensors", "process-0.pt"]
)
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_one_changed_bit_is_seen(run: Run, name: str, place: float) -> None:
    saved = checkpoint.save(at(run, 2), {})
    flip(saved / name, place)
    with pytest.raises(CheckpointError, match=f"{name} holds other bytes than were saved"):
        checkpoint.resume(run, {}, {})


def test_what_is_cut_missing_or_of_another_step_is_said(run: Run) -> None:
    """As an interrupted copy leaves it; the checkpoint before it is not taken in silence."""
    older, newer = checkpoint.save(at(run, 1), {}), checkpoint.save(at(run, 2), {})
    weights, about = newer / "weights.safetensors", newer / "run.json"
    whole, told = weights.read_bytes(), about.read_text()

    def refused(why: str) -> None:
        with pytest.raises(CheckpointError, match=why) as caught:
            checkpoint.resume(run, {}, {})
        assert str(newer) in str(caught.value)
        assert "delete this folder" in str(caught.value)

    weights.write_bytes(whole[:-1])
    refused(r"weights\.safetensors has [\d,]+ bytes of [\d,]+")
    weights.unlink()
    refused(r"weights\.safetensors is missing")
    weights.write_bytes(whole)
    about.write_text(told[: len(told) // 2])
    refused(r"run\.json is damaged")
    about.write_text(told.replace('"rows": 0', '"rows": 8'))
    refused(r"run\.json says something else")
    about.unlink()
    refused(r"run\.json is missing")
    about.write_text(told)
    shutil.copytree(newer, newer.with_name("checkpoint-7"))
    newer = newer.with_name("checkpoint-7")
    refused(r"run\.json is of step 2")
    shutil.rmtree(newer)
    assert checkpoint.resume(run, {}, {}) == older.with_name("checkpoint-2")


def test_only_its_own_names_are_swept_up(run: Run) -> None:
    folder = run.config.output
    for name in (".notes.tmp", ".git.old", ".checkpoint-best.tmp", ".checkpoint-3.tmp.keep"):
        (folder / name).mkdir()
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "mine").write_text("mine")
    (folder / ".checkpoint-4.old").symlink_to(outside)
    (folder / ".checkpoint-3.tmp").mkdir()
    (folder / ".metrics.jsonl.tmp").write_text("")
    checkpoint.resume(run, {}, {})
    kept = [".checkpoint-3.tmp.keep", ".checkpoint-best.tmp", ".git.old", ".notes.tmp"]
    assert names(run) == kept
    assert (outside / "mine").read_text() == "mine"


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
    assert checkpoint.resume(run, {"a": 1}, {}) == saved
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
        checkpoint.resume(run, now, {})
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
