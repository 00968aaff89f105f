"""The loop on a real, if tiny, Llama through the text adapter and the command line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmalign import config as configs
from mmalign.config import RunConfig
from mmalign.preflight.check import check_config
from mmalign.train.backward import backward_joint, backward_per_candidate
from mmalign.train.checkpoint import checkpoints
from mmalign.train.loop import train
from mmalign.train.metrics import read_json
from mmalign.train.run import build_run

pytestmark = pytest.mark.runs

PROMPTS = ["Why is the sky blue?", "What is two plus two?", "How does bread rise?", "Tell a story."]
GOOD = ["The air scatters blue light.", "Four.", "Yeast makes bubbles.", "A cat played in the sun."]
BAD = [
    "I will not say.",
    "It depends on many things.",
    "No.",
    "Once upon a time there was, there was",
]


def write_config(folder: Path, start: Path, **sections: Any) -> Path:
    """A config in `folder` on eight pairs, four held out; its run folder is `folder/run`."""
    for name, prefix, count in (("train", "", 8), ("eval", "Please: ", 4)):
        rows = [
            {
                "id": f"{name}-{i}",
                "prompt": prefix + PROMPTS[i % 4] + " " * (i // 4) + "?" * (i // 4),
                "chosen": GOOD[i % 4],
                "rejected": BAD[i % 4],
            }
            for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw: dict[str, Any] = {
        "model": {"path": str(start), "lora": {"rank": 4, "alpha": 8}},
        "data": {"train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl")},
        "objective": {"name": "dpo", "beta": 0.3},
        "train": {"num_steps": 20, "batch_size": 4, "lr": 0.005, "num_threads": 1},
        "sample": {"num_prompts": 1, "max_new_tokens": 6},
        "output": str(folder / "run"),
    }
    for name, values in sections.items():
        raw[name] = {**raw.get(name, {}), **values} if isinstance(values, dict) else values
    path = folder / "config.yaml"
    path.write_text(json.dumps(raw))  # JSON is YAML
    return path


def config_of(folder: Path, start: Path, **sections: Any) -> RunConfig:
    return configs.load(write_config(folder, start, **sections))


@pytest.mark.parametrize(
    "sections",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"objective": {"name": "f_dpo", "divergence": "js"}}, marks=pytest.mark.slow),
        pytest.param(
            {"objective": {"name": "tdpo2"}, "train": {"backward": "per_candidate"}},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"objective": {"name": "sparse_po"}, "text": {"masks": {"kind": "learned"}}},
            marks=pytest.mark.slow,
        ),
        pytest.param({"objective": {"name": "simpo"}}, marks=pytest.mark.slow),
        pytest.param({"objective": {"name": "kto"}}, marks=pytest.mark.slow),
        pytest.param(
            {"model": {"lora": None}, "reference": {"kind": "frozen-copy"}}, marks=pytest.mark.slow
        ),
        {"model": {"lora": None}, "reference": {"kind": "ema", "decay": 0.9}},
    ],
    ids=["dpo", "js", "tdpo2", "sparse_po", "simpo", "kto", "full", "ema"],
)
def test_twenty_steps_raise_the_margin(
    tmp_path: Path, tiny_llama_dir: Path, sections: dict[str, Any]
) -> None:
    config = config_of(tmp_path, tiny_llama_dir, **sections)
    if config.model.lora is None:
        config = configs.load(tmp_path / "config.yaml", ["train.lr=0.001"])
    result = train(config)
    margins = [
        line["rewards/margins"]
        for line in read_json(config.output / "metrics.jsonl")
        if "rewards/margins" in line
    ]
    assert margins[-1] > margins[0] + 0.05
    assert result.metrics["eval_loss"] < read_json(config.output / "eval.jsonl")[0]["loss"]
    before, after = read_json(config.output / "samples.jsonl")
    assert before["prompt"] == after["prompt"] == "Please: Why is the sky blue?"


def test_outputs_load_in_their_own_libraries(tmp_path: Path, tiny_llama_dir: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lora, full = tmp_path / "lora", tmp_path / "full"
    lora.mkdir()
    full.mkdir()
    few = {"num_steps": 3}
    ids = torch.arange(5, 15)[None]
    train(config_of(lora, tiny_llama_dir, train=few))
    base = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    start = base(ids).logits
    tuned = PeftModel.from_pretrained(base, str(lora / "run/final"))
    assert not torch.equal(tuned(ids).logits, start)

    train(config_of(full, tiny_llama_dir, train=few, model={"lora": None}))
    whole = AutoModelForCausalLM.from_pretrained(full / "run/final")
    assert not torch.equal(whole(ids).logits, start)
    AutoTokenizer.from_pretrained(full / "run/final")
    assert "# run" in (full / "run/final/README.md").read_text()


@pytest.mark.parametrize("name", ["dpo", "tdpo2", "simpo"])
def test_per_candidate_gives_the_same_gradient(
    tmp_path: Path, tiny_llama_dir: Path, name: str
) -> None:
    """The first pass packs both responses behind one prompt, the second cannot. In float64, but for
    Llama's norms, which compute in float32 whatever the dtype; the toy is exact to 1e-12."""
    config = config_of(
        tmp_path,
        tiny_llama_dir,
        model={"lora": None, "dtype": "float64"},
        objective={"name": name},
    )
    run = build_run(config, check_config(config))
    batch = next(run.batches())
    with torch.no_grad():
        for parameter in run.adapter.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    backward_joint(run.accelerator, run.model, run.objective, batch)
    expected = {n: p.grad.clone() for n, p in run.adapter.named_parameters() if p.grad is not None}
    run.adapter.zero_grad()
    backward_per_candidate(run.accelerator, run.model, run.objective, batch, tolerance=1e-6)
    scale = max(float(value.abs().max()) for value in expected.values())
    for parameter_name, parameter in run.adapter.named_parameters():
        if parameter_name in expected:
            gap = (parameter.grad - expected[parameter_name]).abs().max()
            assert float(gap) < 1e-6 * scale, parameter_name


