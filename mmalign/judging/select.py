"""`mmalign data select`: judged candidates to preference pairs, by the maths of `data/select.py`.

A response that is not judged, is empty or was cut off never wins; a cut one may lose, and then
`rejected_cut` says so (`cut: wins` lets it win too, and no end is learned). Identical responses are
one, and equal rewards make no pair.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmalign.config.judges import SelectSpec
from mmalign.data import jobs, select
from mmalign.data.fields import as_list, as_object
from mmalign.data.parse import OPTIONAL
from mmalign.data.parse_media import MEDIA_KEYS, WHOLE_KEYS
from mmalign.errors import DataError
from mmalign.judging.base import JUDGED, Judged, read_judged

Floats = select.Floats
log = logging.getLogger("mmalign.judging")

_EACH = ("spans", "steps")  # a list for each response
_OWN = ("id", "responses", "images", "about", "cut", *_EACH, *JUDGED)
_READ = frozenset(("prompt", "system", *OPTIONAL, *MEDIA_KEYS, *WHOLE_KEYS)) - frozenset(_OWN)


@dataclass(frozen=True, slots=True)
class Field:
    """The responses of one prompt among which pairs are chosen, M of them.

    Attributes:
        values: [M] rewards, or what a selector makes of them.
        wins: [M, M] probability that one is preferred to another.
        may_win: [M] False for one that was cut off, unless it may win.
        rng: Of the row: a function of seed and id.
        given: Whether the judge compared pairs; else `wins` follow from the rewards.
    """

    values: list[float]
    wins: Floats
    may_win: list[bool]
    rng: np.random.Generator
    given: bool


Chosen = tuple[list[select.Pair], list[float]]
"""Pairs, and the values by which they were chosen."""


def _best_worst(row: Field, spec: SelectSpec) -> Chosen:
    """The best against the worst; with `keep`, the second best against the second worst too."""
    return select.best_against_worst(row.values, row.may_win)[: spec.keep or 1], row.values


def _all(row: Field, spec: SelectSpec) -> Chosen:
    """Every pair, the widest gap first."""
    pairs = [(i, j) for i, j in select.all_pairs(row.values) if row.may_win[i]]
    pairs.sort(key=lambda pair: row.values[pair[1]] - row.values[pair[0]])
    return pairs[: spec.keep], row.values


def _drawn(pair: Callable[..., list[select.Pair]]) -> Callable[[Field, SelectSpec], Chosen]:
    """Responses that may win meet in a drawn order."""

    def chosen(row: Field, spec: SelectSpec) -> Chosen:
        members = [i for i, may in enumerate(row.may_win) if may]
        return _paired(pair, row, members)[: spec.keep], row.values

    return chosen


def _paired(
    pair: Callable[..., list[select.Pair]], row: Field, members: Sequence[int]
) -> list[select.Pair]:
    order = row.rng.permutation(len(members)).tolist()
    found = pair([row.values[i] for i in members], order)
    return [(members[i], members[j]) for i, j in found]


def _rso(row: Field, spec: SelectSpec) -> Chosen:
    """What statistical rejection sampling accepts, paired."""
    members = [i for i, may in enumerate(row.may_win) if may]
    keep = spec.keep or max(2, len(members) // 4)
    if len(members) < keep:
        raise DataError(f"fewer than {keep} responses that rso could accept")
    values = [row.values[i] for i in members]
    accepted = select.rejection_sample(values, keep, row.rng, beta=spec.beta)
    pair = select.first_round if spec.pair == "first_round" else select.tournament
    return _paired(pair, row, [members[i] for i in accepted]), row.values


def _win_rate(row: Field, spec: SelectSpec) -> Chosen:
    """The response that beats the others most against the one that does so least (SPO)."""
    rates = select.win_rate(row.wins).tolist()
    return select.best_against_worst(rates, row.may_win)[: spec.keep or 1], rates


def _targets(row: Field, spec: SelectSpec) -> Chosen:
    """Best against worst by the labels of SPPO or GPO: means over all responses, itself included.

    SPPO: the win rate, 1/2 against itself. GPO: of rewards r_i - mean r; of a judge that compares,
    the mean of P(i beats j) - P(j beats i), in [-1, 1].
    """
    if spec.labels == "win_rate":
        labels = np.nanmean(row.wins, axis=1)
    elif row.given:
        labels = np.nanmean(row.wins - row.wins.T, axis=1)
    else:
        labels = np.asarray(row.values) - np.mean(row.values)
    values = labels.tolist()
    return select.best_against_worst(values, row.may_win)[: spec.keep or 1], values


SELECTORS: dict[str, Callable[[Field, SelectSpec], Chosen]] = {
    "best_worst": _best_worst,
    "all": _all,
    "first_round": _drawn(select.first_round),
    "tournament": _drawn(select.tournament),
    "rso": _rso,
    "win_rate": _win_rate,
    "targets": _targets,
}
"""Kind to a function that chooses pairs of indices into a row's field."""


