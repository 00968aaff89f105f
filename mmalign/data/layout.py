"""What a layout is, and what layouts of texts and of pictures share."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mmalign.data.fields import number, show
from mmalign.data.turns import Columns
from mmalign.errors import DataError

HIGHER = ("score", "overall_score", "rating", "avg_rating", "reward")
LOWER = ("rank",)
"""Names of numbers of a response: of these the lowest is the best, of those above the highest."""

_END = re.compile(r"_([ab]|[0-9])(?:_path)?$")
"""What the columns of two responses end in: response_a, jpg_0, image_1_path."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a layout is recognised and read."""

    columns: str  # as shown to a user
    needs: tuple[tuple[str, ...], ...]  # one column of every group must be there
    unless: tuple[str, ...]  # and none of these
    read: Callable[[Columns], Columns]
    named: bool = False  # only used where the config names it


def order_of(row: Columns, names: tuple[str, str]) -> int:
    """Which of two responses won, 0 or 1; a tie, the votes and scores are written into the row.

    Reads `winner` or `better_response_id`, `tie`, and `votes_a` and `votes_b`, or votes with the
    ends that the responses have (`votes_0` and `votes_1`).

    Args:
        row: The row without the two responses.
        names: Their columns; where the first ends in 1 they are numbered from 1.
    """
    votes = _of_both(row, "votes", names)
    winner = row.pop("winner", row.pop("better_response_id", None))
    if winner is None and row.get("tie"):
        winner = "tie"
    if winner is None and votes:
        for_a, for_b = (number(count) or 0.0 for count in votes)
        winner = "tie" if for_a == for_b else "ab"[for_b > for_a]
    won = side_of(winner, names)
    if won is None:
        raise DataError(
            f"{names[0]} and {names[1]} need a `winner` (a, b or tie), `better_response_id`, `tie` "
            f"or `votes_a` and `votes_b`; the winner found is {show(winner)}"
        )
    if won < 0:
        won, row["tie"] = 0, row.get("tie") or True  # what is no flag is named when it is read
    if votes:
        row["votes_chosen"], row["votes_rejected"] = votes[won], votes[1 - won]
    for stem in (*HIGHER, *LOWER):
        values = _of_both(row, stem, names)
        if values:
            row[f"{stem}_chosen"], row[f"{stem}_rejected"] = values[won], values[1 - won]
    return won


def side_of(winner: Any, names: tuple[str, str]) -> int | None:
    """The response that a winner names, 0 or 1; -1 for a tie, None for anything else."""
    first = int(names[0].endswith("_1"))
    sides = {"a": 0, "model_a": 0, names[0]: 0, "b": 1, "model_b": 1, names[1]: 1}
    sides |= {str(first): 0, str(first + 1): 1}
    named = str(winner).lower()
    # The arenas write "tie", "tie (bothbad)" and "both_bad".
    return -1 if named.startswith(("tie", "both")) else sides.get(named)


def ends_of(names: tuple[str, str]) -> tuple[tuple[str, str], ...]:
    """What tells the columns of two responses apart: a and b, and what their own names end in."""
    found = [_END.search(name) for name in names]
    own = tuple(end[1] for end in found if end)
    return (("a", "b"), (own[0], own[1])) if len(own) == 2 and own[0] != "a" else (("a", "b"),)


def _of_both(row: Columns, stem: str, names: tuple[str, str]) -> list[Any]:
    """What the two have under STEM_a and STEM_b, or under ends of their own, out of the row."""
    for ends in ends_of(names):
        keys = [f"{stem}_{end}" for end in ends]
        if all(row.get(key) is not None for key in keys):
            return [row.pop(key) for key in keys]
    return []
