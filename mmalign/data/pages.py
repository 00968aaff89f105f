"""What the pages of a parquet file unfold to, known before they are unfolded.

A dictionary of one long text and a run of codes, or a list of equal numbers, make gigabytes of a
few bytes. Headers of pages say how many values each holds; what codes stand for is summed up from
the dictionary's lengths, without the texts.
"""

from __future__ import annotations

from struct import unpack_from
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

import numpy as np

from mmalign.data.page_values import (
    DAMAGE,
    DATA,
    DATA_2,
    DICTIONARY,
    Column,
    body,
    is_opaque,
    levels,
    most_levels,
    page_at,
    runs,
)
from mmalign.data.unfold import FREE, MOST_FOLDED, in_mib
from mmalign.errors import DataError
from mmalign.safe import open_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from mmalign.data.page_values import Page, Runs

MOST_HELD = 2**30
"""Bytes that the lists of one column in one row may unfold to, where they are not written out
nearly as they are, and so may what its dictionary stands for where it is read at once."""

MOST_REPEATED = 2**29
"""Bytes of text that may come of the rows of any file: a system prompt of all rows is written once.
"""

_WRITTEN_OUT = 16  # times the bytes in its pages that values of an honest column take at most
_MOST_PAGE = 2**29  # bytes, where rows are read few at a time: some writers make one of all rows
_IF = "If it is what you want,"
_AGAIN = f"{_IF} write it again whole (use_dictionary=False, compression='none')"
_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8}
_CODED, _OF_PREFIXES = (2, 8), 7  # encodings
_VALUE = 8  # bytes that any value takes at least, once it is read


