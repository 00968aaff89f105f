"""One row as a reader of files finds it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

HELD_OUT = ("eval", "validation", "test", "valid", "val", "dev")
"""Values of a `split` column, or names of hub splits, that are not trained on."""


Wanted = Callable[[str], bool]
"""Whether rows of a split are wanted; "" is that of rows that name none."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it was found."""

    place: str  # "file.jsonl:12": the line, or the row counted from 1 where there are no lines
    value: dict[str, Any] | None  # None: could not be read
    problem: str = ""
