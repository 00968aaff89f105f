"""The image at the top of the README shows the numbers of the run that is kept beside it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def effect(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, check=False
    )


def test_image_is_that_of_the_summary_kept() -> None:
    assert effect(DOCS / "effect.py", "--check").returncode == 0
    summary = json.loads((DOCS / "effect.json").read_text(encoding="utf-8"))
    image = (DOCS / "effect.svg").read_text(encoding="utf-8")
    for arm in ("base", "sft", "dpo", "js"):
        assert f">{summary[arm]['sentiment']:.2f}</text>" in image
        assert f">{summary[arm]['distinct_bigrams']:.2f}</text>" in image
        widths = [
            float(width) for width in re.findall(rf'class="{arm}" .*?width="([\d.]+)"', image)
        ]
        assert [round(widths[0] / 300, 2), round(widths[1] / 120, 2)] == [
            round(summary[arm][key], 2) for key in ("sentiment", "distinct_bigrams")
        ]
    assert "prefers-color-scheme: dark" in image
    assert (ROOT / "README.md").read_text(encoding="utf-8").count("](docs/effect.svg)") == 1


def test_other_numbers_are_found_and_a_smoke_run_is_refused(tmp_path: Path) -> None:
    for name in ("effect.py", "effect.svg", "effect.json"):
        shutil.copy(DOCS / name, tmp_path)
    summary = json.loads((tmp_path / "effect.json").read_text(encoding="utf-8"))
    summary["dpo"]["sentiment"] += 0.02
    other = tmp_path / "summary.json"
    other.write_text(json.dumps(summary), encoding="utf-8")
    assert effect(tmp_path / "effect.py", "--check", str(other)).returncode == 1
    assert effect(tmp_path / "effect.py", str(other)).returncode == 0
    assert effect(tmp_path / "effect.py", "--check").returncode == 0, "both were written"
    other.write_text(json.dumps(summary | {"fast": True}), encoding="utf-8")
    done = effect(tmp_path / "effect.py", str(other))
    assert (done.returncode, "no summary of a whole run" in done.stdout) == (1, True)
