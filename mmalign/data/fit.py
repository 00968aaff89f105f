"""Examples in the shape an objective is defined on: kinds of rows, ties, roles, and one K."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, Protocol

from mmalign.data.select import all_pairs, best_worst
from mmalign.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mmalign.data.example import Candidate, Example

log = logging.getLogger("mmalign.data")

Ties = Literal["drop", "half", "soft"]
ListPairs = Literal["best_worst", "all"]


class Needs(Protocol):
    """The part of an objective's needs that concerns data."""

    @property
    def rows(self) -> str: ...  # noqa: D102
    @property
    def candidates(self) -> int: ...  # noqa: D102
    @property
    def roles(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def labels(self) -> bool: ...  # noqa: D102


def fit(
    examples: Sequence[Example],
    needs: Needs,
    *,
    ties: Ties = "drop",
    swap: bool = False,
    list_pairs: ListPairs = "best_worst",
) -> list[Example]:
    """The examples as rows of the kind `needs` asks for.

    Args:
        examples: Rows of any kinds.
        needs: The objective's `rows`, `candidates` and `roles`.
        ties: What becomes of pairs whose labels are equal: `drop`; `half`, both orders with half
            the weight; `soft`, one row with labels (1/2, 1/2). A list of equal scores is dropped.
        swap: Exchange better and worse: chosen and rejected, desirable or not, the sign of scores.
        list_pairs: How a ranked list becomes pairs.

    Raises:
        DataError: when a row cannot be of that kind, lacks a role, or K differs between rows.
    """
    rows = _settle_ties(examples, ties)
    if swap:
        rows = [_swapped(row) for row in rows]
    target = _target(rows, needs)
    reshape: dict[str, Callable[[Example], list[Example]]] = {
        "pair": lambda row: _to_pairs(row, list_pairs),
        "unpaired": _to_unpaired,
        "list": _to_list,
        "plain": _to_plain,
    }
    fitted = [_with_roles(new, needs.roles) for row in rows for new in reshape[target](row)]
    if target != "pair" and ties == "soft" and any(row.is_tie for row in rows):
        raise DataError(
            f"data.ties: soft gives labels (1/2, 1/2), which {target} rows cannot carry"
        )
    dropped = len(rows) - len(fitted)
    if target == "plain" and dropped:
        log.warning("%d undesirable responses are left out: nothing here learns from them", dropped)
    _check_one_k(fitted, needs)
    return fitted


def is_used(row: Example, needs: Needs, ties: Ties) -> bool:
    """Whether `fit` makes at least one row of it."""
    if row.is_tie and (ties == "drop" or row.kind != "pair"):
        return False
    single = needs.rows == "plain" or (needs.rows == "any" and needs.candidates <= 1)
    return not (single and row.kind == "unpaired" and row.labels[0] <= 0)


def reads_labels(rows: Sequence[Example], needs: Needs) -> bool:
    """Whether the objective reads the values of labels, once the rows are of its kind."""
    return needs.labels and _target(rows, needs) in ("pair", "list")


def check_trainable(rows: Sequence[Example], needs: Needs, names: str) -> None:
    """Refuse fitted rows that an objective can learn nothing from.

    Args:
        rows: What would be trained on.
        needs: The objective's `rows`.
        names: The files that the rows come from.

    Raises:
        DataError: The weight of every row is 0, or all single responses have one rating.
    """
    if not any(row.weight for row in rows):
        raise DataError(
            f"{names}: the weight of all {len(rows)} rows is 0, so nothing would be learned; give "
            "weights above 0, or none"
        )
    ratings = {row.labels[0] > 0.5 for row in rows if row.kind == "unpaired"}
    if needs.rows == "unpaired" and len(ratings) == 1:
        given, missing = ("", "un") if ratings == {True} else ("un", "")
        raise DataError(
            f"{names}: all {len(rows)} responses are {given}desirable, and the objective learns "
            f"from the difference to {missing}desirable ones: add some of those too"
            + (", or use sft, which learns from good ones alone" if not given else "")
        )


def _settle_ties(examples: Sequence[Example], ties: Ties) -> list[Example]:
    result: list[Example] = []
    dropped = 0
    for row in examples:
        if not row.is_tie or (ties == "soft" and row.kind == "pair"):
            result.append(row)
        elif ties == "half" and row.kind == "pair":
            decided = replace(row, labels=(1.0, 0.0, *row.labels[2:]), weight=row.weight / 2)
            result += [_named(decided, 0), _named(_swapped(decided), 1)]
        else:
            dropped += 1
    if dropped:
        log.warning("%d of %d rows are ties and are left out", dropped, len(examples))
    return result


def _named(row: Example, part: int) -> Example:
    return replace(row, id=f"{row.id}#{part}")


def _swapped(row: Example) -> Example:
    if row.kind == "pair":
        first, second, *extra = row.candidates
        # A corrupted clip is shown with the better response, whichever that is.
        extra = [
            replace(second, media=c.media, role=c.role) if c.role == "corrupted" else c
            for c in extra
        ]
        return replace(row, candidates=(second, first, *extra))
    if row.kind == "plain":
        raise DataError(
            f"row {row.id!r} has one unrated response, so data.swap has nothing to swap"
        )
    shift = 1.0 if row.kind == "unpaired" else 0.0
    n = row.num_rated
    return replace(row, labels=(*(shift - label for label in row.labels[:n]), *row.labels[n:]))


def _target(rows: Sequence[Example], needs: Needs) -> str:
    if needs.rows != "any":
        return needs.rows
    if needs.candidates <= 1:
        return "plain"
    return "list" if all(row.kind == "list" for row in rows) else "pair"


def _refuse(row: Example, target: str, reason: str) -> DataError:
    return DataError(f"row {row.id!r}: the objective needs {target} rows, but {reason}")


def _to_pairs(row: Example, list_pairs: ListPairs) -> list[Example]:
    if row.kind == "pair":
        return [row]
    if row.kind != "list":
        reason = "this one has a single response; give chosen and rejected, or use a loss for "
        loss = (
            "single responses, such as kto (diffusion_kto for pictures)"
            if row.kind == "unpaired"
            else "plain text, such as sft"
        )
        raise _refuse(row, "pair", reason + loss)
    scores = row.labels[: row.num_rated]
    chosen_rejected = [best_worst(scores)] if list_pairs == "best_worst" else all_pairs(scores)
    extra, extra_labels = row.candidates[len(scores) :], row.labels[len(scores) :]
    pairs = [
        replace(
            row,
            candidates=(row.candidates[i], row.candidates[j], *extra),
            labels=(1.0, 0.0, *extra_labels),
            kind="pair",
        )
        for i, j in chosen_rejected
    ]
    return pairs if len(pairs) == 1 else [_named(pair, i) for i, pair in enumerate(pairs)]


def _to_unpaired(row: Example) -> list[Example]:
    if row.kind == "unpaired":
        return [row]
    if row.kind == "plain":
        raise _refuse(row, "unpaired", "this response is not rated; add desirable: true or false")
    pair = _to_pairs(row, "best_worst")[0]
    rated = zip(pair.candidates[:2], pair.labels[:2], strict=True)
    better = max(pair.labels[:2])
    return [
        _named(_single(row, candidate, "unpaired", float(label == better)), i)
        for i, (candidate, label) in enumerate(rated)
    ]


def _single(
    row: Example, candidate: Candidate, kind: Literal["unpaired", "plain"], label: float
) -> Example:
    """One rated response, and itself under the record's own corrupted clip where there is one."""
    own = [c for c in row.candidates if c.role == "corrupted" and c.response == candidate.response]
    labels = (label, *[0.0] * len(own))
    return replace(row, candidates=(candidate, *own), labels=labels, kind=kind)


def _to_list(row: Example) -> list[Example]:
    if row.kind not in ("pair", "list"):
        raise _refuse(row, "list", "this one has a single response; give responses and scores")
    return [replace(row, kind="list")]


def _to_plain(row: Example) -> list[Example]:
    """The best response alone; none when the only one is undesirable."""
    if row.kind == "plain":
        return [row]
    scores = row.labels[: row.num_rated]
    if row.kind == "unpaired" and scores[0] <= 0:
        return []
    return [_single(row, row.candidates[scores.index(max(scores))], "plain", 1.0)]


MADE = frozenset(
    {"mismatched", "augmented", "corrupted", "rejected_corrupted"}
    | {f"corrupted_{level}" for level in ("video", "clip", "frame")}
)
"""Roles whose candidates an adapter makes for rows that do not bring them."""


def _with_roles(row: Example, roles: tuple[str, ...]) -> Example:
    """Only the rated candidates and those of `roles`, in order; adapters make those of `MADE`."""
    keep = list(range(row.num_rated))
    left = [(i, c.role) for i, c in enumerate(row.candidates) if c.role]
    for role in roles:
        found = next((i for i, name in left if name == role), None)
        if found is None and role in MADE:
            continue
        if found is None:
            have, want = sum(c.role == role for c in row.candidates), roles.count(role)
            raise DataError(
                f"row {row.id!r}: the objective needs {want} {role} response(s) a row, in the "
                f"field {role!r}, and this row has {have}"
            )
        left.remove((found, role))
        keep.append(found)
    if keep == list(range(len(row.candidates))):
        return row
    candidates = tuple(row.candidates[i] for i in keep)
    return replace(row, candidates=candidates, labels=tuple(row.labels[i] for i in keep))


def _check_one_k(rows: Sequence[Example], needs: Needs) -> None:
    sizes = Counter(len(row.candidates) for row in rows)
    if len(sizes) > 1:
        counts = ", ".join(f"{n} rows with {k}" for k, n in sorted(sizes.items()))
        raise DataError(
            f"all rows of a run must have the same number of responses, but there are {counts}; "
            "cut the lists to one length, or use a pair loss"
        )
    brought = {c.role for row in rows[:1] for c in row.candidates}
    made = sum(role in MADE and role not in brought for role in needs.roles)
    for k in sizes:
        if k + made < needs.candidates:
            raise DataError(
                f"the objective needs at least {needs.candidates} candidates a row, but the rows "
                f"have {k + made}"
            )
