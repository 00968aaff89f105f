"""Pages of parquet columns, looked at before they are read: how much each unfolds to.

A dictionary of one long text and a run of codes, or a list of equal numbers, make gigabytes of a
few bytes. Headers of pages say how many values each holds; what codes stand for is summed up from
the dictionary's lengths, without the texts.

Source: parquet.thrift and Encodings.md of the format; Thrift's compact protocol.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from struct import error as StructError
from struct import unpack_from
from typing import Any, BinaryIO, NoReturn

import numpy as np
from numpy.typing import NDArray

from mmalign.data.opening import FREE, MOST_FOLDED, amount
from mmalign.errors import DataError
from mmalign.safe import open_file

Runs = Iterator[tuple[NDArray[np.int64], int]]

DICTIONARY, DATA, DATA_2 = 2, 0, 3
"""Kinds of pages."""

DAMAGE = (ValueError, IndexError, KeyError, TypeError, OverflowError, StructError)
"""What reading a damaged page raises."""

_CODECS = {"UNCOMPRESSED", "SNAPPY", "GZIP", "BROTLI", "LZ4", "ZSTD"}
_BIT_PACKED = 4  # an encoding of levels
_LONGEST_HEADER = 2**24
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
class Page:
    """What the header of a page says."""

    kind: int
    start: int  # of its body in the file
    size: int  # bytes there
    unfolded: int  # bytes once it is decompressed
    about: dict[int, Any]  # of its own kind

    @property
    def num_values(self) -> int:
        """Values, missing ones included."""
        return self.about.get(1, 0)

    @property
    def encoding(self) -> int:
        """Of its values."""
        return self.about.get(4 if self.kind == DATA_2 else 2, 0)


@dataclass(slots=True)
class Column:
    """One leaf of the schema in one row group."""

    path: str
    chunk: Any
    about: Any  # of the schema
    pages: list[Page] = field(default_factory=list["Page"])  # of values
    most_value: int = 0  # bytes of a value that takes none, or few, in its page
    held: int = 0  # bytes that all values take, but for texts that are written out in the pages
    folded: int = 0  # of these, bytes of the texts of a dictionary, where they are known
    written: int = 0  # bytes of the pages once they are decompressed

    @property
    def repeats(self) -> bool:
        """Whether it holds lists."""
        return self.about.max_repetition_level > 0


def page_at(stream: BinaryIO, at: int) -> Page:
    """The page whose header begins at a place of the file."""
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
    about = fields.get({DATA: 5, DICTIONARY: 7, DATA_2: 8}.get(kind, 0), {})
    if min(unfolded, folded, about.get(1, 0)) < 0:
        raise ValueError("its size is below 0")
    return Page(kind, at + cursor.at, folded, unfolded, about)


def body(stream: BinaryIO, page: Page, column: Column) -> bytes:
    """A page decompressed, without the levels that stand beside what is compressed."""
    arrow: Any = import_module("pyarrow")
    beside = page.about.get(5, 0) + page.about.get(6, 0) if page.kind == DATA_2 else 0
    stream.seek(page.start + beside)
    data = stream.read(page.size - beside)
    codec = column.chunk.compression.lower()
    if codec == "uncompressed" or page.about.get(7) is False:
        return data
    codec = "lz4_raw" if codec == "lz4" else codec
    size = page.unfolded - beside
    try:
        return arrow.decompress(data, size, codec=codec, asbytes=True) if size else b""
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(f"{error}") from error


def most_levels(column: Column) -> tuple[int, int]:
    """Of repetition and of definition."""
    return column.about.max_repetition_level, column.about.max_definition_level


def is_opaque(page: Page, column: Column) -> bool:
    """Whether codes cannot be found: their place, by levels in an old encoding, or their bytes."""
    if column.chunk.compression not in _CODECS:  # LZ4 in frames of Hadoop's
        return True
    repetition, definition = most_levels(column)
    return page.kind == DATA and (
        (repetition > 0 and page.about.get(4) == _BIT_PACKED)
        or (definition > 0 and page.about.get(3) == _BIT_PACKED)
    )


def levels(stream: BinaryIO, column: Column) -> Runs:
    """The repetition levels of a column, as `runs` gives them: 0 where a row begins."""
    width = column.about.max_repetition_level.bit_length()
    for page in column.pages:
        if page.kind == DATA_2:
            stream.seek(page.start)
            data = stream.read(page.about.get(6, 0))
        elif is_opaque(page, column):  # it counts as one row
            yield np.ones(1, np.int64), page.num_values
            continue
        else:
            data = body(stream, page, column)
            data = data[4 : 4 + unpack_from("<I", data)[0]]
        left = page.num_values
        for found, times in runs(data, 0, width, left):
            left -= len(found) * times
            yield found, times
        if left > 0:
            raise ValueError(f"{left:,} levels are missing")


def runs(data: bytes, at: int, width: int, count: int) -> Runs:
    """Codes of a width in bits, from a place on, and how many times each of them stands there.

    They are written in runs of one code and in packs of eight.
    """
    if width > 32:
        raise ValueError(f"it has codes of {width} bits")
    cursor = _Cursor(data, at)
    while count > 0 and cursor.at < len(data):
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
                yield codes[: max(count, 0)], 1
                count -= len(codes)
            cursor.at = end
            continue
        size = 0 if head & 1 else -(-width // 8)
        times = min(8 * (head >> 1) if head & 1 else head >> 1, count)
        code = int.from_bytes(data[cursor.at : cursor.at + size], "little")
        if times:
            yield np.array([code], np.int64), times
        cursor.at += size
        count -= times


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
                    found = f"unfolds to {amount(column.held)}; at most {amount(most)} are read"
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
                    f"{self._path}: up to row group {group + 1} it unfolds to {amount(size)}; at "
                    f"most {amount(most)} are read of a file of {amount(self._size)}, as rows of "
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
            self._refuse(group, column, f"has a page that is damaged ({error})")
        held = min(column.held, count * max(_VALUE, column.most_value))
        if held > most:
            found = f"unfolds to {amount(held)} in one row; at most {amount(most)} are read at once"
            self._refuse(group, column, f"{found}. {_AGAIN}")
        return held

    def _refuse(self, group: int, column: Column, what: str) -> NoReturn:
        raise DataError(f"{self._path}: row group {group + 1}, column {column.path!r} {what}")

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
                self._refuse(group, column, f"has a page that is damaged ({error})")
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
                what = f"has a page of {page.size:,} bytes that unfolds to {amount(page.unfolded)}"
                do = "write it again uncompressed, in smaller pages (data_page_size)"
                self._refuse(group, column, f"{what}; at most {amount(most)} are read. {_IF} {do}")
            at = page.start + page.size
            if page.kind in (DATA, DATA_2):
                seen += page.num_values
            if page.kind in (DATA, DATA_2, DICTIONARY):
                yield page


class _Lengths:
    """Of the texts of a dictionary page; those of its pages' codes without them."""

    def __init__(self, stream: BinaryIO, page: Page, column: Column, free: int) -> None:
        """Look at the texts only where all values together might take more than `free` bytes."""
        self._stream, self._column = stream, column
        few = page.unfolded * column.chunk.num_values <= free
        self.is_rough = few or is_opaque(page, column)
        found: list[int] = []
        data, at = b"" if self.is_rough else body(stream, page, column), 0
        while at + 4 <= len(data) and len(found) < page.num_values:
            found += unpack_from("<I", data, at)
            at += 4 + found[-1]
        self._all = np.array(found, np.int64)
        self.longest = page.unfolded if self.is_rough else int(self._all.max(initial=0))

    def of(self, page: Page) -> int:
        """Bytes that the values of a page take together."""
        if self.is_rough or is_opaque(page, self._column):
            return page.num_values * self.longest
        data = body(self._stream, page, self._column)
        if page.kind == DATA:
            for level in most_levels(self._column):
                if level:
                    data = data[4 + unpack_from("<I", data)[0] :]
        if not data or not len(self._all):  # there are none but missing values
            return 0
        found = runs(data, 1, data[0], page.num_values)
        return sum(times * int(self._all.take(c, mode="clip").sum()) for c, times in found)


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
