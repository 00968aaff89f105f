"""The video demonstration in seconds; in full, slowly."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmalign.errors import ConfigError
from mmalign.quickstart import video
from mmalign.quickstart.clips import Clips, Scene, sentence
from mmalign.quickstart.video_pairs import Marks, write_paper

pytest.importorskip("av")
pytest.importorskip("torchvision")


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
    for arm in video.ARMS:
        assert set(result[arm]) == set(result["base"]) >= {"yes_no", "said", "general"}
        for name, mean in result[arm].items():
            low, high = result["intervals"][arm][name]
            assert 0.0 <= low <= mean <= high <= 1.0
    assert result["verdict"]["passed"] is False, "nothing is learned in two steps"
    assert "No clear effect" in result["verdict"]["text"]
    assert (result["num_pairs"], result["num_clips"]) == (16, 16)


@pytest.mark.slow
def test_demo_trains_the_language_model_alone_with_the_ordinary_loop(demo: Path) -> None:
    from safetensors.torch import load_file

    from mmalign.config import load

    config = load(demo / "rrpo" / "config.yaml")
    assert config.modality == "video"
    assert config.objective.name == "rrpo"
    before = load_file(video.BASE / "model.safetensors")
    for arm in ("sft", "rrpo"):
        after = load_file(demo / arm / "final" / "model.safetensors")
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
        "What the annotator wrote",
        "What each model says",
        "What this does not show",
        "Curves",
    ):
        assert page.count(f"<h2>{heading}</h2>") == 1, heading
    assert "smoke run" in page
    assert "No clear effect" in page
    colours = len({"red", "green", "blue", "yellow"} & set(re.findall(r"the (\w+) \w+ ", page)))
    assert page.count('class="sheet" src="data:image/webp;base64,') <= 2 + colours
    assert not re.search(r'(src|href)="(?!data:|#)', page), "nothing is fetched"


def test_demo_leaves_a_used_folder_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep", encoding="utf-8")
    with pytest.raises(ConfigError, match="not an empty folder"):
        video.run(tmp_path, fast=True)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_arms_differ_in_their_objective_alone() -> None:
    sft, rrpo = (video.config(Path("out"), arm, seed=1) for arm in ("SFT", "RRPO"))
    assert rrpo.text.masks is not None
    assert rrpo.text.masks.kind == "spans"
    assert (rrpo.reference.kind, sft.reference.kind) == ("frozen-copy", "none")
    assert sft.train == rrpo.train
    assert sft.data == rrpo.data
    assert sft.model == rrpo.model
    assert sft.video.train == rrpo.video.train == ["language"]


def marks(no: str, *, confused: bool = False, broken: bool = False) -> Marks:
    """Answers about red and blue bars that shrink: yes to a yes, and `no` to a no."""
    scenes = tuple(Scene("bar", colour, "shrink") for colour in ("red", "blue") * 4)
    paper = write_paper(Clips((Path("0.mp4"),) * 8, scenes), seed=0)
    answers = {kind: tuple(one.answer for one in asked) for kind, asked in paper.asked.items()}
    if broken:
        answers |= dict.fromkeys(("event", "colour", "shape", "static"), ("the the .",) * 8)
    told = [sentence(scene) for scene in scenes]
    if confused:
        told = [each.replace("red", "green") for each in told]
    for kind, word in (("yes", "yes"), ("no", no)):
        answers[kind] = tuple(f"{word} , {each}" for each in told)
    return Marks(paper, answers)


BASE, SFT, RRPO = marks("yes"), marks("no", confused=True), marks("no")


@pytest.mark.parametrize(
    ("sft", "rrpo", "passed"),
    [
        (SFT, RRPO, True),
        (RRPO, RRPO, False),  # imitation does as well
        (SFT, BASE, False),  # nothing was mended
        (SFT, marks("no", broken=True), False),  # the rest is lost
    ],
)
def test_verdict_needs_a_gain_over_imitation_and_no_loss(
    sft: Marks, rrpo: Marks, passed: bool
) -> None:
    said = video.verdict({"base": BASE, "SFT": sft, "RRPO": rrpo})
    assert said["passed"] is passed
    assert ("No clear effect" in said["text"]) is not passed


def test_numbers_are_means_with_intervals() -> None:
    found: dict[str, Any] = video.numbers({"base": BASE, "SFT": SFT, "RRPO": RRPO})
    assert [found[arm]["said"] for arm in video.ARMS] == [1.0, 0.5, 1.0]
    assert [found[arm]["said_red_green"] for arm in video.ARMS] == [1.0, 0.0, 1.0]
    assert [found[arm]["yes_no"] for arm in video.ARMS] == [0.0, 1.0, 1.0]
    assert found["SFT"]["general"] == 1.0
    assert np.array_equal(found["intervals"]["SFT"]["said_red_green"], [0.0, 0.0])


@pytest.mark.slow
def test_demo_in_full_reaches_what_it_promises(tmp_path: Path) -> None:
    result = video.run(tmp_path / "full", seed=0)
    assert result["base"]["yes_no"] <= 0.2
    assert result["base"]["event"] >= 0.85
    assert result["verdict"]["passed"], result["verdict"]["text"]
    assert result["RRPO"]["said"] >= result["SFT"]["said"] + 0.3
