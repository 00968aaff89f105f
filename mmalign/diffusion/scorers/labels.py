"""From scores to labels: who won, and how surely."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mmalign.errors import ConfigError, DataError

PUBLISHED_RANGE = (0.11543526500463486, 0.28201571106910706)
"""Least and greatest PickScore cosine in Pick-a-Pic v2, of SmPO's released code."""

_HUMAN = ("tie", "p_chosen", "agreement", "votes_chosen", "votes_rejected", "votes_tie")
_GRADED = ("label_chosen", "label_rejected")
_SIDES = ("_chosen", "_rejected")

Smooth = Literal["published", "data"] | tuple[float, float]


def smoothed(chosen: float, rejected: float, low: float, high: float) -> float:
    """SmPO's probability that `chosen` is the better one.

    p = sigmoid((s_chosen - s_rejected) / (high - low))

    the softmax of the two scores after both were scaled from [low, high] to [0, 1].

    Args:
        chosen: Score of the one.
        rejected: Score of the other.
        low: Least score of the data set.
        high: Greatest.

    Source: Lu et al. 2025, SmPO-Diffusion, released code.
    """
    z = (chosen - rejected) / (high - low)
    return 1.0 / (1.0 + math.exp(-z)) if z >= 0 else math.exp(z) / (1.0 + math.exp(z))


def parse_smooth(text: str, scorer: str) -> Smooth:
    """What `--smooth` says: `published`, `data` or MIN,MAX.

    Raises:
        ConfigError: Something else, an empty range, or the constants of another scorer.
    """
    if text == "data":
        return "data"
    if text == "published":
        if scorer != "pickscore":
            raise ConfigError(
                f"--smooth published: the published range is that of pickscore, and labels come "
                f"from {scorer}; give MIN,MAX, or data for the range of these scores"
            )
        return "published"
    low, _, high = text.partition(",")
    try:
        limits = (float(low), float(high))
    except ValueError:
        raise ConfigError(
            f"--smooth {text}: must be published, data, or MIN,MAX, e.g. 0.115,0.282"
        ) from None
    if not (all(map(math.isfinite, limits)) and limits[0] < limits[1]):
        raise ConfigError(f"--smooth {text}: MIN must be less than MAX")
    return limits


def score_range(smooth: Smooth | None, scores: Sequence[float]) -> tuple[float, float] | None:
    """The range [low, high] to smooth over; None without smoothing.

    Raises:
        DataError: The range of the data is wanted, and all of it has one score.
    """
    if smooth == "published":
        return PUBLISHED_RANGE
    if smooth != "data":
        return smooth
    low, high = min(scores), max(scores)
    if low == high:
        raise DataError(f"--smooth data: all pictures have the score {low:g}; give MIN,MAX")
    return low, high


@dataclass(frozen=True, slots=True)
class Labelled:
    """A record with its scores, and what became of its label."""

    record: dict[str, Any]
    swapped: bool = False
    tied: bool = False


def label_pair(
    record: Mapping[str, Any],
    scores: Mapping[str, Sequence[float]],
    *,
    relabel: bool,
    limits: tuple[float, float] | None,
) -> Labelled:
    """A pair with the scores of its two pictures.

    `score_chosen` and `score_rejected` are those of the first scorer, which also labels; all go to
    `meta.scores`. A label that is replaced goes to `meta.human`.

    Args:
        record: A canonical pair.
        scores: Scorer name to (chosen, rejected).
        relabel: The higher score wins, whatever the label was; equal scores are a tie.
        limits: Range to smooth over: `p_chosen` replaces the label. None: it stays.

    Departs: the released selectors make the first (SmPO: the second) picture of equal scores the
        winner; here they are a tie. Without `relabel`, a label that the scores contradict gets a
        `p_chosen` below 1/2.
    """
    row, own = dict(record), {name: list(values) for name, values in scores.items()}
    first = next(iter(own))
    swapped = relabel and own[first][1] > own[first][0]
    tied = own[first][0] == own[first][1]
    human: dict[str, Any] = {}
    if relabel or limits is not None:
        human = {key: row.pop(key) for key in (*_HUMAN, *_GRADED) if key in row}
    if swapped:
        order = {key: place for place, key in enumerate(row)}
        pairs = ((_other_side(key), value) for key, value in row.items())
        row = dict(sorted(pairs, key=lambda item: order.get(item[0], len(order))))
        own = {name: values[::-1] for name, values in own.items()}
    row["score_chosen"], row["score_rejected"] = own[first]
    if limits is not None:
        row["p_chosen"] = smoothed(own[first][0], own[first][1], *limits)
    elif relabel and tied:
        row["tie"] = True
    meta: dict[str, Any] = {**(row.get("meta") or {}), "scores": own}
    if human or relabel:
        meta["human"] = {"swapped": swapped, **human}
    return Labelled({**row, "meta": meta}, swapped, tied)


def _other_side(key: str) -> str:
    """The same key of the other picture: image_chosen for image_rejected."""
    for side, other in (_SIDES, _SIDES[::-1]):
        if key.endswith(side):
            return key.removesuffix(side) + other
    return key


def label_list(
    record: Mapping[str, Any], scores: Mapping[str, Sequence[float]], *, relabel: bool
) -> Labelled:
    """A ranked list with the scores of its pictures, in `meta.scores`.

    With `relabel` those of the first scorer become its `scores`, and what was there goes to
    `meta.human`; equal ones stay equal.
    """
    row, own = dict(record), {name: list(values) for name, values in scores.items()}
    meta: dict[str, Any] = {**(row.get("meta") or {}), "scores": own}
    first = own[next(iter(own))]
    if relabel:
        meta["human"] = {"scores": row.get("scores")}
        row["scores"] = first
    return Labelled({**row, "meta": meta}, False, len(set(first)) == 1)
