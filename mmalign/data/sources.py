"""Everything between `data:` in a config and the Examples of a run."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Literal

import numpy as np

from mmalign.data.doubts import Doubts, Leakage, asked
from mmalign.data.example import HELD_OUT, Example
from mmalign.data.jobs import track
from mmalign.data.records import ProblemList, Record, read_records
from mmalign.data.select import Needs, fit, is_used, reads_labels
from mmalign.errors import DataError

if TYPE_CHECKING:
    from mmalign.config import DataConfig, DataSource

log = logging.getLogger("mmalign.data")


class Reader:
    """One source, and the rows read so far.

    Attributes:
        here: The rows, but for those held out.
        there: The rows that its `split` column holds out.
        counts: How many of them an objective uses: of `there`, of `here`, and under `share` those
            of `here` that would be held out as a share of the prompts.
    """

    def __init__(
        self,
        source: DataSource,
        doubts: Doubts | None,
        is_used: Callable[[Example], bool],
        *,
        share: float = 0.0,
        of_eval: bool = False,
    ) -> None:
        """Nothing is read yet. Rows go to `doubts` too, where they have not been there before."""
        self.source = source
        self.here: list[Example] = []
        self.there: list[Example] = []
        self.counts: Counter[str] = Counter()
        self._is_used, self._share = is_used, share
        self.names_splits = False
        self.held_out_only = False  # rows of other splits are passed over unread
        self._doubts = doubts
        self._of_eval = of_eval
        self._problems = ProblemList()
        self._num_read = 0
        records = read_records(
            source.path,
            name=source.name,
            split=source.split,
            layout=source.layout,
            pictures=source.pictures,
            wanted=lambda split: not self.held_out_only or is_held_out(split),
        )
        self._records = track(records, f"reading {source.path}")

    @property
    def evaluated(self) -> list[Example]:
        """The rows of a source of `data.eval`: those held out by `split` where there are any."""
        return self.there or self.here

    def step(self) -> bool:
        """Take one row in; False at the end."""
        record = next(self._records, None)
        if record is None:
            return False
        self._num_read += 1
        self._problems.add(record, *record.problems)
        if record.example is not None:
            self._take(record, record.example)
        return True

    def _take(self, record: Record, row: Example) -> None:
        by_split = self.source.split is None
        self.names_splits = self.names_splits or (by_split and "split" in record.raw)
        held_out = by_split and is_held_out(record.split)
        (self.there if held_out else self.here).append(row)
        if self._is_used(row):
            in_share = self._share > 0 and place_of(row) < self._share
            self.counts["there" if held_out else "share" if in_share else "here"] += 1
        if self._doubts is not None:
            self._doubts.add(record, self.source.path, held_out=held_out or self._of_eval)

    def finish(self, bad_rows: Literal["stop", "drop"]) -> None:
        """Close the file; rows with problems stop the run, or are counted.

        Raises:
            DataError: There were no rows, or rows with problems that stop the run.
        """
        self._records.close()
        if not self._num_read:
            raise DataError(f"{self.source.path}: holds no records")
        found = self._problems
        if found.groups and bad_rows == "stop":
            raise found.error(self.source.path)
        if found.groups:
            message = "%s: %d of %d records have problems and are left out: %s"
            lines = " ".join(found.lines(0))
            log.warning(message, self.source.path, found.num_records, self._num_read, lines)


def read_whole(readers: Sequence[Reader]) -> None:
    """Read every source to its end, one after the other."""
    for reader in readers:
        while reader.step():
            pass


def read_until(enough: Callable[[], bool], readers: Sequence[Reader]) -> None:
    """Read the sources in turns, a row each, until there are enough rows, or to the end."""
    live = list(readers)
    while live and not enough():
        live = [reader for reader in live if reader.step()]


def is_held_out(split: str) -> bool:
    """Whether rows of a split are not trained on."""
    return split.lower() in HELD_OUT


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

    def used(row: Example) -> bool:
        return is_used(row, needs, config.ties)

    doubts = Doubts()
    share = 0.0 if config.eval or config.max_samples is None else config.eval_fraction
    readers = [Reader(source, doubts, used, share=share) for source in config.train]
    _read_train(readers, config, share)
    known = {_where(source) for source in config.train}
    of_eval = [
        Reader(source, None if _where(source) in known else doubts, used, of_eval=True)
        for source in config.eval
    ]
    _read_eval(of_eval, config.max_eval_samples)
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


def _read_train(readers: Sequence[Reader], config: DataConfig, share: float) -> None:
    """Read the train sources: whole, or until there are enough rows to train and evaluate on.

    A source whose rows name a `split` is then looked through for the rows that it holds out,
    without reading the others.
    """
    limit, eval_limit = config.max_samples, config.max_eval_samples
    if limit is None:
        read_whole(readers)
        return

    def enough() -> bool:
        if sum(reader.counts["here"] * reader.source.weight for reader in readers) < limit:
            return False
        if not share or any(reader.names_splits for reader in readers):
            return True
        return sum(reader.counts["share"] for reader in readers) >= (eval_limit or 1)

    def enough_held_out() -> bool:
        count = sum(reader.counts["there"] for reader in readers)
        return eval_limit is not None and count >= eval_limit

    read_until(enough, readers)
    named = [reader for reader in readers if reader.names_splits and not config.eval]
    for reader in named:
        reader.held_out_only = True
    read_until(enough_held_out, named)


def _read_eval(readers: Sequence[Reader], limit: int | None) -> None:
    """Read the sources of `data.eval`: whole, or until there are enough rows."""
    if limit is None:
        read_whole(readers)
        return

    def enough() -> bool:
        counts = (r.counts["there" if r.names_splits else "here"] for r in readers)
        return sum(counts) >= limit

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
    places = [[place_of(row) for row in rows] for rows in sources]
    lowest = min((p for part in places for p in part), default=1.0)
    # A small file may have no prompt below the fraction: then the lowest one is held out.
    limit = max(fraction, math.nextafter(lowest, 1.0))
    train: list[list[Example]] = []
    held_out: list[list[Example]] = []
    for rows, part in zip(sources, places, strict=True):
        train.append([row for row, p in zip(rows, part, strict=True) if p >= limit])
        held_out.append([row for row, p in zip(rows, part, strict=True) if p < limit])
    return train, held_out


def place_of(row: Example) -> float:
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
    sides = chain(((row, False) for row in train), ((row, True) for row in evaluation))
    total = len(train) + len(evaluation)
    for row, held_out in track(sides, "comparing with rows held out", total=total):
        leakage.add(row, held_out=held_out)
    for line in leakage.lines():
        log.warning("%s", line)
