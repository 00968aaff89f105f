"""A loss that is not finite stops the run, names the rows, and costs nothing that was saved."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_ddp import torchrun
from toy_adapter import ToyAdapter, toy_config
from typer.testing import CliRunner

from mmalign.cli import app
from mmalign.errors import NonFiniteLoss
from mmalign.train.checkpoint import checkpoints
from mmalign.train.loop import train
from mmalign.train.metrics import read_json
from mmalign.train.order import Order

pytestmark = pytest.mark.usefixtures("toy")
SETTINGS = ("train.save_every=1", "train.num_epochs=1", "train.num_steps=null")


def row_of_step(step: int, process: int = 0, num_processes: int = 1) -> int:
    """A row that the toy's run first sees at `step`, counted from 1, on one process."""
    order = Order(24, 4 // num_processes, 1, num_processes, seed=0)
    return order.micro_batch(step - 1, process)[0].row


@pytest.mark.parametrize("backward", ["joint", "per_candidate"])
def test_the_run_stops_and_names_the_row(tmp_path: Path, backward: str) -> None:
    bad = row_of_step(4)
    config = toy_config(tmp_path, *SETTINGS, f"train.backward={backward}", bad_row=bad)
    with pytest.raises(NonFiniteLoss) as caught:
        train(config)
    text = str(caught.value)
    assert text.startswith(f"step 4: Loss is inf for rows 'row-{bad}': policy: 1 -inf of ")
    assert "reference: finite" in text
    assert text.endswith(f"Last good checkpoint: {config.output / 'checkpoint-3'}")
    assert caught.value.exit_code == 3

    newest = checkpoints(config.output)[-1]
    assert newest.name == "checkpoint-3"
    assert all(bool(v.isfinite().all()) for v in load_file(newest / "weights.safetensors").values())
    assert [line["step"] for line in read_json(config.output / "metrics.jsonl")][-1] == 3
    assert not (config.output / "final").exists()


def test_before_any_checkpoint_it_says_so(tmp_path: Path) -> None:
    config = toy_config(tmp_path, bad_row=row_of_step(2))
    with pytest.raises(NonFiniteLoss, match="none had been written yet"):
        train(config)


def test_a_finite_loss_with_a_broken_gradient_stops_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class BrokenGradient(ToyAdapter):
        def after_step(self, step: int) -> None:
            if step == 2:
                self.policy.head.weight.register_hook(lambda grad: grad * torch.nan)

    monkeypatch.setattr("toy_adapter.ToyAdapter", BrokenGradient)
    with pytest.raises(NonFiniteLoss, match="step 3: The losses are finite, but their gradient"):
        train(toy_config(tmp_path))


def test_a_last_step_that_ruins_the_weights_saves_nothing(tmp_path: Path) -> None:
    """Its loss was good, and no further step would have told."""
    config = toy_config(tmp_path, "train.num_steps=3", "train.save_every=1", "train.eval_every=1")

    class Ruined(ToyAdapter):
        def after_step(self, step: int) -> None:
            if step == 3:
                with torch.no_grad():
                    self.policy.head.weight *= torch.inf

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("toy_adapter.ToyAdapter", Ruined)
        with pytest.raises(NonFiniteLoss, match=r"step 3: \d+ of \d+ trained tensors") as caught:
            train(config)
    assert str(caught.value).endswith(f"Last good checkpoint: {config.output / 'checkpoint-2'}")
    assert [path.name for path in checkpoints(config.output)] == ["checkpoint-1", "checkpoint-2"]
    assert not (config.output / "final").exists()
    assert [line["step"] for line in read_json(config.output / "eval.jsonl")] == [0, 1, 2]


def test_the_command_exits_with_3(tmp_path: Path) -> None:
    toy_config(tmp_path, bad_row=row_of_step(2))
    result = CliRunner().invoke(app, ["train", str(tmp_path / "config.json")])
    assert result.exit_code == 3
    assert "NonFiniteLoss: step 2" in result.output
    assert "Traceback" not in result.output


@pytest.mark.slow
def test_the_process_exits_with_3(tmp_path: Path) -> None:
    toy_config(tmp_path, bad_row=row_of_step(2))
    command = [sys.executable, str(Path(__file__).with_name("run_toy.py"))]
    done = subprocess.run(
        [*command, str(tmp_path / "config.json")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 3
    assert "NonFiniteLoss: step 2" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_all_processes_stop_when_one_sees_it(tmp_path: Path) -> None:
    bad = row_of_step(3, process=1, num_processes=2)
    toy_config(tmp_path, bad_row=bad)
    done = torchrun(tmp_path / "config.json", "train.batch_size=2", "train.save_every=1")
    assert done.returncode != 0
    # Both processes raise the same error, which the second one's rows explain.
    assert done.stderr.count(f"NonFiniteLoss: step 3: Loss is inf for rows 'row-{bad}'") == 2
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-1", "checkpoint-2"]