def field_of(judged: Judged, spec: SelectSpec, seed: int) -> tuple[Field, list[int]]:
    """The different, judged responses of a row, and which candidates they are."""
    drawn = judged.row.drawn
    places = [k for k in (drawn.places if drawn else ()) if not math.isnan(judged.scores[k])]
    values = [judged.scores[k] for k in places]
    if judged.wins is None:
        wins = select.win_probabilities(values)
    else:
        wins = np.asarray([[judged.wins[i][j] for j in places] for i in places], dtype=float)
        np.fill_diagonal(wins.reshape(len(places), len(places)), 0.5)
    key = repr((int(seed), judged.row.id)).encode("utf-8", "surrogatepass")
    number = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
    may_win = [spec.cut == "wins" or not judged.cut[k] for k in places]
    given = judged.wins is not None
    return Field(values, wins, may_win, np.random.default_rng(number), given), places


@dataclass(slots=True)
class Selected:
    """What `select_file` did.

    Attributes:
        out: The file of pairs.
        num_rows: Judged rows.
        num_pairs: Pairs written.
        num_used: Rows with at least one pair.
        outcomes: Why a row has none, and how many have.
        cut: Responses that could not win because they were cut off.
        unjudged: Responses without a reward.
        same: Empty responses, and those identical to another.
    """

    out: Path
    num_rows: int = 0
    num_pairs: int = 0
    num_used: int = 0
    outcomes: Counter[str] = field(default_factory=Counter[str])
    cut: int = 0
    unjudged: int = 0
    same: int = 0

    @property
    def ties(self) -> int:
        """Rows whose responses all have one reward."""
        return self.outcomes[_EQUAL]

    @property
    def lost(self) -> int:
        """Rows of which no response is judged."""
        return self.outcomes[_UNJUDGED]

    @property
    def counts(self) -> dict[str, int]:
        """All numbers by name."""
        whole = {"rows": self.num_rows, "pairs": self.num_pairs, "rows with a pair": self.num_used}
        return {**whole, **{f"rows: {why}": count for why, count in self.outcomes.items()}}

    def text(self) -> str:
        """For a terminal."""
        lines = [f"{self.out}: {self.num_pairs} pairs of {self.num_used} of {self.num_rows} rows"]
        lines += [f"no pair: {why} ({count} rows)" for why, count in self.outcomes.most_common()]
        found = {
            "not judged": self.unjudged,
            "cut off, which never win": self.cut,
            "empty or identical to another": self.same,
        }
        told = [f"{count} {what}" for what, count in found.items() if count]
        return "\n".join([*lines, *([f"responses: {', '.join(told)}"] if told else [])])


_EQUAL = "all rewards are equal"
_UNJUDGED = "not judged"


def select_file(
    source: Path,
    out: Path,
    spec: SelectSpec,
    *,
    seed: int = 0,
    round: int | None = None,
) -> Selected:
    """Write the pairs of a judged file; the same input and seed give the same bytes.

    Args:
        source: Judged rows, as `data score --by` writes them.
        out: The JSONL file to write; it appears whole or not at all. Paths of images start from
            its folder, so where there are some it lies beside `source`.
        spec: Which responses are paired.
        seed: Of what is drawn: the seating of first_round and tournament, and rso.
        round: Kept in `meta`.

    Raises:
        DataError: The file is there, a row cannot be read, or no row has a pair.
    """
    jobs.require_new(out)
    result = Selected(out)
    with_round = {} if round is None else {"round": round}
    beside = source.resolve().parent == out.resolve().parent
    lines: list[dict[str, Any]] = []
    for judged in read_judged(source):
        drawn = judged.row.drawn
        if drawn is not None and drawn.images is not None and not beside:
            raise DataError(
                f"{out}: must lie in {source.resolve().parent}, as the rows of {source.name} name "
                "images by their way from there"
            )
        lines += _pairs(judged, spec, seed, with_round, result)
    result.num_pairs = len(lines)
    _say(result, spec, source)
    jobs.write_lines(out, lines)
    return result


