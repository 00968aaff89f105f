"""The implicit reward of a run equals what its own evaluation scored, in every modality."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from judged_rows import read, write
from toy_adapter import TOY, TOY_TOOLS, toy_config

from mmalign.config.judges import parse_judges
from mmalign.errors import CheckpointError, ConfigError
from mmalign.judging.base import Drawn
from mmalign.judging.build import build
from mmalign.judging.implicit import Implicit
from mmalign.judging.score import score_file
from mmalign.models.adapter import ADAPTERS, TOOLS
from mmalign.train.loop import train
from mmalign.train.metrics import read_json


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setitem(ADAPTERS, "text", TOY)
    monkeypatch.setitem(TOOLS, "text", TOY_TOOLS)
    config = toy_config(tmp_path, "train.num_steps=3", "train.eval_every=3", "sample.num_prompts=0")
    return train(config).run_dir


def logged(run: Path, beta: float) -> dict[str, list[float]]:
    """Rewards of the held-out rows of a run as its last evaluation has them, means over draws."""
    rows: dict[str, list[list[float]]] = defaultdict(list)
    for row in read_json(run / "eval.jsonl")[-1]["rows"]:
        both = zip(row["logps"], row["ref_logps"], strict=True)
        rows[row["id"].partition("@")[0]].append([beta * (own - ref) for own, ref in both])
    return {
        key: [sum(own) / len(own) for own in zip(*draws, strict=True)]
        for key, draws in rows.items()
    }


def judged(run: Path, data: Path, **options: Any) -> dict[str, list[float]]:
    out = data.with_name("judged.jsonl")
    score_file(data, out, Implicit(run, **options))
    return {line["id"]: line["scores"] for line in read(out)}


def test_rewards_are_those_of_the_run_s_last_evaluation(toy: Path, tmp_path: Path) -> None:
    found, known = judged(toy, tmp_path / "eval.jsonl"), logged(toy, 0.5)
    assert found.keys() == known.keys()
    assert any(abs(value) > 1e-3 for own in known.values() for value in own)
    for key, own in known.items():
        assert found[key] == pytest.approx(own, rel=1e-5, abs=1e-6)
    (tmp_path / "judged.jsonl").unlink()
    doubled = judged(toy, tmp_path / "eval.jsonl", beta=1.0)
    assert doubled["row-0"] == pytest.approx([2 * value for value in found["row-0"]], rel=1e-5)


def test_rows_of_any_number_of_responses_go_together(toy: Path) -> None:
    judge = Implicit(toy)
    rows = [Drawn(str(k), "abc", responses=tuple("abcdefg"[:k])) for k in (3, 1, 2, 3)]
    together = judge(rows)
    assert [len(one.rewards) for one in together] == [3, 1, 2, 3]
    for row, one in zip(rows, together, strict=True):
        assert judge([row])[0].rewards == pytest.approx(one.rewards, abs=1e-6)
    assert together[0].rewards[:2] == pytest.approx(together[2].rewards, abs=1e-6)


def test_a_run_is_named_as_a_judge_with_its_weights(toy: Path, tmp_path: Path) -> None:
    newest = build(parse_judges([f"implicit:{toy}"]))
    final = build(parse_judges([f"{{implicit: {toy}, checkpoint: final, beta: 2, name: old}}"]))
    assert (newest.name, final.name) == (str(toy), "old")
    assert newest.facts() != final.facts()
    with pytest.raises(CheckpointError, match="there is no such folder"):
        build(parse_judges([f"{{implicit: {toy}, checkpoint: nothing}}"]))
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["objective"] = {"name": "simpo"}
    (toy / "config.yaml").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match="has no one beta for a summed log-ratio"):
        Implicit(toy)
    assert Implicit(toy, beta=0.1)([Drawn("a", "abc", responses=("x", "y"))])


def test_a_row_that_cannot_be_scored_is_lost_with_its_reason(toy: Path) -> None:
    rows = [Drawn("a", "abc", responses=("x", "y")), Drawn("b", 3, responses=("x", "y"))]
    good, bad = Implicit(toy)(rows)
    assert good.note == ""
    assert all(map(math.isnan, bad.rewards))
    assert bad.note == "prompt must be a list of messages, but is 3"


@pytest.mark.runs
def test_text(tmp_path: Path, tiny_llama_dir: Path) -> None:
    rows = [{"id": f"r{k}", "prompt": f"Why {k}?", "chosen": "It is blue.", "rejected": "No"}
            for k in range(4)]  # fmt: skip
    data = write(tmp_path / "rows.jsonl", rows)
    config = {
        "model": {"path": str(tiny_llama_dir), "lora": {"rank": 4, "alpha": 8}},
        "data": {"train": str(data), "eval": str(data)},
        "objective": {"name": "dpo", "beta": 0.3},
        "train": {"num_steps": 3, "batch_size": 2, "lr": 0.005, "num_threads": 1},
        "sample": {"num_prompts": 0},
        "output": str(tmp_path / "run"),
    }
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(config))
    from mmalign import config as configs

    run = train(configs.load(path)).run_dir
    check(judged(run, data), logged(run, 0.3))


@pytest.mark.runs
def test_images(tmp_path: Path, sd15_dir: Path) -> None:
    from picture_runs import configured, write_data

    data = write_data(tmp_path, "pairs")["pairs"]
    settings = {"data": {"eval": str(data)}, "diffusion": {"eval_draws": 2}}
    config = configured(tmp_path, sd15_dir, data, train={"lr": 0.01}, **settings)
    run = train(config).run_dir
    check(judged(run, data), logged(run, 2000.0))


@pytest.mark.runs
def test_video(tmp_path: Path, clips_dir: Path, video_models: Callable[[str], Path]) -> None:
    from video_runs import configured, row, write_rows

    data = write_rows(clips_dir / "implicit.jsonl", [row(k) for k in range(3)])
    settings = {"data": {"eval": str(data)}, "objective": {"name": "dpo", "beta": 0.2}}
    config = configured(tmp_path, video_models("qwen2_5_vl"), data, **settings)
    run = train(config).run_dir
    elsewhere = tmp_path / "candidates.jsonl"  # the paths of clips start where they did
    elsewhere.write_bytes(data.read_bytes())
    score_file(elsewhere, tmp_path / "judged.jsonl", Implicit(run), pictures=clips_dir)
    lines = read(tmp_path / "judged.jsonl")
    check({line["id"]: line["scores"] for line in lines}, logged(run, 0.2))


def check(found: dict[str, list[float]], known: dict[str, list[float]]) -> None:
    assert found.keys() == known.keys()
    assert any(abs(value) > 1e-4 for own in known.values() for value in own)
    for key, own in known.items():
        assert found[key] == pytest.approx(own, rel=1e-3, abs=1e-4)
