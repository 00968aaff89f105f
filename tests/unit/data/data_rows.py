"""Records and needs that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Write = Callable[[str, Sequence[Any]], str]
"""The `write` fixture: a file name and its records (or raw lines) to the file's path."""


@dataclass(frozen=True)
class Needs:
    rows: str = "pair"
    candidates: int = 2
    roles: tuple[str, ...] = ()
    labels: bool = False


PAIR = Needs()
UNPAIRED = Needs("unpaired", 2, ("mismatched",))
LIST = Needs("list", 3)
ANY = Needs("any", 1)


def pairs(n: int, **extra: Any) -> list[dict[str, Any]]:
    """Records p0, p1, ... with different texts."""
    return [
        {"id": f"p{i}", "prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i}"}
        | extra
        for i in range(n)
    ]
