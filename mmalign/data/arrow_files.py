"""What the rows of Arrow files take in memory, known before they are read as plain values."""

from __future__ import annotations

from importlib import import_module
from struct import error as StructError
from struct import unpack_from
from typing import TYPE_CHECKING, Any

from mmalign.data.cells import damage, picture_columns
from mmalign.data.json_text import LONGEST
from mmalign.data.unfold import FREE, MOST_FOLDED, in_mib
from mmalign.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

MOST_UNPACKED = 2**30
"""Bytes that the compressed parts of one file may have: they are unpacked all at once."""

_VALUE = 8  # bytes that any value takes at least, in a list of Python's
_BATCH, _DICTIONARY = 3, 2  # kinds of messages with a body


def size_of(batch: Any) -> tuple[int, int]:
    """Bytes that a record batch takes at least: its values and members of lists; their texts."""
    return _sum(map(_size, batch.columns))


def require_short(place: str, batch: Any, first: int = 1) -> None:
    """Refuse a record batch with a row that is longer than a line of JSONL may be.

    Pictures, which are read by themselves, do not count.

    Args:
        place: Of the batch; the number of the row is put behind it.
        batch: Valid.
        first: Number of its first row.

    Raises:
        DataError: There is such a row.
    """
    pictures, _ = picture_columns(batch.schema)
    others = batch.select([name for name in batch.schema.names if name not in pictures])
    for i in range(others.num_rows) if sum(size_of(others)) > LONGEST else ():
        if (size := sum(size_of(others.slice(i, 1)))) > LONGEST:
            raise DataError(
                f"{place}{first + i}: has {in_mib(size)}, and a record may have {in_mib(LONGEST)}, "
                "as in a line of JSONL; is a list in it meant?"
            )


def _size(array: Any) -> tuple[int, int]:
    arrow: Any = import_module("pyarrow")
    types, kind = arrow.types, array.type
    if isinstance(array, arrow.ExtensionArray):
        return _size(array.storage)
    own = _VALUE * len(array), 0
    if types.is_struct(kind):
        return _sum([own, *map(_size, array.flatten())])
    if types.is_map(kind):
        begin, end = array.offsets[0].as_py(), array.offsets[-1].as_py()
        parts = (part.slice(begin, end - begin) for part in (array.keys, array.items))
        return _sum([own, *map(_size, parts)])  # which a slice has of all rows
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _sum([own, _size(array.flatten())])
    if types.is_dictionary(kind):
        return own[0], _size_of_codes(array)
    if types.is_primitive(kind) or types.is_null(kind):
        return own
    return own[0], array.nbytes


def _sum(sizes: Iterable[tuple[int, int]]) -> tuple[int, int]:
    places, texts = zip((0, 0), *sizes, strict=True)
    return sum(places), sum(texts)


def _size_of_codes(array: Any) -> int:
    """The texts that codes stand for, each as often as it does."""
    compute: Any = import_module("pyarrow.compute")
    try:
        lengths = compute.binary_length(array.dictionary)
    except NotImplementedError:  # the dictionary holds numbers, which take their place alone
        return 0
    return compute.sum(lengths.take(array.indices)).as_py() or 0


def require_plain(path: Path) -> None:
    """Refuse a file of a saved dataset that unfolds to far more than it holds, or is damaged.

    Its record batches are mapped and not read, but for offsets and for texts, of which each must be
    what it says.

    Raises:
        DataError: Says which record batch, what was found, and the limit.
    """
    arrow: Any = import_module("pyarrow")
    number = 0
    try:
        with arrow.memory_map(str(path)) as source:
            size = source.size()
            _require_packed(path, arrow.ipc.MessageReader.open_stream(source), size)
            source.seek(0)
            total = 0
            for number, batch in enumerate(arrow.ipc.open_stream(source), start=1):
                batch.validate(full=True)
                require_short(f"{path}: record batch {number}, row ", batch)
                total += _VALUE * batch.num_rows + sum(size_of(batch))
                if total > max(FREE, MOST_FOLDED * size):
                    raise DataError(
                        f"{path}: up to record batch {number} it unfolds to {in_mib(total)}, more "
                        f"than {MOST_FOLDED} times its size, which rows of text never do; save it "
                        "again without its empty values"
                    )
    except damage() as error:
        place = f"after record batch {number} it" if number else "it"
        raise DataError(
            f"{path}: {place} is damaged, or no stream of Arrow ({error}); save it again with "
            "save_to_disk"
        ) from error


def _require_packed(path: Path, messages: Any, size: int) -> None:
    """Refuse compressed buffers that say they are larger than may be in a file of a size."""
    most = min(MOST_UNPACKED, max(FREE, MOST_FOLDED * size))
    total = 0
    for number, message in enumerate(messages):
        total += _unpacked(memoryview(message.metadata), message.body)
        if total > most:
            raise DataError(
                f"{path}: up to record batch {number} its compressed parts unfold to "
                f"{in_mib(total)}; at most {in_mib(most)} are unpacked. Save it again with "
                "save_to_disk, which does not compress"
            )


def _unpacked(about: memoryview, body: Any) -> int:
    """What the compressed buffers of a message say of their size; 0 where none is compressed.

    Source: Message.fbs of Arrow; a compressed buffer begins with its size, or -1 where it is not.

    Raises:
        ValueError: Nothing of the kind stands where it must.
    """
    try:
        return _sizes(about, body)
    except StructError as error:
        raise ValueError(f"{error}") from error


def _sizes(about: memoryview, body: Any) -> int:
    message = unpack_from("<I", about)[0]
    kind = unpack_from("<B", about, _field(about, message, 1))[0]
    batch = _follow(about, _field(about, message, 2))
    if kind == _DICTIONARY:
        batch = _follow(about, _field(about, batch, 1))
    elif kind != _BATCH:
        return 0
    if not _has(about, batch, 3):
        return 0
    buffers = _follow(about, _field(about, batch, 2))
    (count,) = unpack_from("<I", about, buffers)
    total = 0
    for i in range(count):
        start, length = unpack_from("<qq", about, buffers + 4 + 16 * i)
        if length > 8:
            total += max(0, unpack_from("<q", memoryview(body), start)[0])
    return total


def _has(data: memoryview, table: int, number: int) -> bool:
    return _offset(data, table, number) > 0


def _field(data: memoryview, table: int, number: int) -> int:
    """Where a field of a flatbuffers table stands."""
    offset = _offset(data, table, number)
    if not offset:
        raise ValueError(f"field {number} is missing")
    return table + offset


def _offset(data: memoryview, table: int, number: int) -> int:
    fields = table - unpack_from("<i", data, table)[0]
    slot = 4 + 2 * number
    (size,) = unpack_from("<H", data, fields)
    return unpack_from("<H", data, fields + slot)[0] if slot + 2 <= size else 0


def _follow(data: memoryview, at: int) -> int:
    return at + unpack_from("<I", data, at)[0]
