"""Columns beside a row's labels that say which response is the better one, where they disagree.

A reader follows one of them. The others are carried along unread, so a row may say two things at
once: scores that prefer `rejected`, a `better_response_id` beside another `winner`.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from mmalign.data.fields import as_list, number
from mmalign.data.layout import HIGHER, LOWER, ends_of, side_of
from mmalign.data.layouts import CHOICES
from mmalign.data.picture_layouts import CHOICES as PICTURE_CHOICES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mmalign.data.example import Example

_WINNERS = ("winner", "better_response_id", "label")
_RATINGS = ("desirable", "label", "kto_tag")
_SCORES = ("scores", "ratings", "human_preference")
_RANKS = ("ranks", "rank")


def contradictions(
    raw: Mapping[str, Any], record: Mapping[str, Any], row: Example, *, turned: bool = False
) -> dict[str, str]:
    """What disagrees about the better response: a phrase for each kind, and what was found.

    Args:
        raw: The row as its file has it, in any layout.
        record: The canonical record made of it, the better response first.
        row: The same as it is trained on.
        turned: Whether `chosen` of the file has become `rejected`.
    """
    if row.kind == "list":
        return _ranks_against_scores(raw)
    if row.kind != "pair":
        return _two_ratings(raw)
    numbers = _against_tie(record) if row.is_tie else _against_order(record)
    return numbers | _two_winners(raw, -1 if row.is_tie else int(turned))


def _against_tie(record: Mapping[str, Any]) -> dict[str, str]:
    """A tie whose votes or probability name a winner. Most votes for a tie make it one."""
    if record.get("tie") is not True:
        return {}
    for key in ("p_chosen", "agreement"):
        if number(record.get(key)) not in (None, 0.5):
            return {f"tie beside another {key}": f"{record[key]}"}
    votes = [number(record.get(f"votes_{side}")) or 0.0 for side in ("chosen", "rejected", "tie")]
    if votes[0] != votes[1] and max(votes[:2]) > votes[2]:
        shown = " to ".join(f"{count:g}" for count in votes[:2])
        return {"tie beside votes for one of the two": f"{shown}, and {votes[2]:g} for a tie"}
    return {}


def _against_order(record: Mapping[str, Any]) -> dict[str, str]:
    """Numbers of the two responses that do not say that the chosen one is the better."""
    found: dict[str, str] = {}
    for better, worse, lower in _numbered(frozenset(record)):
        first, second = number(record[better]), number(record[worse])
        if first is None or second is None or (first < second if lower else first > second):
            continue
        shown = f"{first:g} and {second:g}"
        says = "equal to" if first == second else "above" if lower else "below"
        found[f"{better} {says} {worse}, where chosen counts as the better one"] = shown
    return found


@cache
def _numbered(columns: frozenset[str]) -> tuple[tuple[str, str, bool], ...]:
    """Pairs of columns that hold a number of each response, and whether a lower one is better."""
    names = [
        (form.format(stem, "chosen"), form.format(stem, "rejected"), stem in LOWER)
        for stem in (*HIGHER, *LOWER)
        for form in ("{0}_{1}", "{1}_{0}", "{0}-{1}", "{1}-{0}")
    ]
    return tuple((one, other, low) for one, other, low in names if {one, other} <= columns)


def _two_winners(raw: Mapping[str, Any], won: int) -> dict[str, str]:
    """Columns that name different winners of one comparison; `won` is that of chosen, rejected."""
    names = _compared(frozenset(key for key, value in raw.items() if value is not None))
    if names is None:
        return {}
    if names[1].endswith("rejected") and not any(k == "winner" or "label_" in k for k in raw):
        return {}  # by far the most rows
    sides: dict[str, int | None] = {}  # what is followed comes first
    shares: dict[str, int | None] = {}
    for ends in dict.fromkeys((*ends_of(names), ("0", "1"))):
        keys = [f"label_{end}" for end in ends]
        shares[" and ".join(keys)] = _higher(*(number(raw.get(key)) for key in keys))
    if names in PICTURE_CHOICES:
        sides |= shares
    if names[1].endswith("rejected"):
        sides["the order of chosen and rejected"] = won
        if str(raw.get("winner")) in names:
            sides["winner"] = side_of(raw["winner"], names)
    else:
        sides |= {key: side_of(raw[key], names) for key in _WINNERS if raw.get(key) is not None}
        sides |= {"tie": -1} if raw.get("tie") is True else {}
    told = [(key, side) for key, side in (sides | shares).items() if side is not None]
    for key, side in told[1:]:
        if side != told[0][1]:
            return {f"{told[0][0]}, followed, against {key}": ""}
    return {}


def _higher(first: float | None, second: float | None) -> int | None:
    """Which of two numbers is the higher, 0 or 1; -1 where they are equal."""
    if first is None or second is None:
        return None
    return -1 if first == second else int(second > first)


@cache
def _compared(columns: frozenset[str]) -> tuple[str, str] | None:
    """The columns of the two responses of a row."""
    pairs = (*CHOICES, *PICTURE_CHOICES, ("chosen", "rejected"), ("image_chosen", "image_rejected"))
    return next((names for names in pairs if set(names) <= columns), None)


def _ranks_against_scores(raw: Mapping[str, Any]) -> dict[str, str]:
    """Both given for the responses of a list, in different orders."""
    scores, ranks = _numbers(raw, _SCORES), _numbers(raw, _RANKS)
    if not scores or len(scores) != len(ranks) or None in scores or None in ranks:
        return {}
    both = ((s or 0.0, r or 0.0) for s, r in zip(scores, ranks, strict=True))
    pairs = sorted(both, reverse=True)
    if any(s > t and r > q for (s, r), (t, q) in pairwise(pairs)):
        return {"ranks in another order than the scores": ""}
    return {}


def _numbers(raw: Mapping[str, Any], names: tuple[str, ...]) -> list[float | None]:
    """The numbers of a list under the first of the names that is there."""
    found = next((as_list(raw[name]) for name in names if raw.get(name) is not None), None)
    return [number(value) for value in found or []]


def _two_ratings(raw: Mapping[str, Any]) -> dict[str, str]:
    """`desirable`, `label` and `kto_tag` of one response that differ."""
    given = {key: raw[key] for key in _RATINGS if isinstance(raw.get(key), bool | int)}
    for key, value in list(given.items())[1:]:
        first = next(iter(given))
        if bool(value) != bool(given[first]):
            return {f"{first} and {key} that differ": f"{given[first]} and {value}"}
    return {}
