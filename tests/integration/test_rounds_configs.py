"""Every config of rounds: checked, tried, and run for two rounds on the story model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import rounds_runs as small

from mmalign import config as configs
from mmalign.config import DataConfig, RunConfig
from mmalign.config.rounds import PromptsSpec
from mmalign.rounds import engine

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs" / "rounds").glob("*.yaml"))
STORIES = [path for path in CONFIGS if path.stem.endswith("_stories260k")]


def smaller(path: Path, folder: Path, **rounds: Any) -> RunConfig:
    """The config with few prompts, short responses and a rule that needs no package."""
    whole = configs.load(path)
    (folder / "my_rules.py").write_text(small.RULE)
    assert whole.rounds is not None
    settings = whole.rounds.model_dump(exclude_defaults=True)
    settings["judge"] = [{"rule": "my_rules:happy"}]
    settings["prompts"] = {"per_round": 12}
    settings["generate"]["max_new_tokens"] = 24
    changed = {
        "model": {"path": str(small.STORIES)},
        "data": {"train": str(small.write_prompts(folder)), "eval_fraction": 0.3},
        "rounds": settings | rounds,
        "output": str(folder / "rounds"),
    }
    return RunConfig.model_validate({**whole.model_dump(exclude_defaults=True), **changed})


@pytest.mark.runs
@pytest.mark.parametrize("path", STORIES, ids=lambda path: path.stem)
def test_config_is_tried(path: Path, tmp_path: Path) -> None:
    said: list[str] = []
    config = smaller(path, tmp_path, num=1)
    engine.dry_run(config, where=str(tmp_path / "c.yaml"), say=said.append, count=12)
    assert "pairs" in said[0]
    assert not config.output.exists()


@pytest.mark.runs
@pytest.mark.parametrize("path", STORIES, ids=lambda path: path.stem)
def test_method_runs_for_two_rounds(path: Path, tmp_path: Path) -> None:
    config = smaller(path, tmp_path, num=2)
    found = engine.run(config, where=str(tmp_path / "c.yaml"), say=lambda line: None)
    assert [one["round"] for one in found.measured] == [0, 1, 2]
    assert found.measured[2]["kl"]["mean"] > 0
    pairs = config.output / "round-02" / "pairs.jsonl"
    pair = json.loads(pairs.read_text().splitlines()[0])
    name = path.stem.removesuffix("_stories260k")
    if name in ("sppo", "gpo"):
        assert pair["label_chosen"] > pair["label_rejected"]
    if name in ("xpo", "vpo_online"):
        assert pair["calibration"].strip()
    if name == "xpo":
        assert pair["calibration"] in (pair["chosen"], pair["rejected"])
    derived = configs.load(config.output / "round-02" / "run" / "config.yaml")
    assert (derived.reference.kind == "mixture") == (name == "inpo")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_says_what_hardware_and_data_first(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert 15 <= len(lines) <= 30
    assert lines[1].startswith("# Hardware:")
    assert lines[2].startswith("# Data:")
    assert max(map(len, lines)) <= 110
    config = configs.load(path)
    assert config.rounds is not None
    assert config.output == Path("runs") / f"rounds-{path.stem.replace('_', '-')}"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_is_sound(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All that can be refused before anything is loaded, with the config's own prompts."""
    monkeypatch.chdir(ROOT)
    config = configs.load(path)
    if path.stem.endswith("_clips"):  # whose clips the demonstration draws
        shown = {"train": str(small.write_prompts(tmp_path)), "eval_fraction": 0.3}
        config = config.model_copy(update={"data": DataConfig.model_validate(shown)})
        assert config.rounds is not None
        rounds = config.rounds.model_copy(update={"prompts": PromptsSpec()})
        config = config.model_copy(update={"rounds": rounds})
    prompts = engine.check(config)
    assert prompts.held_out
    if path in STORIES:
        assert len(prompts.held_out) > 200
        assert len(prompts.train) > 3 * 128
