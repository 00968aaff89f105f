"""The diffusion demonstration in seconds; in full, and on real pictures with a real VAE, slowly."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from mmalign.errors import ConfigError
from mmalign.quickstart import diffusion

pytest.importorskip("sklearn")

ARMS = ("before", "after", "too_far")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("demo") / "new"
    diffusion.run(folder, seed=3, fast=True)
    return folder


def test_demo_writes_its_runs_pictures_and_summary(demo: Path) -> None:
    result = json.loads((demo / "summary.json").read_text(encoding="utf-8"))
    assert result["seed"] == 3
    assert result["fast"] is True
    assert result["seconds"] >= sum(result["stages"].values()) - 0.5
    for arm in ARMS:
        assert set(result[arm]) == {"ink", "legibility", "held_out_accuracy", "winner_error"}
        assert 0.0 < result[arm]["ink"] < 1.0
        assert 0.0 <= result[arm]["legibility"] <= 1.0
    assert result["before"]["held_out_accuracy"] == 0.0, "before a step all pairs are ties"
    assert result["before"]["winner_error"] == 0.0
    assert result["after"]["winner_error"] != 0.0
    assert result["too_far"]["winner_error"] != result["after"]["winner_error"]
    assert result["pairs"]["pairs"] == 10
    assert [point["step"] for point in result["by_step"]["aligned"]] == [0, 1, 2]
    assert (demo / "aligned" / "final" / "unet" / "config.json").is_file()


def test_demo_trains_with_the_ordinary_loop_from_an_ordinary_config(demo: Path) -> None:
    from mmalign.config import load

    config = load(demo / "aligned" / "config.yaml")
    assert config.modality == "diffusion"
    assert config.objective.name == "diffusion_dpo"
    assert config.model.lora is None
    rows = [
        json.loads(line)
        for line in (demo / "pairs" / "train" / "pairs.jsonl").read_text().splitlines()
    ]
    assert all(row["ink_chosen"] >= row["ink_rejected"] for row in rows)
    assert {row["prompt"] for row in rows} == {diffusion_prompt(digit) for digit in range(10)}, (
        "neutral prompts alone"
    )


def diffusion_prompt(digit: int) -> str:
    from mmalign.quickstart.digits import prompt

    return prompt(digit)


def test_demo_report_is_honest_and_self_contained(demo: Path) -> None:
    page = (demo / "report.html").read_text(encoding="utf-8")
    for heading in (
        "What happened",
        "Ink and legibility, step by step",
        "Ink of every picture",
        "What leaks",
        "Too far",
        "What this does not show",
    ):
        assert page.count(f"<h2>{heading}</h2>") == 1, heading
    assert "smoke run" in page
    assert page.count('class="sheet" src="data:image/png;base64,') >= 2
    assert not re.search(r'(src|href)="(?!data:|#)', page), "nothing is fetched"


def test_demo_is_the_same_for_a_seed(demo: Path, tmp_path: Path) -> None:
    again = diffusion.run(tmp_path / "again", seed=3, fast=True)
    first = json.loads((demo / "summary.json").read_text(encoding="utf-8"))
    timed = ("seconds", "stages")
    assert {k: v for k, v in again.items() if k not in timed} == {
        k: v for k, v in first.items() if k not in timed
    }


def test_demo_leaves_a_used_folder_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep", encoding="utf-8")
    with pytest.raises(ConfigError, match="not an empty folder"):
        diffusion.run(tmp_path, fast=True)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_settings_are_those_of_the_recipe() -> None:
    config = diffusion.config(Path("base"), diffusion.ALIGNED, Path("runs/aligned"), seed=1)
    train = config.train
    assert (train.num_steps, train.batch_size, train.warmup) == (100, 32, 10)
    assert (train.lr, train.schedule, train.weight_decay) == (2e-5, "linear", 0.0)
    assert config.objective.keywords == {"beta": 20000.0}
    sampling = config.diffusion.sampling
    assert (sampling.num_steps, sampling.guidance, sampling.sampler) == (20, 2.0, "ddim")
    assert sampling.clip_sample
    assert config.diffusion.caption_dropout == 0.0
    assert config.data.train[0].path == "runs/pairs/train/pairs.jsonl"


def test_pictures_of_a_seed_do_not_depend_on_how_many_are_drawn(demo: Path) -> None:
    from mmalign.quickstart import digits
    from mmalign.quickstart.digits_pairs import Painter, each_digit

    config = diffusion.config(
        demo / "base", diffusion.ALIGNED, demo / "unused", seed=0, sizes=diffusion.FAST
    )
    painter = Painter(config, digits.Oracle(digits.load()))
    many = painter.paint(painter.base, each_digit(12), 40)
    few = painter.paint(painter.base, each_digit(3), 40)
    np.testing.assert_allclose(many.pixels[:3], few.pixels, atol=1.5 / 255)
    assert many.first(3).digits == few.digits


@pytest.mark.slow
def test_demo_in_full_reaches_what_it_promises(tmp_path: Path) -> None:
    result = diffusion.run(tmp_path / "full", seed=0)
    before, after, too_far = (result[arm] for arm in ARMS)
    assert after["ink"] - before["ink"] >= 0.015
    assert after["legibility"] >= 0.92
    assert after["held_out_accuracy"] >= 0.95
    assert after["winner_error"] < 0.005
    assert too_far["legibility"] < 0.8
    assert too_far["winner_error"] > 0.1
