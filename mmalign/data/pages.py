"""What the pages of a parquet file unfold to, known before they are unfolded.

A dictionary of one long text and a run of codes, or a list of equal numbers, make gigabytes of a
few bytes. Headers of pages say how many values each holds; what codes stand for is summed up from
the dictionary's lengths, without the texts.

Source: parquet.thrift and Encodings.md of the format; Thrift's compact protocol.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from struct import unpack_from
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

import numpy as np

from mmalign.data.unfold import FREE, MOST_FOLDED, in_mib
from mmalign.errors import DataError
from mmalign.safe import open_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

MOST_HELD = 2**30
"""Bytes that the lists of one column of a row group may unfold to, where they are not written out
nearly as they are, and so may what its dictionary stands for where it is read at once."""

_WRITTEN_OUT = 16  # times the bytes in its pages that values of an honest column take at most
_MOST_PAGE = 2**29  # bytes, where rows are read few at a time
_LONGEST_HEADER = 2**24
_IF = "If it is what you want,"
_AGAIN = (
    f"{_IF} write it again in smaller row groups (row_group_size) and without a dictionary "
    "(use_dictionary=False)"
)
_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8}
_DICTIONARY, _DATA, _DATA_2 = 2, 0, 3  # kinds of pages
_CODED, _OF_PREFIXES, _BIT_PACKED = (2, 8), 7, 4  # encodings
_VALUE = 8  # bytes that any value takes at least, once it is read
_AT_ONCE = 2**16  # codes that are unpacked together, by 8


class _Cursor:
    """Numbers of a Thrift struct in its compact form. IndexError: more bytes are needed."""

    def __init__(self, data: bytes, at: int = 0) -> None:
        self.data, self.at = data, at

    def number(self) -> int:
        value = shift = 0
        while True:
            byte = self.data[self.at]
            self.at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("a number of more than 64 bits")

    def struct(self) -> dict[int, Any]:
        """Fields by number; texts are passed over."""
        fields: dict[int, Any] = {}
        field = 0
        while head := self.data[self.at]:
            self.at += 1
            field = field + (head >> 4) if head >> 4 else self._signed()
            fields[field] = self._value(head & 15)
        self.at += 1
        return fields

    def _signed(self) -> int:
        value = self.number()
        return value >> 1 ^ -(value & 1)

    def _value(self, kind: int) -> Any:
        if kind in (1, 2):
            return kind == 1
        if kind in (4, 5, 6):
            return self._signed()
        if kind == 12:
            return self.struct()
        if kind not in (3, 7, 8):
            raise ValueError(f"a field of kind {kind}, which no page has")
        size = self.number() if kind == 8 else {3: 1, 7: 8}[kind]
        self.at += size
        if self.at > len(self.data):
            raise IndexError
        return None


@dataclass(frozen=True, slots=True)
class _Page:
    kind: int
    start: int  # of its body in the file
    size: int  # bytes there
    unfolded: int  # bytes once it is decompressed
    about: dict[int, Any]  # of its own kind

    @property
    def num_values(self) -> int:
        return self.about.get(1, 0)

    @property
    def encoding(self) -> int:
        return self.about.get(4 if self.kind == _DATA_2 else 2, 0)


@dataclass(slots=True)
class _Column:
    """One leaf of the schema in one row group."""

    path: str
    chunk: Any
    about: Any  # of the schema
    most_value: int = 0  # bytes of a value that takes none, or few, in its page
    held: int = 0  # bytes that all values take, but for texts that are written out in the pages
    written: int = 0  # bytes of the pages once they are decompressed

    @property
    def repeats(self) -> bool:
        return self.about.max_repetition_level > 0


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
        a_row, whole = 0, 0
        with open_file(self._path) as stream:
            for column in self._columns(stream, group, names):
                whole += column.chunk.total_uncompressed_size
                if column.repeats:
                    self._require(group, column)
                    whole += column.held
                else:
                    a_row += column.most_value
        a_row += -(-whole // num_rows)
        return max(1, min(1024, most // max(a_row, 1)))

    def require_whole(self, group: int, name: str) -> None:
        """Refuse a column that takes too much where a row group of it is read at once.

        Raises:
            DataError: As above.
        """
        with open_file(self._path) as stream:
            for column in self._columns(stream, group, [name], whole=True):
                self._require(group, column)

    def require_total(self, group: int, size: int) -> None:
        """Refuse what rows have come to, up to some of a row group.

        Raises:
            DataError: No file of this size holds so much text.
        """
        if size > self._most:
            raise DataError(
                f"{self._path}: up to row group {group + 1} it unfolds to {in_mib(size)}; at most "
                f"{in_mib(self._most)} are read of a file of {in_mib(self._size)}, as rows of text "
                f"never take {MOST_FOLDED} times as much. {_AGAIN}"
            )

    @property
    def _most(self) -> int:
        return max(FREE, MOST_FOLDED * self._size)

    def _require(self, group: int, column: _Column) -> None:
        folds = column.held > _WRITTEN_OUT * column.written
        most = min(MOST_HELD, self._most) if folds else self._most
        if column.held > most:
            found = f"unfolds to {in_mib(column.held)}; at most {in_mib(most)} are read at once"
            self._refuse(group, column, f"{found}. {_AGAIN}")

    def _refuse(self, group: int, column: _Column, what: str) -> NoReturn:
        raise DataError(f"{self._path}: row group {group + 1}, column {column.path!r} {what}")

    def _columns(
        self, stream: BinaryIO, group: int, names: Iterable[str], *, whole: bool = False
    ) -> Iterator[_Column]:
        of_group, schema = self._metadata.row_group(group), self._metadata.schema
        wanted = tuple(names)
        for i in range(of_group.num_columns):
            path = schema.column(i).path
            if not any(path == name or path.startswith(f"{name}.") for name in wanted):
                continue
            column = _Column(path, of_group.column(i), schema.column(i))
            try:
                self._look(stream, group, column, whole=whole)
            except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
                self._refuse(group, column, f"has a page that is damaged ({error})")
            yield column

    def _look(self, stream: BinaryIO, group: int, column: _Column, *, whole: bool) -> None:
        """Sum up what the values of a column take."""
        width = _WIDTHS.get(column.about.physical_type)
        if column.about.physical_type == "FIXED_LEN_BYTE_ARRAY":
            width = column.about.length
        lengths: _Lengths | None = None
        for page in self._pages(stream, group, column, whole=whole):
            if page.kind == _DICTIONARY:
                free = min(MOST_HELD, self._most) if whole else FREE
                lengths = _Lengths(stream, page, column, free)
                continue
            column.held += page.num_values * max(_VALUE, width or 0)
            column.written += page.unfolded
            if width is not None:
                column.most_value = max(column.most_value, width)
            elif page.encoding in _CODED and lengths is not None:
                exact = column.repeats or whole
                column.most_value = max(column.most_value, lengths.longest)
                column.held += lengths.of(page) if exact else 0
            elif page.encoding == _OF_PREFIXES:  # each value goes on from the one before
                column.most_value = max(column.most_value, page.unfolded)
                column.held += page.num_values * page.unfolded

    def _pages(
        self, stream: BinaryIO, group: int, column: _Column, *, whole: bool
    ) -> Iterator[_Page]:
        """All that a reader reads: from the chunk's start on, until it has all its values."""
        chunk = column.chunk
        at, begin = chunk.data_page_offset, chunk.dictionary_page_offset
        if chunk.has_dictionary_page and begin is not None and 0 < begin < at:
            at = begin
        seen = 0
        while seen < chunk.num_values and at < self._size:
            page = _page(stream, at)
            most = max(FREE, MOST_FOLDED * page.size)
            most = most if whole else min(most, _MOST_PAGE)
            if page.unfolded > most:
                what = f"has a page of {page.size:,} bytes that unfolds to {in_mib(page.unfolded)}"
                do = "write it again uncompressed, in smaller pages (data_page_size)"
                self._refuse(group, column, f"{what}; at most {in_mib(most)} are read. {_IF} {do}")
            at = page.start + page.size
            if page.kind in (_DATA, _DATA_2):
                seen += page.num_values
            if page.kind in (_DATA, _DATA_2, _DICTIONARY):
                yield page


