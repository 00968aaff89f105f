"""The same run on a CPU and on CUDA, in one process."""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from accelerate.state import AcceleratorState
from typer.testing import CliRunner

from mmalign import config as configs
from mmalign.cli import app
from mmalign.inference import write_cache
from mmalign.preflight.check import check_config
from mmalign.train.backward import backward_joint, backward_per_candidate
from mmalign.train.run import build_run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

    from mmalign.config import RunConfig
    from mmalign.train.run import Run

NEEDS_CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
HALF: dict[str, Any] = {"train": {"mixed_precision": "bf16"}}

_USE_CPU = "ACCELERATE_USE_CPU"


@contextmanager
def on(device: str) -> Iterator[None]:
    """Inside, runs are placed on "cpu" or "cuda", as accelerate's own variable says to a user."""
    before = os.environ.pop(_USE_CPU, None)
    if device == "cpu":
        os.environ[_USE_CPU] = "true"
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield
    finally:
        os.environ.pop(_USE_CPU, None)
        if before is not None:
            os.environ[_USE_CPU] = before
        AcceleratorState._reset_state(reset_partial_state=True)


@contextmanager
def exact() -> Iterator[None]:
    """Float32 convolutions of CUDA in float32, without TF32's ten bits; products are by default."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@dataclass(frozen=True)
class Step:
    """What one backward pass gave; everything is on the CPU in float64."""

    loss: float
    logps: Tensor  # [B, K, L], 0 where nothing is scored
    gradients: dict[str, Tensor]
    layout: str | None

    def apart(self, other: Step) -> float:
        """How far the gradients of another step are, as a share of these."""
        assert self.gradients.keys() == other.gradients.keys()
        gap = sum(float((g - other.gradients[n]).square().sum()) for n, g in self.gradients.items())
        size = sum(float(g.square().sum()) for g in self.gradients.values())
        assert size > 0.0, "nothing has a gradient"
        return (gap / size) ** 0.5


def first_step(config: RunConfig, device: str, *, moved: float = 0.02) -> Step:
    """Loss, scores and gradients of a run's first micro-batch.

    Args:
        config: Of the run; nothing is written to its output.
        device: "cpu" or "cuda".
        moved: Size of the same random change of all trained weights, so that no gradient is 0 by
            the start of a LoRA, and policy and reference differ.
    """
    with on(device):
        run = build_run(config, check_config(config))
        assert run.accelerator.device.type == device
        move(run, moved)
        batch = next(run.batches()).to(run.accelerator.device)
        torch.manual_seed(0)
        if config.train.backward == "joint":
            loss, logps = backward_joint(run.accelerator, run.model, run.objective, batch)
        else:
            loss, logps = backward_per_candidate(
                run.accelerator, run.model, run.objective, batch, tolerance=0.05
            )
        trained = [(n, p) for n, p in run.adapter.named_parameters() if p.requires_grad]
        lacking = [name for name, p in trained if p.grad is None]
        assert len(lacking) < len(trained), "no trained weight has a gradient"
        assert logps.policy.device.type == device
        assert loss.value.isfinite()
        return Step(
            float(loss.value.detach()),
            logps.policy.detach().double().cpu(),
            {n: p.grad.detach().double().cpu() for n, p in trained if p.grad is not None},
            getattr(run.adapter, "_layout", None),
        )


@torch.no_grad()
def move(run: Run, size: float) -> None:
    """Change all trained weights alike on every device."""
    generator = torch.Generator().manual_seed(1)
    for parameter in run.adapter.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += (size * noise).to(parameter)


def command(*arguments: object) -> str:
    """What a command of mmalign prints; it must end well."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return result.output


def cached(config: RunConfig, device: str) -> str:
    """Write the caches of a config there."""
    with on(device):
        return write_cache(config)


def near(found: Step, expected: Step, *, loss: float, gradient: float) -> None:
    """Two steps are the same but for rounding: absolute in the loss, a share of the gradients."""
    gap = abs(found.loss - expected.loss)
    apart = expected.apart(found)
    assert gap <= loss and apart <= gradient, (  # noqa: PT018  both numbers are wanted
        f"losses {found.loss:.6g} and {expected.loss:.6g}, gradients {apart:.3g} apart"
    )


def changed(config: RunConfig, **sections: Any) -> RunConfig:
    """A config with settings exchanged, e.g. `train={"lr": 1e-3}`, and checked again."""
    given = config.model_dump(mode="json", exclude_unset=True)
    for name, section in sections.items():
        both = isinstance(section, dict) and name != "objective"
        given[name] = {**(given.get(name) or {}), **section} if both else section
    return configs.RunConfig.model_validate(given)


def write_text_config(folder: Path, model: Path, /, **sections: Any) -> Path:
    """Four steps of four pairs, three pairs held out; the run is `folder/run`."""
    subjects = ("cat", "dog", "sun", "air", "bread", "bird", "yeast", "man")
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", 12), ("eval", 3)):
        rows = [
            {
                "id": f"{name}-{i}",
                "prompt": f"{name}: what the {subjects[i % 8]} does{' all day' * (i % 3)}.",
                "chosen": f"The {subjects[i % 8]} plays in the sun{' and sleeps' * (i % 4)}.",
                "rejected": "No." if i % 2 else f"I will not say {i} things about it.",
            }
            for i in range(count)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    given: dict[str, Any] = {
        "model": {"path": str(model), "lora": {"rank": 4, "alpha": 8}},
        "data": {"train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl")},
        "objective": {"name": "dpo", "beta": 0.3},
        "train": {"num_steps": 4, "batch_size": 4, "lr": 5e-3, "num_threads": 1},
        "sample": {"num_prompts": 1, "max_new_tokens": 6},
        "output": str(folder / "run"),
    }
    for name, section in sections.items():
        both = isinstance(section, dict) and name != "objective"
        given[name] = {**given.get(name, {}), **section} if both else section
    path = folder / "config.json"
    path.write_text(json.dumps(given), encoding="utf-8")
    return path


def text_config(folder: Path, model: Path, /, **sections: Any) -> RunConfig:
    """The same, loaded."""
    return configs.load(write_text_config(folder, model, **sections))