class Pages:
    """The pages of a file, looked at before they are read."""

    def __init__(self, path: Path, metadata: Any) -> None:
        """Look at nothing yet.

        Args:
            path: The file.
            metadata: What its footer says.
        """
        self._path, self._metadata = path, metadata
        self._size = path.stat().st_size

    def rows_at_once(self, group: int, names: Iterable[str], most: int) -> int:
        """How many rows of a row group take at most about `most` bytes, by what is known of them.

        Raises:
            DataError: Pages, or lists, unfold to far more than a file of rows holds.
        """
        num_rows = max(self._metadata.row_group(group).num_rows, 1)
        a_row = whole = unfolded = 0
        with open_file(self._path) as stream:
            for column in self._columns(stream, group, names):
                whole += column.chunk.total_uncompressed_size
                unfolded += column.written + column.folded
                if column.repeats and (limit := self._exceeded(column)):
                    a_row += self._require_row(stream, group, column, limit)
                elif column.repeats:
                    whole += column.held
                else:
                    a_row += column.most_value
        self.require_total(group, 0, unfolded)
        a_row += -(-whole // num_rows)
        return max(1, min(1024, most // max(a_row, 1)))

    def require_whole(self, group: int, name: str) -> None:
        """Refuse a column that takes too much where a row group of it is read at once.

        Raises:
            DataError: As above.
        """
        with open_file(self._path) as stream:
            for column in self._columns(stream, group, [name], whole=True):
                if most := self._exceeded(column):
                    found = f"unfolds to {in_mib(column.held)}; at most {in_mib(most)} are read"
                    do = "write it again in smaller row groups (row_group_size)"
                    self._refuse(group, column, f"{found} at once. {_IF} {do}")

    def require_total(self, group: int, places: int, texts: int = 0) -> None:
        """Refuse what rows have come to, up to some of a row group.

        Args:
            group: Which.
            places: Bytes of all values and members of lists but for their texts.
            texts: Bytes of these. One that stands in every row is told from a trap by them alone,
                so that some of it may come of any file.

        Raises:
            DataError: No file of this size holds so much.
        """
        for size, free in ((places, FREE), (places + texts, MOST_REPEATED)):
            most = max(free, self._most)
            if size > most:
                raise DataError(
                    f"{self._path}: up to row group {group + 1} it unfolds to {in_mib(size)}; at "
                    f"most {in_mib(most)} are read of a file of {in_mib(self._size)}, as rows of "
                    f"text hardly ever take {MOST_FOLDED} times as much. {_AGAIN}"
                )

    @property
    def _most(self) -> int:
        return max(FREE, MOST_FOLDED * self._size)

    def _exceeded(self, column: Column) -> int:
        """How many bytes may be held of a column at once, where it has more; else 0."""
        folds = column.held > _WRITTEN_OUT * column.written
        most = min(MOST_HELD, self._most) if folds else self._most
        return most if column.held > most else 0

    def _require_row(self, stream: BinaryIO, group: int, column: Column, most: int) -> int:
        """Bytes that the lists of one row take at most."""
        try:
            count = _most_in_a_row(levels(stream, column))
        except DAMAGE as error:
            self._refuse_damaged(group, column, error)
        held = min(column.held, count * max(_VALUE, column.most_value))
        if held > most:
            found = f"unfolds to {in_mib(held)} in one row; at most {in_mib(most)} are read at once"
            self._refuse(group, column, f"{found}. {_AGAIN}")
        return held

    def _refuse(self, group: int, column: Column, what: str) -> NoReturn:
        raise DataError(f"{self._path}: row group {group + 1}, column {column.path!r} {what}")

    def _refuse_damaged(self, group: int, column: Column, error: Exception) -> NoReturn:
        self._refuse(group, column, f"has a page that is damaged ({error})")

    def _columns(
        self, stream: BinaryIO, group: int, names: Iterable[str], *, whole: bool = False
    ) -> Iterator[Column]:
        of_group, schema = self._metadata.row_group(group), self._metadata.schema
        wanted = tuple(names)
        for i in range(of_group.num_columns):
            path = schema.column(i).path
            if not any(path == name or path.startswith(f"{name}.") for name in wanted):
                continue
            column = Column(path, of_group.column(i), schema.column(i))
            try:
                self._look(stream, group, column, whole=whole)
            except DAMAGE as error:
                self._refuse_damaged(group, column, error)
            yield column

    def _look(self, stream: BinaryIO, group: int, column: Column, *, whole: bool) -> None:
        """Sum up what the values of a column take."""
        width = _WIDTHS.get(column.about.physical_type)
        if column.about.physical_type == "FIXED_LEN_BYTE_ARRAY":
            width = column.about.length
        lengths: _Lengths | None = None
        for page in self._pages(stream, group, column, whole=whole):
            if page.kind == DICTIONARY:
                free = min(MOST_HELD, self._most) if whole else FREE
                lengths = _Lengths(stream, page, column, free)
                continue
            column.pages += [page] if column.repeats else []
            column.held += page.num_values * max(_VALUE, width or 0)
            column.written += page.unfolded
            if width is not None:
                column.most_value = max(column.most_value, width)
            elif page.encoding in _CODED and lengths is not None:
                column.most_value = max(column.most_value, lengths.longest)
                size = lengths.of(page)
                column.held += size
                is_known = not lengths.is_rough and not is_opaque(page, column)
                column.folded += size if is_known else 0
            elif page.encoding == _OF_PREFIXES:  # each value goes on from the one before
                column.most_value = max(column.most_value, page.unfolded)
                column.held += page.num_values * page.unfolded

    def _pages(
        self, stream: BinaryIO, group: int, column: Column, *, whole: bool
    ) -> Iterator[Page]:
        """All that a reader reads: from the chunk's start on, until it has all its values."""
        chunk = column.chunk
        at, begin = chunk.data_page_offset, chunk.dictionary_page_offset
        if chunk.has_dictionary_page and begin is not None and 0 < begin < at:
            at = begin
        seen = 0
        while seen < chunk.num_values and at < self._size:
            page = page_at(stream, at)
            most = max(FREE, MOST_FOLDED * page.size) if whole else _MOST_PAGE
            if page.unfolded > most:
                what = f"has a page of {page.size:,} bytes that unfolds to {in_mib(page.unfolded)}"
                do = "write it again uncompressed, in smaller pages (data_page_size)"
                self._refuse(group, column, f"{what}; at most {in_mib(most)} are read. {_IF} {do}")
            at = page.start + page.size
            if page.kind in (DATA, DATA_2):
                seen += page.num_values
            if page.kind in (DATA, DATA_2, DICTIONARY):
                yield page


class _Lengths:
    """Of the texts of a dictionary page; those of its pages' codes without them."""

    def __init__(self, stream: BinaryIO, page: Page, column: Column, free: int) -> None:
        """Look at the texts only where all values together might take more than `free` bytes."""
        self._stream, self._page, self._column = stream, page, column
        self._found: NDArray[np.int64] | None = None
        few = page.unfolded * column.chunk.num_values <= free
        self.is_rough = few or is_opaque(page, column)
        self.longest = page.unfolded if self.is_rough else int(self._all().max(initial=0))

    def _all(self) -> NDArray[np.int64]:
        if self._found is None:
            data, at = body(self._stream, self._page, self._column), 0
            found: list[int] = []
            while at + 4 <= len(data) and len(found) < self._page.num_values:
                (length,) = unpack_from("<I", data, at)
                found.append(length)
                at += 4 + length
            self._found = np.array(found, np.int64)
        return self._found

    def of(self, page: Page) -> int:
        """Bytes that the values of a page take together."""
        if self.is_rough or is_opaque(page, self._column):
            return page.num_values * self.longest
        data = body(self._stream, page, self._column)
        if page.kind == DATA:
            for level in most_levels(self._column):
                if level:
                    data = data[4 + unpack_from("<I", data)[0] :]
        lengths = self._all()
        if not data or not len(lengths):  # there are none but missing values
            return 0
        found = runs(data, 1, data[0], page.num_values)
        return sum(times * int(lengths.take(c, mode="clip").sum()) for c, times in found)


def _most_in_a_row(repetition: Runs) -> int:
    """The most values from one level of 0 to the next."""
    most = last = 0
    for found, times in repetition:
        starts = np.flatnonzero(found == 0)
        if not len(starts):
            last += len(found) * times
            continue
        most = max(most, last + int(starts[0]), int(np.diff(starts).max(initial=0)))
        last = len(found) - int(starts[-1])
    return max(most, last)
