"""The rows of a run: read, looked at before a model is loaded, and left out where they must be."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from mmalign.data.jobs import is_main_process
from mmalign.data.kept import KeptRows, no_collection
from mmalign.data.records import ProblemList
from mmalign.data.sources import load_examples
from mmalign.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mmalign.config import RunConfig
    from mmalign.core import Needs
    from mmalign.data.example import Example

log = logging.getLogger("mmalign.data")


@dataclass(frozen=True, slots=True)
class Surveyed:
    """The rows that can be learned from, and what was found about all of them.

    Attributes:
        parts: Rows to train on and rows held out, without those that have problems.
        notes: A sentence for each thing that is to be known of the rows; none of clean ones.
        problems: Rows that cannot be used.
        heard: What was logged while the rows were read, a sentence each.
    """

    parts: list[list[Example]]
    notes: tuple[str, ...] = ()
    problems: ProblemList = field(default_factory=ProblemList)
    heard: tuple[str, ...] = ()

    @property
    def train(self) -> list[Example]:
        """Rows to train on."""
        return self.parts[0]

    @property
    def held_out(self) -> list[Example]:
        """Rows to evaluate on."""
        return self.parts[1]


def survey_rows(config: RunConfig, needs: Needs, *, first: int | None = None) -> Surveyed:
    """Rows of a run as `data.bad_rows` wants them: those with problems stop it, or are left out.

    Args:
        config: The run's configuration.
        needs: Of its objective.
        first: How many rows of either part are wanted; None: all.

    Raises:
        DataError: There are problems, or no row is left.
    """
    found = find_rows(config, needs, first=first)
    if not found.problems.groups:
        return found
    number = found.problems.num_records
    count, are = f"{number:,} rows" if number > 1 else "1 row", "are" if number > 1 else "is"
    if config.data.bad_rows == "stop":
        raise DataError(
            f"{found.problems.summary()} {count} cannot be used with this model and these "
            "settings; `mmalign data check --config CONFIG` lists them all, and data.bad_rows: "
            "drop leaves them out"
        )
    if not found.train:
        raise DataError(f"no row is left to train on: {' '.join(found.problems.lines())}")
    left_out = f"{count} cannot be used and {are} left out: {' '.join(found.problems.lines(0))}"
    return replace(found, notes=(left_out, *found.notes))


def find_rows(config: RunConfig, needs: Needs, *, first: int | None = None) -> Surveyed:
    """The same with the problems handed back."""
    from mmalign.models.adapter import adapter_class

    with logged("mmalign") as heard:  # while they are read, and while they are looked at
        train, held_out = _read(config, needs)
        parts = (train[:first], held_out[:first])
        found = adapter_class(config.modality).survey(config, needs, parts)
    return replace(found, heard=tuple(dict.fromkeys(heard)))


def _read(config: RunConfig, needs: Needs) -> tuple[list[Example], list[Example]]:
    """The rows of a config, from the files or as they were kept when the files were read."""
    seed = config.train.seed
    kept = KeptRows(config.output.parent / "cache" / "rows", config.data, needs, seed)
    known = kept.get()
    if known is not None:
        return known
    with no_collection(), logged(log.name) as lines:
        parts = load_examples(config.data, needs, seed=seed)
    if is_main_process():
        kept.put(parts, lines)
    return parts


@contextmanager
def logged(name: str, *, quiet: bool = False) -> Iterator[list[str]]:
    """What a logger is told meanwhile; where it is `quiet`, nobody else hears it."""
    lines: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())
            # With a handler there, logging leaves out what it prints where there is none.
            if alone and logging.lastResort and record.levelno >= logging.lastResort.level:
                logging.lastResort.handle(record)

    logger, listener = logging.getLogger(name), Listener()
    before, alone = logger.propagate, not quiet and not logger.hasHandlers()
    logger.addHandler(listener)
    logger.propagate = before and not quiet
    try:
        yield lines
    finally:
        logger.propagate = before
        logger.removeHandler(listener)


def say(notes: Sequence[str]) -> None:
    """Log what is to be known of the rows of a run."""
    for note in notes:
        log.warning("%s", note)
