"""Small files of records."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from data_rows import Write
from picture_files import save


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write records (or raw lines) to a JSONL file and give its path."""

    def to_file(name: str, records: Sequence[Any]) -> str:
        lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
        path = tmp_path / name
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(path)

    return to_file


@pytest.fixture
def pics(tmp_path: Path) -> Path:
    """A folder with the images a.png, b.png and c.png."""
    for i, name in enumerate("abc"):
        save(tmp_path / f"{name}.png", i)
    return tmp_path
