"""When a run evaluates, saves and ends by itself: defaults, best weights, patience, time."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from toy_adapter import toy_config

from mmalign.config import TrainConfig
from mmalign.config.sections import LoraSpec
from mmalign.core import presets
from mmalign.errors import ConfigError
from mmalign.inference import trained_folder
from mmalign.train import loop
from mmalign.train.checkpoint import checkpoints
from mmalign.train.final import Best, _front_matter
from mmalign.train.loop import train
from mmalign.train.metrics import read_json

pytestmark = pytest.mark.usefixtures("toy")


@pytest.mark.parametrize(
    ("steps", "evaluates", "saves"),
    [(20, 50, 50), (499, 50, 50), (1000, 100, 100), (4000, 400, 400), (100_000, 10_000, 500)],
)
def test_a_long_run_evaluates_and_saves_by_itself(steps: int, evaluates: int, saves: int) -> None:
    settings = TrainConfig()
    assert (settings.evaluates_every(steps), settings.saves_every(steps)) == (evaluates, saves)
    never = TrainConfig(eval_every=None, save_every=None)
    assert (never.evaluates_every(steps), never.saves_every(steps)) == (None, None)
    given = TrainConfig(eval_every=7, save_every=9)
    assert (given.evaluates_every(steps), given.saves_every(steps)) == (7, 9)


def test_what_a_crash_leaves_by_default(tmp_path: Path) -> None:
    config = toy_config(tmp_path, "train.num_steps=60")
    train(config)
    assert [path.name for path in checkpoints(config.output)] == ["checkpoint-50", "checkpoint-60"]
    assert [record["step"] for record in read_json(config.output / "eval.jsonl")] == [0, 50, 60]


def _scripted(monkeypatch: pytest.MonkeyPatch, values: dict[int, float]) -> None:
    """Held-out reward accuracies by step, in place of those that the toy comes to."""
    evaluate = loop.HeldOut.evaluate

    def scripted(self: Any, step: int) -> dict[str, float]:
        return {**evaluate(self, step), "eval_reward_accuracy": values.get(step, 0.0)}

    monkeypatch.setattr(loop.HeldOut, "evaluate", scripted)


EVERY_STEP = ("train.eval_every=1", "train.best_metric=reward_accuracy")


def test_the_best_weights_are_kept_and_patience_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _scripted(monkeypatch, {0: 0.9, 1: 0.5, 2: 0.8, 3: 0.8, 4: 0.7, 5: 0.9, 6: 1.0})
    config = toy_config(tmp_path, *EVERY_STEP, "train.patience=2", "train.save_every=1")
    result = train(config)
    assert (result.steps, result.stopped) == (4, False)
    assert result.final_dir == config.output / "final"
    assert "ended after step 4 of 8: reward_accuracy has not" in capsys.readouterr().err
    best = trained_folder(config, Path("best"))
    assert "2 steps by" in (best / "README.md").read_text()
    settings = ("train.save_every=1", "train.keep_checkpoints=8", f"output={tmp_path / 'plain'}")
    plain = toy_config(tmp_path, *settings)
    train(plain)
    expected = load_file(plain.output / "checkpoint-2" / "weights.safetensors")
    for name, tensor in load_file(best / "model.safetensors").items():
        assert torch.equal(tensor, expected[f"policy.{name}"]), name


def test_an_ended_run_is_not_taken_up_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toy_config(tmp_path, *EVERY_STEP, "train.patience=1", "train.num_steps=30")
    first = train(config)
    if first.steps == 30:
        pytest.fail("the toy became better at each of 30 steps")
    before = load_file(config.output / "final" / "model.safetensors")
    again = train(config, resume=True)
    assert again.steps == first.steps
    after = load_file(config.output / "final" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_least_loss_is_the_best(tmp_path: Path) -> None:
    config = toy_config(tmp_path, "train.best_metric=loss", "train.eval_every=2")
    train(config)
    losses = {r["step"]: r["loss"] for r in read_json(config.output / "eval.jsonl") if r["step"]}
    step = min(losses, key=losses.__getitem__)
    assert f"{step} steps by" in (config.output / "best" / "README.md").read_text()


def test_no_such_metric_is_refused_before_the_first_step(tmp_path: Path) -> None:
    config = toy_config(tmp_path, "train.best_metric=separation")
    with pytest.raises(ConfigError, match=r"best_metric is separation, .* evaluations give .*loss"):
        train(config)
    assert not checkpoints(config.output)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (("data.eval=[]", "train.best_metric=loss"), "it has no held-out rows"),
        (("objective={name: sft}", "train.best_metric=reward_accuracy"), "has no reference"),
    ],
)
def test_what_can_have_no_such_metric_is_refused_before_anything_is_written(
    tmp_path: Path, settings: tuple[str, ...], why: str
) -> None:
    config = toy_config(tmp_path, *settings)
    with pytest.raises(ConfigError, match=why):
        train(config)
    train(toy_config(tmp_path))  # the folder is as good as new


def test_time_is_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = toy_config(tmp_path, "train.max_time=1s", "train.num_steps=400", seconds=0.05)
    result = train(config)
    assert result.stopped
    assert 0 < result.steps < 400
    said = capsys.readouterr().err
    assert f"train.max_time is over: stopped after step {result.steps} of 400" in said
    assert "--resume" in said
    assert checkpoints(config.output)[-1].name == f"checkpoint-{result.steps}"


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("7h30m", 27_000), ("2h", 7200), ("1h1m1s", 3661)]
)
def test_times(text: str, seconds: float) -> None:
    assert TrainConfig(max_time=text).max_seconds == seconds


@pytest.mark.parametrize("text", ["", "90", "1d", "30m2h", "-5m", "1.5h"])
def test_times_that_are_none(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.max_time: must be hours, minutes and seconds"):
        toy_config(tmp_path, f"train.max_time='{text}'")


def test_patience_needs_a_metric(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"patience is set, but best_metric is not"):
        toy_config(tmp_path, "train.patience=3")


def test_the_best_of_what_a_resumed_run_knows(tmp_path: Path) -> None:
    """What was best before a resume is not overwritten by what is worse."""
    config = toy_config(tmp_path, *EVERY_STEP)
    train(config)
    values = [r["reward_accuracy"] for r in read_json(config.output / "eval.jsonl") if r["step"]]

    run: Any = SimpleNamespace(config=config, eval_rows=[1], objective=presets.dpo())
    best = Best(run)
    assert not best.add(9, {"eval_reward_accuracy": max(values)})
    assert best.add(10, {"eval_reward_accuracy": max(values) + 0.01})
    shutil.rmtree(config.output / "best")
    assert Best(run).add(11, {"eval_reward_accuracy": min(values)}), "else there would be none"


def test_the_card_says_what_a_hub_reads(tmp_path: Path) -> None:
    config = toy_config(tmp_path)
    train(config)
    card = (config.output / "final" / "README.md").read_text().split("---")[1]
    assert yaml.safe_load(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mmalign", "preference-alignment"],
    }


@pytest.mark.parametrize(
    ("card", "said"),
    [
        ("---\nlicense: mit\n---\n# A model\n", "mit"),
        ("---\nlicense: [mit, bsd]\n---\n", None),
        ("---\n- a list\n---\n", None),
        ("---\nlicense: {\n---\n", None),
        ("# no front matter", None),
        (None, None),
    ],
)
def test_the_license_is_that_of_the_base(
    tmp_path: Path, card: str | None, said: str | None
) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card, encoding="utf-8")
    config = toy_config(tmp_path)
    config = config.model_copy(
        update={
            "model": config.model.model_copy(update={"path": str(tmp_path), "lora": LoraSpec()})
        }
    )
    about = yaml.safe_load(_front_matter(config))
    assert about.get("license") == said
    assert about["library_name"] == "peft"
    assert "base_model" not in about, "the folder means nothing on another machine"
