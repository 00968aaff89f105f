"""Video models on CUDA: the numbers of a CPU, whole runs, features, answers and clues."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pytest
from devices import HALF, NEEDS_CUDA, cached, changed, command, exact, first_step, near, on
from video_runs import configured, row, write_rows

from mmalign.train.loop import train
from mmalign.train.metrics import read_json

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from mmalign.config import RunConfig

    Make = Callable[..., RunConfig]

pytest.importorskip("av")
pytestmark = NEEDS_CUDA

KINDS = ("qwen2_5_vl", "qwen3_vl", "llava_onevision", "qwen2_5_omni_thinker")


@pytest.fixture
def make(tmp_path: Path, clips_dir: Path, video_models: Callable[[str], Path]) -> Make:
    """Config of a run of a class on pairs about clips, with sections exchanged."""
    data: dict[str, dict[str, str]] = {}
    for kind in ("pair", "plain", "vista"):
        path = write_rows(tmp_path / f"{kind}.jsonl", [row(i, kind) for i in range(6)])
        data[kind] = {"path": str(path), "pictures": str(clips_dir)}

    def made(model: str, /, *, rows: str = "pair", **sections: Any) -> RunConfig:
        sections = {"objective": {"name": "dpo", "beta": 0.1}, **sections}
        return configured(tmp_path, video_models(model), data[rows], **sections)

    return made


CASES: dict[str, dict[str, Any]] = {
    "lora": {},
    "whole": {"model": {"lora": None}},
    "projector": {"model": {"lora": None}, "video": {"train": ["projector"]}},
    "tower": {"model": {"lora": None}, "video": {"train": ["tower", "language"]}},
    "plain rows": {"text": {"shared_prefix": "off"}},
    "kl": {"objective": {"name": "tdpo2"}},
    "per candidate": {"train": {"backward": "per_candidate"}},
}


STEPS = [(kind, name) for kind in KINDS[:2] for name in CASES]
STEPS += [(kind, name) for kind in KINDS[2:] for name in ("lora", "whole")]


@pytest.mark.parametrize(("kind", "name"), STEPS)
def test_a_step_in_float32_is_that_of_a_cpu(kind: str, name: str, make: Make) -> None:
    config = make(kind, **CASES[name])
    with exact():
        found, expected = first_step(config, "cuda"), first_step(config, "cpu")
    assert found.layout == expected.layout
    near(found, expected, loss=1e-3, gradient=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_in_bfloat16_is_near_float32(kind: str, dtype: str, make: Make) -> None:
    half = make(kind, model={"dtype": dtype}, **HALF)
    full = changed(half, model={"dtype": "float32"}, train={"mixed_precision": "no"})
    near(first_step(half, "cuda"), first_step(full, "cpu"), loss=0.1, gradient=0.35)


RUNS: dict[str, dict[str, Any]] = {
    "float32": {},
    "mixed": HALF,
    "whole": {"model": {"lora": None}, **HALF},
    "projector": {"model": {"lora": None}, "video": {"train": ["projector"]}},
    "bfloat16": {"model": {"dtype": "bfloat16"}},
}


OF_CLASSES = [(KINDS[0], name) for name in RUNS]
OF_CLASSES += [(kind, name) for kind in KINDS[1:] for name in ("float32", "mixed")]


@pytest.mark.parametrize(("kind", "name"), OF_CLASSES)
def test_the_commands(kind: str, name: str, make: Make, tmp_path: Path, clips_dir: Path) -> None:
    held_out = {"data": {"eval_fraction": 0.3}, "sample": {"num_prompts": 1}}
    config = make(kind, **RUNS[name], **held_out)
    path, run = tmp_path / "config.json", config.output
    questions = [
        {"prompt": "What does the cat do?", "video": str(clips_dir / "clip0.mp4"), "chosen": "x"},
        {"prompt": [{"role": "user", "content": "Which cat?"}]},
    ]
    prompts = write_rows(tmp_path / "questions.jsonl", questions)
    with on("cuda"):
        command("train", path)
        assert "reward_accuracy" in command("eval", path)
        shown = command("sample", path, "--prompts", prompts, "sample.temperature=1")
        assert shown == command("sample", path, "--prompts", prompts, "sample.temperature=1")
    assert (run / "report.html").stat().st_size > 10_000
    assert json.loads((run / "env.json").read_text(encoding="utf-8"))["device"] == "cuda"
    steps = [line for line in read_json(run / "metrics.jsonl") if "loss" in line]
    bound = 1e-2 if "bf" in str(RUNS[name]) else 1e-4
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=bound)
    assert all(line["grad_norm"] > 0.0 for line in steps)


@pytest.mark.parametrize("half", [False, True], ids=["float32", "mixed"])
def test_caches(half: bool, make: Make) -> None:
    """Features and reference scores of CUDA, read there and on a CPU."""
    config = make(KINDS[0], reference={"kind": "cached"}, **(HALF if half else {}))
    assert "features" in cached(config, "cuda")
    found, elsewhere = first_step(config, "cuda"), first_step(config, "cpu")
    near(found, elsewhere, loss=0.05, gradient=0.2 if half else 1e-2)
    with on("cuda"):
        train(config)


@pytest.mark.parametrize("half", [False, True], ids=["float32", "mixed"])
def test_clips_chosen_by_the_policy(half: bool, make: Make) -> None:
    """PaMi: the policy runs without a gradient before it runs with one."""
    pami: dict[str, Any] = {
        "objective": {"name": "pami_vdpo"},
        "video": {"selection": {"num_candidates": 2}},
        **(HALF if half else {}),
    }
    step = first_step(make(KINDS[0], rows="plain", **pami), "cuda")
    assert all(float(g.abs().max()) > 0.0 for n, g in step.gradients.items() if "lora_B" in n)


def test_clues(make: Make, tmp_path: Path) -> None:
    clues = {"clues": {"width": 64, "num_queries": 4}}
    config = make(KINDS[0], model={"lora": None}, video={"train": [], **clues})
    with exact():
        near(first_step(config, "cuda"), first_step(config, "cpu"), loss=1e-3, gradient=1e-3)
    with on("cuda"):
        train(config)
        prompts = write_rows(tmp_path / "q.jsonl", [{"prompt": "Why?"}])
        command("sample", tmp_path / "config.json", "--prompts", prompts)
