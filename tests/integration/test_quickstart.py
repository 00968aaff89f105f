"""The text demonstration: a smoke run, how its pairs and numbers come about, what it ships."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mmalign.quickstart import text
from mmalign.quickstart.text import STORIES, Told

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "new"
    text.run(folder, seed=3, fast=True)
    return folder


@pytest.mark.runs
def test_smoke_run_trains_and_measures_every_arm(demo: Path) -> None:
    result = json.loads((demo / "summary.json").read_text(encoding="utf-8"))
    assert (result["seed"], result["fast"], result["quickstart"]) == (3, True, "text")
    assert set(result["stages"]) == set(text.PLAN)
    for name in ("base", *text.ARMS):
        one = result[name]
        assert one["sentiment_interval"][0] <= one["sentiment"] <= one["sentiment_interval"][1]
        assert 0 < one["distinct_bigrams"] <= 1
        assert (one["kl"] == 0) == (name == "base")
    assert (demo / "dpo" / "final" / "model.safetensors").is_file()
    pairs = [json.loads(line) for line in (demo / "pairs.jsonl").read_text().splitlines()]
    assert len(pairs) == result["num_pairs"] > 0
    endings = [json.loads(line) for line in (demo / "endings.jsonl").read_text().splitlines()]
    assert [set(one) for one in endings] == [{"opening", "base", *text.ARMS}] * 8
    for pair in pairs:
        assert text.sentiment(pair["chosen"]) - text.sentiment(pair["rejected"]) > text.CLEARLY


@pytest.mark.runs
def test_page_shows_the_control_the_price_and_the_limits(demo: Path) -> None:
    page = (demo / "report.html").read_text(encoding="utf-8")
    assert "smoke run" in page
    for title in (
        "What happened",
        "The price, and a dial of divergences",
        "What this does not show",
    ):
        assert page.count(f"{title}</h2>") == 1
    assert page.count('class="answers"') == text._NUM_SHOWN
    for arm in text.ARMS.values():
        assert arm.label in page
    assert "<script src" not in page


@pytest.mark.runs
def test_openings_depend_on_the_seed_alone_and_end_with_a_word() -> None:
    first = text.openings((40, 7))
    assert list(first)[:20] == list(text.openings((20, 7)))
    assert first.keys() != text.openings((40, 8)).keys()
    for tokens, shown in first.items():
        assert len(tokens) == 11
        assert tokens[0] == 1
        assert not {0, 1, 2} & set(tokens[1:])
        assert shown == text._text(tokens)


@pytest.mark.runs
def test_base_has_no_distance_to_itself_and_goes_on_from_the_opening() -> None:
    opened = list(text.openings((8, 7)))
    told = text.tell((None, opened, 5))
    assert told.log_ratios == [0.0] * 8
    assert told == text.tell((None, opened, 5))
    assert all(0 < count <= 48 for count in told.num_tokens)
    assert any(ending.startswith(" ") for ending in told.texts), "the space before a word is kept"


def test_pair_is_the_happiest_and_the_saddest_ending() -> None:
    drawn = [
        (" and went home.", False),
        (" and was very happy.", True),
        (" and cried sadly.", False),
    ]
    assert text.pair_of("Lily ran", drawn) == {
        "prompt": "Lily ran",
        "chosen": " and was very happy.",
        "rejected": " and cried sadly.",
        "chosen_cut": True,
        "rejected_cut": False,
    }
    assert text.pair_of("Lily ran", drawn[:1] * 6) is None


def test_numbers_of_endings_by_hand() -> None:
    told = Told(["a b a b", "b a b"], [3.0, 1.0], [4, 4])
    found = text.numbers(told, np.array([0.5, -0.1]))
    assert math.isclose(found["sentiment"], 0.2)
    assert found["kl"] == 0.5, "nats over tokens of all endings"
    assert found["distinct_bigrams"] == 0.4, "(a b), (b a) of five"
    assert found["kl_interval"] == [0.25, 0.75]


def test_model_is_in_the_wheel_with_its_credits(tmp_path: Path) -> None:
    """Its files are those of the package, and the wheel that is built contains them."""
    shipped = {path.name for path in STORIES.iterdir()}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= shipped
    credits = (STORIES / "README.md").read_text(encoding="utf-8")
    for credit in ("karpathy/tinyllamas", "MIT", "TinyStories", "CDLA-Sharing-1.0"):
        assert credit in credits
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {
            Path(name).name: archive.read(name)
            for name in archive.namelist()
            if re.search(r"quickstart/stories260k/", name)
        }
    assert packed == {path.name: path.read_bytes() for path in STORIES.iterdir()}