def _page(stream: BinaryIO, at: int) -> _Page:
    size = 2**9
    while True:
        stream.seek(at)
        data = stream.read(size)
        cursor = _Cursor(data)
        try:
            fields = cursor.struct()
            break
        except IndexError:
            if len(data) < size or size >= _LONGEST_HEADER:
                raise ValueError("its header does not end") from None
            size *= 32
    kind, unfolded, folded = fields[1], fields[2], fields[3]
    about = fields.get({_DATA: 5, _DICTIONARY: 7, _DATA_2: 8}.get(kind, 0), {})
    if min(unfolded, folded, about.get(1, 0)) < 0:
        raise ValueError("its size is below 0")
    return _Page(kind, at + cursor.at, folded, unfolded, about)


class _Lengths:
    """Of the texts of a dictionary page; those of its pages' codes without them."""

    def __init__(self, stream: BinaryIO, page: _Page, column: _Column, free: int) -> None:
        """Look at the texts only where all values together might take more than `free` bytes."""
        self._stream, self._page, self._column = stream, page, column
        self._found: NDArray[np.int64] | None = None
        self._levels = column.about.max_repetition_level, column.about.max_definition_level
        self._is_free = page.unfolded * column.chunk.num_values <= free
        self.longest = page.unfolded if self._is_free else int(self._all().max(initial=0))

    def _all(self) -> NDArray[np.int64]:
        if self._found is None:
            data, at = self._body(self._page), 0
            found: list[int] = []
            while at + 4 <= len(data) and len(found) < self._page.num_values:
                (length,) = unpack_from("<I", data, at)
                found.append(length)
                at += 4 + length
            self._found = np.array(found, np.int64)
        return self._found

    def of(self, page: _Page) -> int:
        """Bytes that the values of a page take together."""
        most = page.num_values * self.longest
        if self._is_free or page.about.get(4 if page.kind == _DATA else 0) == _BIT_PACKED:
            return most
        data = self._body(page)
        if page.kind == _DATA:
            for level in self._levels:
                if level:
                    data = data[4 + unpack_from("<I", data)[0] :]
        return _sum_of(data, page.num_values, self._all())

    def _body(self, page: _Page) -> bytes:
        """A page decompressed, without the levels that stand beside what is compressed."""
        arrow: Any = import_module("pyarrow")
        beside = page.about.get(5, 0) + page.about.get(6, 0) if page.kind == _DATA_2 else 0
        self._stream.seek(page.start + beside)
        data = self._stream.read(page.size - beside)
        codec = self._column.chunk.compression.lower()
        if codec == "uncompressed" or page.about.get(7) is False:
            return data
        codec = "lz4_raw" if codec == "lz4" else codec
        size = page.unfolded - beside
        try:
            return arrow.decompress(data, size, codec=codec, asbytes=True) if size else b""
        except (arrow.ArrowException, OSError) as error:
            raise ValueError(f"{error}") from error


def _sum_of(data: bytes, num_values: int, lengths: NDArray[np.int64]) -> int:
    """The lengths of what codes stand for, in runs of one code and packs of eight."""
    width, cursor = data[0], _Cursor(data, 1)
    if width > 32:
        raise ValueError(f"it has codes of {width} bits")
    total, left = 0, num_values
    while left > 0 and cursor.at < len(data):
        head = cursor.number()
        if head & 1 and width:
            end = min(cursor.at + width * (head >> 1), len(data))
            step = width * _AT_ONCE
            for start in range(cursor.at, end, step):
                packed = np.frombuffer(data, np.uint8, min(step, end - start), start)
                bits = np.unpackbits(packed, bitorder="little")
                codes = bits[: len(bits) // width * width].reshape(-1, width) @ (
                    1 << np.arange(width, dtype=np.int64)
                )
                total += int(lengths[codes[: max(left, 0)]].sum())
                left -= len(codes)
            cursor.at = end
            continue
        size = 0 if head & 1 else -(-width // 8)
        count = min(8 * (head >> 1) if head & 1 else head >> 1, left)
        code = int.from_bytes(data[cursor.at : cursor.at + size], "little")
        total += count * int(lengths[code])
        cursor.at += size
        left -= count
    return total
