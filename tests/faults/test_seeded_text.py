"""Every fault of a run on text is told before its first step, and nothing is said without one."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
import seeded_text
from harness import numbers, stream
from seeded import faults_of, heard

if TYPE_CHECKING:
    from pathlib import Path

FAULTS = faults_of(seeded_text)
QUICK = sorted(stream("quick").sample(sorted(FAULTS), 3))
"""What the default run asks; another seed asks others."""


def check(name: str, number: int, model: Path, folder: Path) -> None:
    rng = stream(name, number)
    run = seeded_text.good_run(folder, model, rng)
    wanted = FAULTS[name](run)
    warnings, error = heard(run)
    assert any(re.search(wanted, line, re.DOTALL) for line in (*warnings, error)), (
        f"{name}, case {number}: nothing says {wanted!r}; said was {[*warnings, error]}"
    )


@pytest.mark.parametrize("name", QUICK)
def test_a_fault_is_told(name: str, tiny_llama_dir: Path, tmp_path: Path) -> None:
    check(name, 0, tiny_llama_dir, tmp_path)


def test_a_good_run_says_nothing(tiny_llama_dir: Path, tmp_path: Path) -> None:
    assert heard(seeded_text.good_run(tmp_path, tiny_llama_dir, stream("good"))) == ([], "")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FAULTS))
def test_every_fault_is_told(name: str, tiny_llama_dir: Path, tmp_path: Path) -> None:
    for number in numbers(3):
        folder = tmp_path / str(number)
        folder.mkdir()
        check(name, number, tiny_llama_dir, folder)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["", "cache", "train"])
def test_good_runs_say_nothing(first: str, tiny_llama_dir: Path, tmp_path: Path) -> None:
    """Neither with a cache or a resume, when nothing has changed in between."""
    for number in numbers(3):
        folder = tmp_path / str(number)
        folder.mkdir()
        run = seeded_text.good_run(folder, tiny_llama_dir, stream("good", first, number))
        run.first, run.resume = first, first == "train"
        if first == "cache":
            run.config["reference"] = {"kind": "cached"}
        assert heard(run) == ([], "")
