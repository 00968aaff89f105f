"""What a run notes step by step: one JSON object with its `step` a line."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    Record = dict[str, Any]

_LARGEST = 2**53  # a step beyond it is no count


def read_lines(path: Path) -> tuple[list[Record], int]:
    """The records of a file, and how many lines hold none.

    A line ends at a line feed alone. A run that was killed while it wrote leaves a torn last line.
    """
    if not path.is_file():
        return [], 0
    records: list[Record] = []
    odd = 0
    for line in path.read_bytes().split(b"\n"):
        if not line.strip():
            continue
        record = _record(line)
        if record is None:
            odd += 1
        else:
            records.append(record)
    return records, odd


def left_out(path: Path, odd: int) -> str:
    """The sentence about lines that are no records."""
    return f"{path.name}: {odd} unreadable line{'s' if odd > 1 else ''} left out"


def _record(line: bytes) -> Record | None:
    try:
        value: Any = json.loads(line)
        step: Any = value["step"]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None
    return value if type(step) is int and 0 <= step < _LARGEST else None
