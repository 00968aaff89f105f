"""What a layout is, and what layouts of texts and of pictures share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mmalign.data.fields import number, show
from mmalign.data.turns import Columns
from mmalign.errors import DataError


@dataclass(frozen=True, slots=True)
class Layout:
    """How a layout is recognised and read."""

    columns: str  # as shown to a user
    needs: tuple[tuple[str, ...], ...]  # one column of every group must be there
    unless: tuple[str, ...]  # and none of these
    read: Callable[[Columns], Columns]
    named: bool = False  # only used where the config names it


def order_of(row: Columns, names: tuple[str, str]) -> int:
    """Which of two responses won, 0 or 1; a tie and the votes are written into the row.

    Reads `winner` or `better_response_id`, `tie`, and `votes_a` and `votes_b`.

    Args:
        row: The row without the two responses.
        names: Their columns; where the first ends in 1 they are numbered from 1.
    """
    votes = [row.pop(f"votes_{side}", None) for side in "ab"]
    winner = row.pop("winner", row.pop("better_response_id", None))
    if winner is None and row.get("tie"):
        winner = "tie"
    if winner is None and None not in votes:
        for_a, for_b = (number(count) or 0.0 for count in votes)
        winner = "tie" if for_a == for_b else "ab"[for_b > for_a]
    first = int(names[0].endswith("_1"))
    sides = {"a": 0, "model_a": 0, names[0]: 0, "b": 1, "model_b": 1, names[1]: 1}
    sides |= {str(first): 0, str(first + 1): 1}
    if str(winner).startswith("tie"):
        row["tie"] = True
    elif str(winner) not in sides:
        raise DataError(
            f"{names[0]} and {names[1]} need a `winner` (a, b or tie), `better_response_id`, `tie` "
            f"or `votes_a` and `votes_b`; the winner found is {show(winner)}"
        )
    won = sides.get(str(winner), 0)
    if None not in votes:
        row["votes_chosen"], row["votes_rejected"] = votes[won], votes[1 - won]
    return won