def _pairs(
    judged: Judged, spec: SelectSpec, seed: int, with_round: Mapping[str, Any], result: Selected
) -> Iterator[dict[str, Any]]:
    field, places = field_of(judged, spec, seed)
    different = len(judged.row.drawn.places) if judged.row.drawn else 0
    result.num_rows += 1
    result.unjudged += different - len(places)
    result.same += judged.row.size - different
    result.cut += field.may_win.count(False)
    pairs, values, why = _chosen(field, spec, different)
    if not pairs:
        result.outcomes[why] += 1
        return
    result.num_used += 1
    for number, (i, j) in enumerate(pairs):
        labels = (values[i], values[j]) if spec.kind == "targets" else None
        name = judged.row.id if len(pairs) == 1 else f"{judged.row.id}#{number}"
        yield _record(judged, name, places[i], places[j], labels, with_round)


def _chosen(
    field: Field, spec: SelectSpec, different: int
) -> tuple[list[select.Pair], list[float], str]:
    """Pairs and values; where there are none, why."""
    if not field.values:
        return [], [], _UNJUDGED if different else "all responses are empty"
    if len(field.values) == 1:
        return [], [], "one response that is different and judged"
    if not any(field.may_win):
        return [], [], "all responses were cut off"
    if len(set(field.values)) == 1:
        return [], [], _EQUAL
    try:
        pairs, values = SELECTORS[spec.kind](field, spec)
    except DataError as error:
        return [], [], str(error)
    wide = select.wider_than(pairs, values, spec.margin)
    if wide:
        return wide, values, ""
    if pairs:
        return [], values, f"no rewards differ by more than {spec.margin:g}"
    if len(set(values)) == 1:
        return [], values, _EQUAL
    drawn = "the responses that were drawn have equal rewards"
    return [], values, drawn if all(field.may_win) else "none that may win is the better one"


def _record(
    judged: Judged,
    name: str,
    chosen: int,
    rejected: int,
    labels: tuple[float, float] | None,
    with_round: Mapping[str, Any],
) -> dict[str, Any]:
    """A pair of one row, with what it was made of in `meta`."""
    line = judged.row.line
    texts = "responses" if "responses" in line else "images"
    sides = ("chosen", "rejected") if texts == "responses" else ("image_chosen", "image_rejected")
    both = (chosen, rejected)
    # Beside texts, images belong to the prompt.
    read = _READ | {"images"} if texts == "responses" else _READ
    record: dict[str, Any] = {
        "id": name,
        **{key: value for key, value in line.items() if key in read},
        **{side: line[texts][k] for side, k in zip(sides, both, strict=True)},
    }
    for side, k in zip(("chosen", "rejected"), both, strict=True):
        if judged.cut[k]:
            record[f"{side}_cut"] = True
        for key in _EACH:
            if own := (as_list(line.get(key)) or [None] * judged.row.size)[k]:
                record[f"{key}_{side}"] = own
    if labels is not None:
        record["label_chosen"], record["label_rejected"] = labels
    rest = {key: value for key, value in line.items() if key not in _READ and key not in _OWN}
    human = as_list(line.get("human"))
    meta: dict[str, Any] = {
        **rest,
        **(as_object(line.get("meta")) or {}),
        **with_round,
        "source": judged.row.id,
        "places": list(both),
        "rewards": {judge: [_plain(own[k]) for k in both] for judge, own in judged.rewards.items()},
        "scores": [judged.scores[k] for k in both],
        **({} if human is None else {"human": [human[k] for k in both]}),
    }
    return {**record, "meta": meta}


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else value


def _say(result: Selected, spec: SelectSpec, source: Path) -> None:
    advice = (
        "draw more varied responses (a higher temperature, more of them a prompt) or use a judge "
        "that tells finer differences"
    )
    if not result.num_pairs:
        raise DataError(
            f"{source}: no row has a pair. {result.text().partition(chr(10))[2]}; {advice}"
        )
    if result.num_used < spec.least_left * result.num_rows:
        log.warning(
            "%s: only %d of %d rows have a pair (%s): %s",
            source, result.num_used, result.num_rows,
            ", ".join(f"{why}: {count}" for why, count in result.outcomes.most_common()), advice,
        )  # fmt: skip
