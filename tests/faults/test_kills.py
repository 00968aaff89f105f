"""Runs that are killed at random moments, half of them inside of a save, and go on to the bit."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest
import seeded_clips
import seeded_pictures
import seeded_text
from forked import Child, fork
from harness import numbers, stream
from seeded import at

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from seeded import GoodRun

    from mmalign.config import RunConfig

OF_CLOCKS = ("rows_per_second", "tokens_per_second", "images_per_second")
LONGEST = 60.0  # seconds of a run
STEPS = {"num_steps": 8, "save_every": 2, "eval_every": 4, "log_every": 1}


class Trial:
    """A run left alone, and the same killed and continued."""

    def __init__(self, run: GoodRun) -> None:
        for name, value in STEPS.items():
            run.set(f"train.{name}", value)
        run.held_out = run.rows[-2:]
        run.rows = run.rows[:-2]
        self.folder = run.folder
        self.config: RunConfig = run.write()
        with at(self.folder):
            began = time.monotonic()
            assert self.start().wait(LONGEST) == 0, self.said()
            self.seconds = time.monotonic() - began
        self.whole = self.folder / "whole"
        (self.folder / "run").rename(self.whole)

    def start(self, *, resume: bool = False) -> Child:
        """The run in a copy of this process."""
        from mmalign.train.loop import train

        return fork(lambda: train(self.config, resume=resume), self.folder / "said.txt")

    def said(self) -> str:
        return (self.folder / "said.txt").read_text(encoding="utf-8")

    def check(self, rng: random.Random, number: int) -> None:
        """Kill it once to three times, then let it go on, and compare."""
        run = self.folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        with at(self.folder):
            resume = False
            for _ in range(rng.choice([1, 1, 2, 3])):
                child = self.start(resume=resume)
                self._kill(child, rng)
                resume = run.is_dir() and any(run.iterdir())
            if self.start(resume=resume).wait(LONGEST) != 0:
                raise AssertionError(f"case {number}: {self.said()}")
        differences = compare(self.whole, run)
        assert differences == [], f"case {number}: {differences}"

    def _kill(self, child: Child, rng: random.Random) -> None:
        run, end = self.folder / "run", time.monotonic() + LONGEST
        inside, moment = rng.random() < 0.5, time.monotonic() + rng.uniform(0, self.seconds)
        saves, seen = rng.randint(1, 4), set[str]()
        while not child.poll() and time.monotonic() < end:
            if inside and run.is_dir():
                seen |= {path.name for path in run.glob(".checkpoint-*")}
            if len(seen) >= saves if inside else time.monotonic() >= moment:
                time.sleep(rng.uniform(0, 0.01) if inside else 0)
                break
            time.sleep(0.0005)
        child.kill(rng.choice([signal.SIGKILL] * 4 + [signal.SIGTERM]))
        child.wait(LONGEST)


def compare(whole: Path, found: Path) -> list[str]:
    """What differs between two finished runs, and what is left over."""
    differences: list[str] = []
    names = {p.relative_to(whole) for p in whole.rglob("*.safetensors")}
    for name in sorted(names):
        other = found / name
        if not other.is_file() or other.read_bytes() != (whole / name).read_bytes():
            differences.append(f"{name} is not the same")
    for name in ("metrics.jsonl", "eval.jsonl"):
        if lines(whole / name) != lines(found / name):
            differences.append(f"{name} is not the same")
    kept = {path.name for path in whole.iterdir()}
    return differences + [f"{p.name} is left over" for p in found.iterdir() if p.name not in kept]


def lines(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    read = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    return [{k: v for k, v in line.items() if k not in OF_CLOCKS} for line in read]


def check(trial: Trial, kind: str, few: int) -> None:
    for number in numbers(few):
        trial.check(stream("kill", kind, number), number)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_bit(tiny_llama_dir: Path, tmp_path: Path) -> None:
    trial = Trial(seeded_text.good_run(tmp_path, tiny_llama_dir, stream("kill")))
    trial.check(stream("kill", "text", 0), 0)


@pytest.mark.slow
def test_killed_runs_on_text(tiny_llama_dir: Path, tmp_path: Path) -> None:
    check(Trial(seeded_text.good_run(tmp_path, tiny_llama_dir, stream("kill"))), "text", 60)


@pytest.mark.slow
def test_killed_runs_on_pictures(sd15_dir: Path, tmp_path: Path) -> None:
    run = seeded_pictures.good_run(tmp_path, sd15_dir, stream("kill"))
    run.set("diffusion.flip", value=True)
    run.set("diffusion.crop", "random")
    run.config["reference"] = {"kind": "ema", "decay": 0.9}
    check(Trial(run), "pictures", 20)


@pytest.mark.slow
def test_killed_runs_on_clips(
    video_models: Callable[[str], Path], clips_dir: Path, tmp_path: Path
) -> None:
    run = seeded_clips.good_run(tmp_path, video_models("qwen2_5_vl"), clips_dir, stream("kill"))
    check(Trial(run), "clips", 20)
