"""Everything between `data:` in a config and the Examples of a run."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mmalign.data.doubts import Doubts
from mmalign.data.fit import Needs, fit, is_used, reads_labels
from mmalign.data.intake import Count, Reader, look_through, read_until, read_whole
from mmalign.data.leakage import Leakage, asked
from mmalign.errors import DataError

if TYPE_CHECKING:
    from mmalign.config import DataConfig, DataSource
    from mmalign.data.example import Example

log = logging.getLogger("mmalign.data")


def load_examples(
    config: DataConfig, needs: Needs, *, seed: int
) -> tuple[list[Example], list[Example]]:
    """Read, check and shape the rows of a run; the same config and seed give the same rows.

    Held out are: the rows of `data.eval`; else rows of the train sources whose `split` says so;
    else a share `data.eval_fraction` of the prompts. Rows so marked are never trained on.

    `max_samples` and `max_eval_samples` take the first rows; several sources take turns, in
    proportion to their weights. Reading ends where there are enough: for rows that a `split` column
    holds out it goes on, and a share is one of the rows that were read.

    Args:
        config: The `data` section.
        needs: The objective's `rows`, `candidates`, `roles` and `labels`.
        seed: For fractional source weights.

    Returns:
        Train rows and evaluation rows.

    Raises:
        DataError: for anything that cannot be used, naming file and line.
    """
    if any(source.weight != 1.0 for source in config.eval):
        raise DataError("data.eval has a `weight`; only what is trained on can be weighted")

    def shape(rows: Sequence[Example], needs: Needs) -> list[Example]:
        return fit(rows, needs, ties=config.ties, swap=config.swap, list_pairs=config.list_pairs)

    doubts = Doubts()
    readers = [Reader(source, doubts) for source in config.train]
    _read_train(readers, config, needs)
    known = {_where(source) for source in config.train}
    of_eval = [
        Reader(source, None if _where(source) in known else doubts, of_eval=True)
        for source in config.eval
    ]
    _read_eval(of_eval, config, needs)
    for reader in (*readers, *of_eval):
        reader.finish(config.bad_rows)
    for line in doubts.lines():
        log.warning("%s", line)
    for line in doubts.unread.notes():
        log.info("%s", line)

    sources = [reader.here for reader in readers]
    held_out = [reader.there for reader in readers]
    if config.eval:
        _warn_of_unused(readers, config)
        held_out = [reader.evaluated for reader in of_eval]
    elif config.eval_fraction and any(held_out):
        message = "data.eval_fraction %g is not used: the `split` column already holds out %d rows"
        log.warning(message, config.eval_fraction, sum(map(len, held_out)))
    elif config.eval_fraction:
        sources, held_out = _hold_out(sources, config.eval_fraction)
    _warn_of_soft_labels([row for rows in sources for row in rows], needs)
    repeated = [
        _repeat(rows, source.weight, seed + i)
        for i, (source, rows) in enumerate(zip(config.train, sources, strict=True))
    ]
    train = shape(_mixed(repeated, config.max_samples), needs)[: config.max_samples]
    others = _mixed(held_out, config.max_eval_samples)
    evaluation = shape(others, _on_pairs(others, needs))[: config.max_eval_samples]
    if not train:
        names = ", ".join(source.path for source in config.train)
        raise DataError(
            f"{names}: no row is left to train on ({len(evaluation)} to evaluate on); see "
            "data.ties for rows without a preference, and `split` for rows that are held out"
        )
    _warn_of_leakage(train, evaluation)
    return train, evaluation


def _read_train(readers: Sequence[Reader], config: DataConfig, needs: Needs) -> None:
    """Read the train sources: whole, or until there are enough rows to train and evaluate on."""
    limit, eval_limit = config.max_samples, config.max_eval_samples
    if limit is None:
        read_whole(readers)
        return
    share = 0.0 if config.eval else config.eval_fraction
    trained = Count(lambda row: is_used(row, needs, config.ties) and _place(row) >= share)
    held_out = Count(lambda row: is_used(row, needs, config.ties) and _place(row) < share)
    by_split = Count(lambda row: is_used(row, needs, config.ties))

    def enough() -> bool:
        if sum(trained.of(reader.here) * reader.source.weight for reader in readers) < limit:
            return False
        if not share or any(reader.names_splits for reader in readers):
            return True
        return sum(held_out.of(reader.here) for reader in readers) >= (eval_limit or 1)

    def enough_held_out() -> bool:
        if eval_limit is None:
            return False
        return sum(by_split.of(reader.there) for reader in readers) >= eval_limit

    read_until(enough, readers)
    if not config.eval:
        look_through(readers, enough_held_out)


def _read_eval(readers: Sequence[Reader], config: DataConfig, needs: Needs) -> None:
    """Read the sources of `data.eval`: whole, or until there are enough rows."""
    limit = config.max_eval_samples
    if limit is None:
        read_whole(readers)
        return
    used = Count(lambda row: is_used(row, needs, config.ties))

    def enough() -> bool:
        rows = [reader.there if reader.names_splits else reader.here for reader in readers]
        return sum(map(used.of, rows)) >= limit

    read_until(enough, readers)


def _mixed(parts: Sequence[list[Example]], limit: int | None) -> list[Example]:
    """The rows of all parts: one part after the other, or evenly mixed to take the first of."""
    if limit is None or len(parts) == 1:
        return [row for rows in parts for row in rows]
    places = [
        ((i + 0.5) / len(rows), part, row)
        for part, rows in enumerate(parts)
        for i, row in enumerate(rows)
    ]
    return [row for _, _, row in sorted(places, key=lambda place: place[:2])]


@dataclass(frozen=True, slots=True)
class _PairNeeds:
    rows: str = "pair"
    candidates: int = 2
    roles: tuple[str, ...] = ()
    labels: bool = False


def _on_pairs(rows: Sequence[Example], needs: Needs) -> Needs:
    """Needs for evaluation: where one response is enough (sft), pairs still tell a ranking."""
    enough = needs.rows == "any" and needs.candidates <= 1
    return _PairNeeds() if enough and all(row.kind == "pair" for row in rows) else needs


def _where(source: DataSource) -> tuple[str, str | None, str | None]:
    """What tells the rows of a source from those of another."""
    return source.path, source.name, source.split


def _repeat(rows: list[Example], times: float, seed: int) -> list[Example]:
    """Every row `times` times; for the fraction, a seeded sample of them in their order."""
    whole = int(times)
    size = round((times - whole) * len(rows))
    chosen = np.random.default_rng(seed).permutation(len(rows))[:size]
    return rows * whole + [rows[i] for i in sorted(chosen.tolist())]


def _hold_out(
    sources: list[list[Example]], fraction: float
) -> tuple[list[list[Example]], list[list[Example]]]:
    """Prompts whose place lies below `fraction`."""
    places = [[_place(row) for row in rows] for rows in sources]
    lowest = min((p for part in places for p in part), default=1.0)
    # A small file may have no prompt below the fraction: then the lowest one is held out.
    limit = max(fraction, math.nextafter(lowest, 1.0))
    train: list[list[Example]] = []
    held_out: list[list[Example]] = []
    for rows, part in zip(sources, places, strict=True):
        train.append([row for row, p in zip(rows, part, strict=True) if p >= limit])
        held_out.append([row for row, p in zip(rows, part, strict=True) if p < limit])
    return train, held_out


def _place(row: Example) -> float:
    """Where in [0, 1) the hash of a prompt lies: the same whatever the file, order and seed.

    Rows that show something are told apart by the first file alone, by its name and folder: no
    clip is on both sides, whatever is asked about it.
    """
    shown = [os.sep.join(str(file).split(os.sep)[-2:]) for file in row.files()[:1]]
    key = shown[0] if shown else asked(row)
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6]) / 2**48


def _warn_of_unused(readers: Sequence[Reader], config: DataConfig) -> None:
    """What a train source holds out, when other files are evaluated on, is used for nothing."""
    evaluated = {source.path for source in config.eval}
    for reader in readers:
        path, count = reader.source.path, len(reader.there)
        if count and path not in evaluated:
            log.warning("%d rows of %s are held out by `split`: not used", count, path)


def _warn_of_soft_labels(rows: Sequence[Example], needs: Needs) -> None:
    """Labels between 0 and 1 that the objective takes for 0 and 1."""
    if reads_labels(rows, needs):
        return
    pairs = [row.labels[:2] for row in rows if row.kind == "pair"]
    soft = sum(not set(labels) <= {0.0, 0.5, 1.0} for labels in pairs)
    if soft:
        message = (
            "%d of %d pairs carry soft labels (p_chosen, votes or label_chosen), which this "
            "objective does not read: it learns which response is better, not how sure that is"
        )
        log.warning(message, soft, len(pairs))


def _warn_of_leakage(train: Sequence[Example], evaluation: Sequence[Example]) -> None:
    if not evaluation:
        return
    leakage = Leakage()
    for rows, held_out in ((train, False), (evaluation, True)):
        for row in rows:
            leakage.add(row, held_out=held_out)
    for line in leakage.lines():
        log.warning("%s", line)