def test_a_run_with_dropout_resumes_to_the_same_bits(tmp_path: Path, tiny_llama_dir: Path) -> None:
    """The trial of a resumed run meets factors that are not 0; it drops and draws nothing."""
    settings: dict[str, Any] = {
        "model": {"lora": {"rank": 4, "dropout": 0.2}},
        "train": {"num_steps": 4, "save_every": 2, "lr": 0.01, "check_reference": False},
        "sample": {"num_prompts": 0},
    }
    config = config_of(tmp_path, tiny_llama_dir, **settings)
    train(config)
    last = config.output / "checkpoint-4"
    whole = load_file(last / "weights.safetensors")
    shutil.rmtree(last)
    shutil.rmtree(config.output / "final")
    train(config, resume=True)
    again = load_file(last / "weights.safetensors")
    assert all(torch.equal(again[name], whole[name]) for name in whole)


@pytest.mark.slow
def test_a_killed_command_resumes_to_the_same_bits(tmp_path: Path, tiny_llama_dir: Path) -> None:
    """`mmalign train`, SIGKILL in the middle of an epoch, `mmalign train --resume`."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    settings = {
        "train": {"num_steps": 30, "batch_size": 3, "lr": 0.005, "save_every": 4, "num_threads": 1}
    }
    train(config_of(whole, tiny_llama_dir, **settings))
    path = write_config(killed, tiny_llama_dir, **settings)
    command = [sys.executable, "-m", "mmalign", "train", str(path)]
    log = killed / "run/metrics.jsonl"
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 90
    while not any(line["step"] >= 10 for line in read_json(log)):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "run/final").exists()
    assert 4 <= int(checkpoints(killed / "run")[-1].name.split("-")[1]) < 30

    assert train(configs.load(path), resume=True).steps == 30
    ours, theirs = (
        load_file(folder / "run/final/adapter_model.safetensors") for folder in (killed, whole)
    )
    assert ours.keys() == theirs.keys()
    assert all(ours[key].equal(theirs[key]) for key in ours)
    assert read_json(killed / "run/samples.jsonl") == read_json(whole / "run/samples.jsonl")
