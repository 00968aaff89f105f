"""Pages of a parquet file as they are written: their headers, levels and codes.

Source: parquet.thrift and Encodings.md of the format; Thrift's compact protocol.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from struct import error as StructError
from struct import unpack_from
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

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
