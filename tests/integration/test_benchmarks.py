"""The benchmark of a diffusion step runs to its end; its numbers are for a quiet machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "benchmarks" / "diffusion_vs_diffusers.py"


@pytest.mark.slow
@pytest.mark.parametrize("model", ["sd15", "sdxl"])
def test_arms_take_their_steps_and_are_compared(model: str, tmp_path: Path) -> None:
    told = ["--tiny", "--rounds", "1", "--model", model, "--resolution", "64", "--dtype", "float32"]
    out = tmp_path / "found.json"
    folder = ["--folder", str(tmp_path / "pipeline"), "--json", str(out)]
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *told, *folder], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (found,) = json.loads(out.read_text(encoding="utf-8"))["comparisons"]
    assert list(found) == ["script", "mmalign, live", "mmalign, cached"]
    assert all(arm["seconds"] > 0 and arm["mebibytes_whole_process"] > 0 for arm in found.values())
    assert "pairs a second, of the script's" in done.stdout
