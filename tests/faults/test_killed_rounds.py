"""Rounds that are killed at any moment of any stage end with the bytes of an unbroken run."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import rounds_runs as small
from forked import Child, fork

LONGEST = 120.0  # seconds of a run


def start(folder: Path, model: dict[str, Any]) -> Child:
    return fork(lambda: small.run(folder, resume=True, model=model), folder / "said.txt")


def whole(folder: Path, model: dict[str, Any]) -> tuple[dict[str, str], float]:
    """The hashes of an unbroken run, and its seconds."""
    began = time.monotonic()
    child = start(folder, model)
    assert child.wait(LONGEST) == 0, (folder / "said.txt").read_text()
    seconds = time.monotonic() - began
    return small.hashes(folder / "rounds"), seconds


def broken(folder: Path, model: dict[str, Any], moments: list[float]) -> dict[str, str]:
    """The same of one that is killed after so many seconds each time, then let go on."""
    shutil.rmtree(folder / "rounds", ignore_errors=True)
    for moment in moments:
        child = start(folder, model)
        time.sleep(moment)
        child.kill()
        child.wait(LONGEST)
    assert start(folder, model).wait(LONGEST) == 0, (folder / "said.txt").read_text()
    return small.hashes(folder / "rounds")


def check(folder: Path, kills: int, model: dict[str, Any], seed: int) -> None:
    wanted, seconds = whole(folder, model)
    assert any("final" in name for name in wanted)
    rng = random.Random(seed)
    done = 0
    while done < kills:
        number = min(kills - done, rng.choice([2, 3, 4]))
        # Short ones too, so that several kills fall into one stage.
        moments = [rng.uniform(0, seconds * rng.choice([0.2, 0.5, 1.0])) for _ in range(number)]
        assert broken(folder, model, moments) == wanted, moments
        done += number


@pytest.mark.runs
def test_killed_rounds_go_on_to_the_bit(tmp_path: Path) -> None:
    check(tmp_path, 4, {"path": str(small.STORIES)}, 0)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, {"rank": 4, "alpha": 8}])
def test_30_kills_over_all_stages(lora: dict[str, Any] | None, tmp_path: Path) -> None:
    model = {"path": str(small.STORIES)} | ({"lora": lora} if lora else {})
    check(tmp_path, 30, model, 1)
