"""Everything between `data:` in a config and the Examples of a run."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
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
    else a share `data.eval_fraction` of the prompts.

    Args:
        config: The `data` section.
        needs: The objective's `rows`, `candidates` and `roles`.
        seed: For sampling: `max_samples` and fractional source weights.

    Returns:
        Train rows and evaluation rows.

    Raises:
        DataError: for anything that cannot be used, naming file and line.
    """

    def shape(rows: Sequence[Example]) -> list[Example]:
        return fit(rows, needs, ties=config.ties, swap=config.swap, list_pairs=config.list_pairs)

    train: list[Example] = []
    held_out: list[Example] = []
    for i, source in enumerate(config.train):
        here, there = _parts(source, config)
        train += _repeat(shape(here), source.weight, seed + i)
        held_out += there
    if config.eval:
        parts = [_parts(source, config) for source in config.eval]
        held_out = [row for here, there in parts for row in there or here]
    evaluation = shape(held_out)
    if not evaluation and config.eval_fraction:
        train, evaluation = _hold_out(train, config.eval_fraction)
    train = _sample(train, config.max_samples, seed)
    evaluation = _sample(evaluation, config.max_eval_samples, seed)
    if not train:
        names = ", ".join(source.path for source in config.train)
        raise DataError(
            f"{names}: no row is left to train on ({len(evaluation)} to evaluate on); see "
            "data.ties for rows without a preference, and `split` for rows that are held out"
        )
    _warn_of_leakage(train, evaluation)
    return train, evaluation


def _parts(source: DataSource, config: DataConfig) -> tuple[list[Example], list[Example]]:
    """The rows of one source, and apart from them those its `split` column holds out."""
    problems = ProblemList()
    here: list[Example] = []
    there: list[Example] = []
    total = 0
    records = read_records(source.path, name=source.name, split=source.split, layout=source.layout)
    for record in records:
        total += 1
        problems.add(record)
        if record.example is not None:
            held_out = source.split is None and record.split.lower() in HELD_OUT
            (there if held_out else here).append(record.example)
    if not total:
        wanted = f" with split {source.split!r}" if source.split else ""
        raise DataError(f"{source.path}: holds no records{wanted}")
    if problems.num_records:
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


def _hold_out(rows: list[Example], fraction: float) -> tuple[list[Example], list[Example]]:
    """Prompts whose hash lies below `fraction`: the same whatever the file, order and seed."""
    place = {as_text(row.prompt): 1.0 for row in rows}
    for prompt in place:
        place[prompt] = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:7]) / 2**56
    # A small file may have no prompt below the fraction: then the lowest one is held out.
    limit = max(fraction, min(place.values(), default=0.0) + 2**-56)
    held_out = [place[as_text(row.prompt)] < limit for row in rows]
    train = [row for row, out in zip(rows, held_out, strict=True) if not out]
    return train, [row for row, out in zip(rows, held_out, strict=True) if out]


def _warn_of_leakage(train: Sequence[Example], evaluation: Sequence[Example]) -> None:
    seen = {normalised(row.prompt) for row in train}
    leaked = sum(normalised(row.prompt) in seen for row in evaluation)
    if leaked:
        log.warning(
            "%d of %d evaluation rows have a prompt that is also trained on",
            leaked,
            len(evaluation),
        )
