"""The bytes of single pictures inside parquet and arrow files, read when they are asked for."""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from dataclasses import dataclass
from importlib import import_module
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from mmalign.data.fields import as_object
from mmalign.data.pages import Pages
from mmalign.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from mmalign.data.example import Picture

MOST_KEPT = 256 * 2**20
"""Bytes of decoded column pieces kept for the next cells; the newest piece is always kept."""


LIMITS = {"thrift_string_size_limit": 2**26, "thrift_container_size_limit": 2**20}
"""Of what describes a parquet file, which a damaged one says is endless."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """A row group (or all) of one column: rows `start` to `stop` of the file."""

    start: int
    stop: int
    cells: Any  # a pyarrow chunked array
    size: int  # bytes of memory


class _Pieces:
    """The last pieces read. Pictures are mostly read in file order, many from one piece."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all; also what a forked process does, whose parent may have held the lock."""
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, int, str], list[_Piece]] = OrderedDict()
        self._size = 0

    def cell(self, picture: Picture) -> Any:
        """The value of a cell; one thread reads at a time, so that none reads a piece twice."""
        key = (str(picture.path), os.stat(picture.path).st_mtime_ns, picture.column)
        with self._lock:
            piece = next((p for p in self._kept.get(key, ()) if _holds(p, picture.row)), None)
            if piece is None:
                piece = _read(picture)
                self._kept.setdefault(key, []).append(piece)
                self._size += piece.size
            self._kept.move_to_end(key)
            self._forget(piece)
        return piece.cells[picture.row - piece.start].as_py()

    def _forget(self, newest: _Piece) -> None:
        while self._size > MOST_KEPT:
            key, pieces = next(iter(self._kept.items()))
            if pieces[0] is newest:
                break
            self._size -= pieces.pop(0).size
            if not pieces:
                del self._kept[key]


def damage() -> tuple[type[Exception], ...]:
    """What reading a damaged table raises: anything but a failure of our own."""
    arrow: Any = import_module("pyarrow")
    values = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
    return (arrow.ArrowException, OSError, MemoryError, NotImplementedError, *values)


def _holds(piece: _Piece, row: int) -> bool:
    return piece.start <= row < piece.stop


def _read(picture: Picture) -> _Piece:
    try:
        read = _from_parquet if picture.path.suffix == ".parquet" else _from_arrow
        return read(picture)
    except damage() as error:
        raise DataError(f"{picture}: cannot be read: {error}") from error


def _from_parquet(picture: Picture) -> _Piece:
    parquet: Any = import_module("pyarrow.parquet")
    with parquet.ParquetFile(picture.path, **LIMITS) as file:
        groups = range(file.metadata.num_row_groups)
        ends = list(accumulate(file.metadata.row_group(i).num_rows for i in groups))
        group = bisect_right(ends, picture.row)
        if group == len(ends):
            raise DataError(f"{picture}: the file has {file.metadata.num_rows} rows only")
        Pages(picture.path, file.metadata).require_whole(group, picture.column)
        table = file.read_row_group(group, columns=[picture.column], use_threads=False)
    start = ends[group] - table.num_rows
    return _Piece(start, ends[group], table.column(picture.column), table.nbytes)


def _from_arrow(picture: Picture) -> _Piece:
    """The whole column, memory-mapped: costs no memory until a cell of it is read."""
    arrow: Any = import_module("pyarrow")
    with arrow.memory_map(str(picture.path)) as source:
        table = arrow.ipc.open_stream(source).read_all()
    if picture.row >= table.num_rows:
        raise DataError(f"{picture}: the file has {table.num_rows} rows only")
    return _Piece(0, table.num_rows, table.column(picture.column), 0)


_PIECES = _Pieces()
os.register_at_fork(after_in_child=_PIECES.reset)


def cell_bytes(picture: Picture) -> bytes:
    """The bytes in a table's cell: binary, or the `bytes` of a {bytes, path} object.

    Raises:
        DataError: The table cannot be read, or the cell holds no bytes.
    """
    try:
        value = _PIECES.cell(picture)
    except damage() as error:
        raise DataError(f"{picture}: cannot be read: {error}") from error
    parts = as_object(value)
    data = value if parts is None else parts.get("bytes")
    if not isinstance(data, bytes) or not data:
        raise DataError(f"{picture}: the cell is empty")
    return data


def picture_columns(schema: Any) -> tuple[list[str], list[str]]:
    """The columns of an arrow schema whose cells are pictures, and those that hold lists of them.

    A picture is a binary cell, or the {bytes, path} object that `datasets` makes of an image.
    """
    types: Any = import_module("pyarrow").types

    def is_picture(kind: Any) -> bool:
        if types.is_struct(kind):
            names = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
            return set(names) == {"bytes", "path"} and is_picture(names["bytes"])
        return types.is_binary(kind) or types.is_large_binary(kind)

    single = [field.name for field in schema if is_picture(field.type)]
    lists = [
        field.name
        for field in schema
        if (types.is_list(field.type) or types.is_large_list(field.type))
        and is_picture(field.type.value_type)
    ]
    return single, lists


def row_places(paths: Sequence[Path], num_rows: int) -> Iterator[tuple[Path, int]]:
    """The file of each row of a dataset and its row there, in order.

    Args:
        paths: The arrow files of the dataset.
        num_rows: Rows of the dataset.

    Raises:
        DataError: The files hold other rows than the dataset, which then is a selection of them.
    """
    arrow: Any = import_module("pyarrow")
    sizes: list[int] = []
    for path in paths:
        try:
            with arrow.memory_map(str(path)) as source:
                sizes.append(arrow.ipc.open_stream(source).read_all().num_rows)
        except damage() as error:
            raise DataError(f"{path}: cannot be read: {error}") from error
    if sum(sizes) != num_rows:
        raise DataError(
            "its pictures cannot be read in place, as it is a selection of the rows that its files "
            "hold; write it whole with save_to_disk, and use that folder"
        )
    for path, size in zip(paths, sizes, strict=True):
        yield from ((path, row) for row in range(size))
