"""Every fault of a run on text is told before its first step, and nothing is said without one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import seeded_text
from harness import stream
from seeded import cases, faults_of, heard, require_told

if TYPE_CHECKING:
    from pathlib import Path

FAULTS = faults_of(seeded_text)
QUICK = sorted(stream("quick").sample(sorted(FAULTS), 3))
"""What the default run asks; another seed asks others."""


def check(name: str, number: int, model: Path, folder: Path) -> None:
    require_told(FAULTS[name], seeded_text.good_run(folder, model, stream(name, number)))


@pytest.mark.parametrize("name", QUICK)
def test_a_fault_is_told(name: str, tiny_llama_dir: Path, tmp_path: Path) -> None:
    check(name, 0, tiny_llama_dir, tmp_path)


def test_a_good_run_says_nothing(tiny_llama_dir: Path, tmp_path: Path) -> None:
    assert heard(seeded_text.good_run(tmp_path, tiny_llama_dir, stream("good"))) == ([], "")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FAULTS))
def test_every_fault_is_told(name: str, tiny_llama_dir: Path, tmp_path: Path) -> None:
    for number, folder in cases(tmp_path, 3):
        check(name, number, tiny_llama_dir, folder)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["", "cache", "train"])
def test_good_runs_say_nothing(first: str, tiny_llama_dir: Path, tmp_path: Path) -> None:
    """Neither with a cache or a resume, when nothing has changed in between."""
    for number, folder in cases(tmp_path, 3):
        run = seeded_text.good_run(folder, tiny_llama_dir, stream("good", first, number))
        run.first, run.resume = first, first == "train"
        if first == "cache":
            run.config["reference"] = {"kind": "cached"}
        assert heard(run) == ([], "")
