"""The labels of a canonical record: probabilities, votes, ties, scores, and desirable or not."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from mmalign.data.fields import Fields, number

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mmalign.data.example import ExampleKind

_OF_VOTES = ("votes_chosen", "votes_rejected", "votes_tie")
_PROBABILITIES = ("p_chosen", "agreement")
_GRADED = ("label_chosen", "label_rejected")
PREFERENCE = ("tie", *_PROBABILITIES, *_OF_VOTES, *_GRADED)
"""Keys of a pair that say which response is the better one, and by how much."""

_SIDES = (("chosen", "rejected"), ("image_chosen", "image_rejected"))
_SIDE = re.compile(r"(?:(?P<stem>.+[_-]))?(?P<side>chosen|rejected)(?P<rest>[_-].+)?", re.DOTALL)
_BEGIN_WITH_SIDE = ("_cut", "_masked")


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
    for key in _PROBABILITIES:
        value = fields.number(key, 0.0, 1.0)
        if value is not None:
            given[key] = value
    if any(name in fields for name in _OF_VOTES):
        counts = [fields.number(name, 0.0) for name in _OF_VOTES]
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


def prefers_rejected(record: Mapping[str, Any]) -> str:
    """What of a pair's record says that `rejected` is the better response; "" where nothing does.

    Labels that cannot be read say nothing: reading the record names what is wrong with them.
    """
    given = {key: record[key] for key in PREFERENCE if record.get(key) is not None}
    if not given or not any(_has_sides(record, names) for names in _SIDES):
        return ""
    fields = Fields(given)
    chosen, rejected = _pair_labels(fields)
    if fields.problems or chosen >= rejected:
        return ""
    if any(key in given for key in _OF_VOTES):
        return "votes"
    return next((key for key in _PROBABILITIES if key in given), " and ".join(_GRADED))


def in_order(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The record with the response as `chosen` that its own labels prefer.

    A pair whose labels prefer `rejected` is turned round: every key of one side changes place with
    that of the other (texts, prompts, media, spans, cut flags, votes, scores), and a probability p
    becomes 1 - p. Any other record comes back as it is.
    """
    if not prefers_rejected(record):
        return record
    turned = {_other_side(key, record): value for key, value in record.items()}
    for key in _PROBABILITIES:
        p = number(turned.get(key))
        if p is not None:
            turned[key] = 1.0 - p
    return turned


def _has_sides(record: Mapping[str, Any], names: tuple[str, str]) -> bool:
    return all(record.get(name) is not None for name in names)


def _other_side(key: str, record: Mapping[str, Any]) -> str:
    """The same key of the other response: rejected_cut for chosen_cut; others as they are."""
    found = _SIDE.fullmatch(key)
    if found is None or key in _PROBABILITIES:
        return key
    other = "rejected" if found["side"] == "chosen" else "chosen"
    partner = f"{found['stem'] or ''}{other}{found['rest'] or ''}"
    # `rejected_irrelevant` is a third response, and belongs to no side.
    belongs = not found["rest"] or partner in record or found["rest"] in _BEGIN_WITH_SIDE
    return partner if belongs else key
