"""The labels of a canonical record: probabilities, votes, ties, scores, and desirable or not."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmalign.data.example import ExampleKind
    from mmalign.data.fields import Fields


def read_labels(fields: Fields, kind: ExampleKind, num_responses: int) -> tuple[float, ...]:
    """The labels of the rated responses, by the keys that a record of the kind has for them."""
    if kind == "pair":
        return _pair_labels(fields)
    if kind != "list":
        return (1.0 if kind == "plain" or fields.flag("desirable") else 0.0,)
    scores = fields.numbers("scores")
    if num_responses and scores and num_responses != len(scores):
        fields.fail("scores must have one number a response", f"{len(scores)} for {num_responses}")
    return scores


def _pair_labels(fields: Fields) -> tuple[float, float]:
    p = _p_chosen(fields)
    graded = [fields.number(f"label_{side}", -math.inf) for side in ("chosen", "rejected")]
    if graded == [None, None]:
        return (p, 1.0 - p)
    if None in graded:
        fields.fail("label_chosen and label_rejected must be given together")
    if p != 1.0:
        fields.fail("label_chosen is given beside a probability, votes or tie; give one of them")
    return (graded[0] or 0.0, graded[1] or 0.0)


def _p_chosen(fields: Fields) -> float:
    """Probability that chosen is better: a tie, p_chosen, agreement, or votes; else 1."""
    given: dict[str, float] = {}
    if fields.flag("tie"):
        given["tie"] = 0.5
    for key in ("p_chosen", "agreement"):
        value = fields.number(key, 0.0, 1.0)
        if value is not None:
            given[key] = value
    names = ("votes_chosen", "votes_rejected", "votes_tie")
    if any(name in fields for name in names):
        counts = [fields.number(name, 0.0) for name in names]
        chosen, rejected, tie = (count or 0.0 for count in counts)
        total = chosen + rejected + tie
        if total > 0:
            given["votes"] = (chosen + 0.5 * tie) / total
        elif any(count is not None for count in counts):
            fields.fail("votes must not all be 0")
    values = list(given.values())
    if values and max(values) - min(values) > 1e-6 and "tie" not in given:
        fields.fail(f"{' and '.join(given)} contradict each other", f"give {values}")
    return values[0] if values else 1.0
