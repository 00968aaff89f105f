"""The video demonstration in seconds; in full, slowly."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mmalign.errors import ConfigError
from mmalign.quickstart import video

pytest.importorskip("av")
pytest.importorskip("torchvision")

ARMS = ("before", "after", "control")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "new"
    video.run(folder, seed=3, fast=True)
    return folder


@pytest.mark.slow
def test_demo_writes_its_runs_and_summary(demo: Path) -> None:
    result = json.loads((demo / "summary.json").read_text(encoding="utf-8"))
    assert result["seed"] == 3
    assert result["fast"] is True
    assert result["seconds"] >= sum(result["stages"].values()) - 0.5
    for arm in ARMS:
        assert set(result[arm]) == set(result["before"]) >= {"pair", "basic", "general"}
        assert all(0.0 <= share <= 1.0 for share in result[arm].values())
    assert result["gain"]["pair"] == pytest.approx(
        result["after"]["pair"] - result["before"]["pair"], abs=2e-4
    )
    assert result["verdict"]["passed"] is False, "nothing is learned in two steps"
    assert "No clear effect" in result["verdict"]["text"]
    assert result["num_pairs"] == 16
    assert result["base_steps"] + result["base_steps_skipped"] == 3


@pytest.mark.slow
def test_demo_trains_the_language_model_alone_with_the_ordinary_loop(demo: Path) -> None:
    from safetensors.torch import load_file

    from mmalign.config import load

    config = load(demo / "preference" / "config.yaml")
    assert config.modality == "video"
    assert config.objective.name == "rrpo"
    files = [demo / name / "model.safetensors" for name in ("base", "preference/final")]
    before, after = (load_file(file) for file in files)
    assert set(before) == set(after)
    moved = {name for name in before if not before[name].equal(after[name])}
    assert any("layers.1.mlp" in name for name in moved)
    frozen = ("vision_tower", "multi_modal_projector", "image_newline")
    assert not [name for name in moved if any(part in name for part in frozen)]


@pytest.mark.slow
def test_demo_report_is_honest_and_self_contained(demo: Path) -> None:
    page = (demo / "report.html").read_text(encoding="utf-8")
    for heading in (
        "What happened",
        "What it saw and what it said",
        "It sees the event and says yes",
        "What this does not show",
        "Curves",
    ):
        assert page.count(f"<h2>{heading}</h2>") == 1, heading
    assert "smoke run" in page
    assert "No clear effect" in page
    assert page.count('class="sheet" src="data:image/webp;base64,') == 2
    assert not re.search(r'(src|href)="(?!data:|#)', page), "nothing is fetched"


def test_demo_leaves_a_used_folder_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep", encoding="utf-8")
    with pytest.raises(ConfigError, match="not an empty folder"):
        video.run(tmp_path, fast=True)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_settings_are_those_of_the_recipe() -> None:
    config = video.config(Path("out"), video.PREFERENCE, "preference", seed=1)
    train = config.train
    assert (train.num_steps, train.batch_size, train.lr, train.warmup) == (300, 32, 1e-3, 15)
    assert (train.schedule, train.weight_decay) == ("cosine", 0.0)
    assert config.objective.keywords == {"beta": 0.5, "alpha": 0.02}
    assert config.text.masks is not None
    assert config.text.masks.kind == "spans"
    assert config.reference.kind == "frozen-copy"
    assert config.video.train == ["language"]
    assert config.data.train[0].path == str(Path("out/clips/pairs/pairs.jsonl"))
    control = video.config(Path("out"), video.CONTROL, "control", seed=1)
    assert control.train == train
    assert control.reference.kind == "none"


@pytest.mark.parametrize(
    ("pair", "general", "passed"),
    [((0.0, 0.2), (1.0, 0.96), True), ((0.0, 0.1), (1.0, 1.0), False),
     ((0.0, 0.9), (1.0, 0.9), False), ((0.5, 0.2), (0.5, 0.9), False)],
)  # fmt: skip
def test_verdict_needs_a_gain_and_no_loss(
    pair: tuple[float, float], general: tuple[float, float], passed: bool
) -> None:
    def marks(index: int, named: float = 1.0) -> Any:
        shares = {"pair": np.full(50, pair[index]), "general": np.full(50, general[index])}
        seen = np.arange(50) < 50 * named
        return SimpleNamespace(**shares, names_event=lambda _: seen)

    said = video.verdict(marks(0), marks(1))
    assert said["passed"] is passed
    assert ("No clear effect" in said["text"]) is not passed
    assert "names only" not in said["text"]
    assert "names only 40 %" in video.verdict(marks(0, named=0.4), marks(1))["text"]


@pytest.mark.slow
def test_demo_in_full_reaches_what_it_promises(tmp_path: Path) -> None:
    result = video.run(tmp_path / "full", seed=0)
    before, after = result["before"], result["after"]
    assert before["pair"] <= 0.2
    assert before["event_word"] >= 0.85
    assert result["false_yes"]["share"] >= 0.8
    assert result["verdict"]["passed"], result["verdict"]["text"]
    assert after["basic"] >= 0.9
