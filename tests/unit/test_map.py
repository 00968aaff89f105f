"""The map of the code says what the code is: docs/architecture.md and the image in it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GUIDES = ("docs/architecture.md", "CONTRIBUTING.md")


def rooms() -> set[str]:
    package = ROOT / "mmalign"
    modules = {path.stem for path in package.glob("*.py") if not path.stem.startswith("__")}
    return modules | {path.parent.name for path in package.glob("*/__init__.py")}


def test_the_picture_shows_the_rooms_and_their_imports() -> None:
    script = [sys.executable, str(ROOT / "docs/rooms.py"), "--check"]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_another_picture_is_found(tmp_path: Path) -> None:
    """A test of the test: one arrow more in the code than in the image."""
    (tmp_path / "docs").mkdir()
    for name in ("core", "data"):
        (tmp_path / "mmalign" / name).mkdir(parents=True)
        (tmp_path / "mmalign" / name / "__init__.py").write_text("")
    script = tmp_path / "docs/rooms.py"
    script.write_text((ROOT / "docs/rooms.py").read_text())
    assert subprocess.run([sys.executable, str(script)]).returncode == 0
    assert subprocess.run([sys.executable, str(script), "--check"]).returncode == 0
    (tmp_path / "mmalign/data/rows.py").write_text("def f():\n    import mmalign.core.types\n")
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "other rooms or arrows" in done.stdout


def test_each_room_is_described() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    described = re.findall(r"^\| `(\w+)/?` \|", text, re.MULTILINE)
    assert set(described) == rooms()
    assert len(described) == len(set(described))


@pytest.mark.parametrize("guide", GUIDES)
def test_files_and_names_of_the_guides_exist(guide: str) -> None:
    """`text/encode.py`, and `text/encode.py:Encoder.collate` for what a file defines."""
    text = (ROOT / guide).read_text(encoding="utf-8")
    named = re.findall(r"`((?:[a-z_]+/)+[a-z_0-9]+\.py)(?::([A-Za-z_.]+))?`", text)
    assert named
    for file, name in named:
        places = [place for place in (ROOT / "mmalign" / file, ROOT / file) if place.is_file()]
        assert places, f"{guide} names {file}, which is not there"
        for piece in filter(None, name.split(".")):
            pattern = rf"^\s*(?:async )?(?:def|class) {piece}\b|^\s*{piece}\b.*="
            source = places[0].read_text(encoding="utf-8")
            assert re.search(pattern, source, re.MULTILINE), f"{guide}: {file} has no {piece}"
