"""Reading the sources of a run, as far as the run needs them.

Without a limit every source is read whole. With one, sources take turns row by row, and reading
ends where there are enough rows. A source whose rows name a `split` is then looked through for the
rows that it holds out, without reading the others.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Literal

from mmalign.data.progress import track
from mmalign.data.records import ProblemList, Record, read_records
from mmalign.data.row import HELD_OUT
from mmalign.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mmalign.config import DataSource
    from mmalign.data.doubts import Doubts
    from mmalign.data.example import Example

log = logging.getLogger("mmalign.data")


class Reader:
    """One source: the rows read so far, apart from them those that its `split` column holds out."""

    def __init__(self, source: DataSource, doubts: Doubts | None, *, of_eval: bool = False) -> None:
        """Nothing is read yet. Rows go to `doubts` too, where they have not been there before."""
        self.source = source
        self.here: list[Example] = []
        self.there: list[Example] = []
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
            wanted=lambda split: not self.held_out_only or _is_held_out(split),
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
        held_out = by_split and _is_held_out(record.split)
        (self.there if held_out else self.here).append(row)
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
        if not found.groups:
            return
        if bad_rows == "stop":
            raise found.error(self.source.path)
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


def look_through(readers: Sequence[Reader], enough: Callable[[], bool]) -> None:
    """Go on in the sources that name splits, for the rows that they hold out and no others."""
    named = [reader for reader in readers if reader.names_splits]
    for reader in named:
        reader.held_out_only = True
    read_until(enough, named)


class Count:
    """How many rows of growing lists pass a test; each row is tested once."""

    def __init__(self, test: Callable[[Example], bool]) -> None:
        self._test = test
        self._seen: dict[int, int] = {}  # list -> how many of its rows were tested
        self._passed: dict[int, int] = {}

    def of(self, rows: list[Example]) -> int:
        """The rows of a list that pass; the list may grow between calls, and must live on."""
        key = id(rows)
        seen = self._seen.get(key, 0)
        self._passed[key] = self._passed.get(key, 0) + sum(map(self._test, rows[seen:]))
        self._seen[key] = len(rows)
        return self._passed[key]


def _is_held_out(split: str) -> bool:
    return split.lower() in HELD_OUT
