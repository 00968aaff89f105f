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

from mmalign.data.example import Example, as_text, normalised
from mmalign.data.files import HELD_OUT
from mmalign.data.fit import Needs, fit
from mmalign.data.records import ProblemList, read_records
from mmalign.errors import DataError

if TYPE_CHECKING:
    from mmalign.config import DataConfig, DataSource

log = logging.getLogger("mmalign.data")


def load_examples(
    config: DataConfig, needs: Needs, *, seed: int
) -> tuple[list[Example], list[Example]]:
    """Read, check and shape the rows of a run; the same config and seed give the same rows.

    Held out are: the rows of `data.eval`; else rows of the train sources whose `split` says so;
    else a share `data.eval_fraction` of the prompts. Rows so marked are never trained on.

    Args:
        config: The `data` section.
        needs: The objective's `rows`, `candidates` and `roles`.
        seed: For sampling: `max_samples` and fractional source weights.

    Returns:
        Train rows and evaluation rows.

    Raises:
        DataError: for anything that cannot be used, naming file and line.
    """
    if any(source.weight != 1.0 for source in config.eval):
        raise DataError("data.eval has a `weight`; only what is trained on can be weighted")

    def shape(rows: Sequence[Example], needs: Needs) -> list[Example]:
        return fit(rows, needs, ties=config.ties, swap=config.swap, list_pairs=config.list_pairs)

    parts = [_parts(source, config) for source in config.train]
    sources = [here for here, _ in parts]
    held_out = [row for _, there in parts for row in there]
    if config.eval:
        _warn_of_unused(config, [len(there) for _, there in parts])
        parts = [_parts(source, config) for source in config.eval]
        held_out = [row for here, there in parts for row in there or here]
    elif config.eval_fraction:
        if held_out:
            raise DataError(
                f"data.eval_fraction is {config.eval_fraction}, but the `split` column already "
                f"holds out {len(held_out)} rows; leave eval_fraction at 0, or choose a `split`"
            )
        sources, held_out = _hold_out(sources, config.eval_fraction)
    mixed = [
        row
        for i, (source, rows) in enumerate(zip(config.train, sources, strict=True))
        for row in _repeat(rows, source.weight, seed + i)
    ]
    train = _sample(shape(mixed, needs), config.max_samples, seed)
    evaluation = shape(held_out, _on_pairs(held_out, needs))
    evaluation = _sample(evaluation, config.max_eval_samples, seed)
    if not train:
        names = ", ".join(source.path for source in config.train)
        raise DataError(
            f"{names}: no row is left to train on ({len(evaluation)} to evaluate on); see "
            "data.ties for rows without a preference, and `split` for rows that are held out"
        )
    _warn_of_leakage(train, evaluation)
    return train, evaluation


@dataclass(frozen=True, slots=True)
class _PairNeeds:
    rows: str = "pair"
    candidates: int = 2
    roles: tuple[str, ...] = ()


def _on_pairs(rows: Sequence[Example], needs: Needs) -> Needs:
    """Needs for evaluation: where one response is enough (sft), pairs still tell a ranking."""
    enough = needs.rows == "any" and needs.candidates <= 1
    return _PairNeeds() if enough and all(row.kind == "pair" for row in rows) else needs


def _parts(source: DataSource, config: DataConfig) -> tuple[list[Example], list[Example]]:
    """The rows of one source, and apart from them those its `split` column holds out."""
    problems = ProblemList()
    here: list[Example] = []
    there: list[Example] = []
    total = 0
    records = read_records(
        source.path,
        name=source.name,
        split=source.split,
        layout=source.layout,
        pictures=source.pictures,
    )
    for record in records:
        total += 1
        problems.add(record, *record.problems)
        if record.example is not None:
            held_out = source.split is None and record.split.lower() in HELD_OUT
            (there if held_out else here).append(record.example)
    if not total:
        raise DataError(f"{source.path}: holds no records")
    if problems.groups:
        if config.bad_rows == "stop":
            raise problems.error(source.path)
        message = "%s: %d of %d records have problems and are left out: %s"
        log.warning(message, source.path, problems.num_records, total, " ".join(problems.lines(0)))
    return here, there


def _repeat(rows: list[Example], times: float, seed: int) -> list[Example]:
    """Every row `times` times; for the fraction, a seeded sample."""
    whole = int(times)
    return rows * whole + _sample(rows, round((times - whole) * len(rows)), seed)


def _sample(rows: list[Example], size: int | None, seed: int) -> list[Example]:
    """At most `size` rows in their order; a larger sample of the same seed contains the smaller."""
    if size is None or size >= len(rows):
        return rows
    chosen = np.random.default_rng(seed).permutation(len(rows))[:size]
    return [rows[i] for i in sorted(chosen.tolist())]


def _hold_out(
    sources: list[list[Example]], fraction: float
) -> tuple[list[list[Example]], list[Example]]:
    """Prompts whose hash lies below `fraction`: the same whatever the file, order and seed.

    Rows that show something are told apart by the first file alone, by its name and folder: no
    clip is on both sides, whatever is asked about it.
    """

    def place(row: Example) -> float:
        shown = [os.sep.join(str(file).split(os.sep)[-2:]) for file in row.files()[:1]]
        key = shown[0] if shown else _asked(row)
        return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6]) / 2**48

    places = [[place(row) for row in rows] for rows in sources]
    lowest = min((p for part in places for p in part), default=1.0)
    # A small file may have no prompt below the fraction: then the lowest one is held out.
    limit = max(fraction, math.nextafter(lowest, 1.0))
    train: list[list[Example]] = []
    held_out: list[Example] = []
    for rows, part in zip(sources, places, strict=True):
        train.append([row for row, p in zip(rows, part, strict=True) if p >= limit])
        held_out += [row for row, p in zip(rows, part, strict=True) if p < limit]
    return train, held_out


def _asked(row: Example) -> str:
    """The prompt; that of the best candidate in a row whose candidates have their own."""
    return as_text(row.prompt or row.candidates[0].prompt or "")


def _warn_of_unused(config: DataConfig, held_out: Sequence[int]) -> None:
    """What a train source holds out, when other files are evaluated on, is used for nothing."""
    evaluated = {source.path for source in config.eval}
    for source, count in zip(config.train, held_out, strict=True):
        if count and source.path not in evaluated:
            log.warning("%d rows of %s are held out by `split`: not used", count, source.path)


def _warn_of_leakage(train: Sequence[Example], evaluation: Sequence[Example]) -> None:
    seen = {normalised(_asked(row)) for row in train if not row.files()}
    shown = {file for row in train for file in row.files()}
    leaked = sum(not row.files() and normalised(_asked(row)) in seen for row in evaluation)
    shared = sum(not shown.isdisjoint(row.files()) for row in evaluation)
    for count, what in ((leaked, "have a prompt"), (shared, "show a clip, picture or sound")):
        if count:
            message = "%d of %d evaluation rows %s that is also trained on"
            log.warning(message, count, len(evaluation), what)
