"""Whole runs: what they learn, what they write down, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_adapter import ToyAdapter, toy_config

from mmalign import config as configs
from mmalign.errors import ConfigError, DataError
from mmalign.models.adapter import Tools
from mmalign.train.loop import train
from mmalign.train.metrics import read_json

pytestmark = pytest.mark.usefixtures("toy")


def series(run_dir: Path, key: str) -> list[float]:
    return [line[key] for line in read_json(run_dir / "metrics.jsonl") if key in line]


@pytest.mark.runs
@pytest.mark.parametrize(
    "objective",
    [
        "{name: dpo, beta: 0.5}",
        "{name: f_dpo, divergence: js, beta: 0.5}",
        "{name: tdpo2, beta: 0.5}",
        "{name: simpo}",
        "{name: kto, beta: 0.5}",
        "{mix: {dpo: 1, sft: 0.1}}",
    ],
)
def test_twenty_steps_raise_the_margin(tmp_path: Path, objective: str) -> None:
    config = toy_config(tmp_path, f"objective={objective}", "train.num_steps=20")
    result = train(config)
    margins = series(config.output, "rewards/margins")
    assert len(margins) >= 15, "kto has none where a batch holds no undesirable row"
    assert margins[-1] > margins[0] + 0.2
    assert result.metrics["loss"] < series(config.output, "loss")[0]


def test_lists_of_more_than_two_are_trained_and_evaluated(tmp_path: Path) -> None:
    records = [
        {
            "id": f"list-{i}",
            "prompt": "abcd"[i % 4] * 3,
            "responses": ["aab", "ccd", "nnm", "qrs"],
            "scores": [4.0, 3.0, 1.0, 1.0],
        }
        for i in range(8)
    ]
    data = tmp_path / "lists.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = toy_config(
        tmp_path,
        f"data.train={data}",
        f"data.eval={data}",
        "objective={name: plackett_luce, beta: 0.5}",
        "train.num_steps=20",
    )
    result = train(config)
    before, *_, after = read_json(config.output / "eval.jsonl")
    assert before["reward_accuracy"] == 0.5  # all tied
    assert after["reward_accuracy"] > 0.8
    assert after["drift/chosen"] > after["drift/rejected"]
    assert len(after["rows"][0]["logps"]) == 4
    assert result.metrics["eval_loss"] < before["loss"]


def test_single_responses_are_evaluated_across_rows(tmp_path: Path) -> None:
    config = toy_config(tmp_path, "objective={name: kto, beta: 0.5}", "train.num_steps=20")
    train(config)
    before, after = read_json(config.output / "eval.jsonl")
    assert before["separation"] == 0.5, "all log-ratios are 0"
    assert after["separation"] > 0.9
    assert len(after["rows"][0]["labels"]) == 1, "the mismatched response is no rated one"


def test_the_run_folder(tmp_path: Path) -> None:
    config = toy_config(tmp_path, "train.num_steps=6", "train.eval_every=4", "train.log_every=3")
    result = train(config)
    run_dir = config.output
    assert sorted(path.name for path in run_dir.iterdir()) == [
        "checkpoint-6",
        "config.yaml",
        "env.json",
        "eval.jsonl",
        "final",
        "inputs.json",
        "metrics.jsonl",
        "samples.jsonl",
    ]
    assert configs.load(run_dir / "config.yaml") == config

    lines = read_json(run_dir / "metrics.jsonl")
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == [3, 6]
    trl = {"loss", "grad_norm", "learning_rate", "epoch", "num_tokens"} | {
        f"{group}/{side}" for group in ("rewards", "logps") for side in ("chosen", "rejected")
    }
    assert trl | {"rewards/margins", "rewards/accuracies"} <= training[0].keys()
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 4, 6]
    assert training[0]["loss"] == pytest.approx(
        sum(series(train_again(tmp_path / "each", "train.log_every=1"), "loss")[:3]) / 3, rel=1e-6
    )

    evaluations = read_json(run_dir / "eval.jsonl")
    assert [record["step"] for record in evaluations] == [0, 4, 6]
    assert evaluations[0]["loss"] == pytest.approx(0.6931472)
    assert {"kl_per_token", "ranking_accuracy", "idealised_accuracy"} <= evaluations[0].keys()
    low, high = evaluations[-1]["intervals"]["reward_accuracy"]
    assert low <= evaluations[-1]["reward_accuracy"] <= high
    assert [row["id"] for row in evaluations[0]["rows"]] == [f"row-{i}" for i in range(7)]

    samples = read_json(run_dir / "samples.jsonl")
    assert [(s["step"], s["id"]) for s in samples] == [
        (step, row) for step in (0, 6) for row in ("row-0", "row-1")
    ]
    environment = json.loads((run_dir / "env.json").read_text())
    assert torch.__version__.startswith(environment["packages"]["torch"])
    assert environment["data"]["train_rows"] == 24

    card = (run_dir / "final/README.md").read_text()
    assert environment["data"]["train_hash"] in card
    assert "| loss | 0.6931 [0.6931, 0.6931] |" in card
    assert "name: dpo" in card
    assert result.metrics["eval_loss"] == evaluations[-1]["loss"]


def train_again(folder: Path, *overrides: str, **knobs: Any) -> Path:
    folder.mkdir()
    config = toy_config(folder, "train.num_steps=6", *overrides, **knobs)
    train(config)
    return config.output


def weights(run_dir: Path) -> bytes:
    return (run_dir / "final/model.safetensors").read_bytes()


def test_looking_changes_nothing(tmp_path: Path) -> None:
    """Evaluations, samples, checks and workers leave the trained bits as they are."""
    quiet = train_again(
        tmp_path / "quiet", "data.eval=[]", "train.check_reference=false", noise=0.1
    )
    busy = train_again(
        tmp_path / "busy",
        "train.eval_every=1",
        "train.sample_every=2",
        "train.save_every=1",
        "sample.temperature=1",
        noise=0.1,
    )
    assert weights(quiet) == weights(busy)
    assert not (quiet / "eval.jsonl").exists()


def test_workers_deliver_the_same_batches(tmp_path: Path) -> None:
    alone = train_again(tmp_path / "alone", noise=0.1)
    helped = train_again(tmp_path / "helped", "data.num_workers=2", noise=0.1)
    assert weights(alone) == weights(helped)


def test_the_seed_decides(tmp_path: Path) -> None:
    one, two = (train_again(tmp_path / str(i), f"train.seed={i}", noise=0.1) for i in (1, 2))
    assert weights(one) != weights(two)


def test_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = toy_config(tmp_path)
    before = sorted(tmp_path.iterdir())
    result = train(config, dry_run=True)
    told = capsys.readouterr().out
    assert result.steps == 0
    assert sorted(tmp_path.iterdir()) == before
    assert "needs reference, at least 2 candidates (pair)" in told
    assert "policy and reference agree" in told
    assert "policy      float32[4, 2, 6]" in told
    assert "steps       8 of 4 rows" in told


def test_a_tracker_gets_what_the_file_gets(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = toy_config(tmp_path, "train.trackers=[tensorboard]", "train.num_steps=3")
    train(config)
    folders = {path.parent for path in config.output.rglob("events.out.tfevents*")}
    events = EventAccumulator(str(min(folders)))  # below it lie the hyperparameters
    events.Reload()
    logged = [event.value for event in events.Scalars("loss")]
    assert logged == pytest.approx(series(config.output, "loss"))


def test_an_adapter_that_cannot_sample_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmalign.models.adapter import Adapter

    monkeypatch.setattr(ToyAdapter, "sample", Adapter.sample)
    assert not (train_again(tmp_path / "mute") / "samples.jsonl").exists()


def test_a_second_run_in_one_process_may_use_another_precision(tmp_path: Path) -> None:
    train_again(tmp_path / "full")
    run_dir = train_again(tmp_path / "half", "train.mixed_precision=bf16")
    assert series(run_dir, "loss")[-1] < 0.6


def test_mixed_rows_of_one_batch_size_one_kto_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 2"):
        train(toy_config(tmp_path, "objective={name: kto}", "train.batch_size=1"))


def test_a_missing_file_is_named_before_a_model_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toy_config(tmp_path, "data.eval=evals.jsonl")

    def asked(*_: Any) -> None:
        pytest.fail("a hub may be asked for the tokenizer here")

    monkeypatch.setattr(Tools, "resolve_config", asked)
    with pytest.raises(DataError, match=r"evals\.jsonl: there is no such file"):
        train(config)
