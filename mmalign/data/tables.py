"""Rows of parquet files and of Hugging Face datasets.

A cell that holds an image becomes a `Picture`, a reference: a table of images can be listed without
reading one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from itertools import repeat
from pathlib import Path
from struct import error as StructError
from struct import unpack_from
from typing import Any

from mmalign.data.example import HELD_OUT, Picture, Row, Wanted
from mmalign.data.fields import LONGEST, as_list, as_object
from mmalign.data.media_layouts import LISTS
from mmalign.data.opening import FREE, MOST_FOLDED, Fence, amount
from mmalign.data.pages import Pages
from mmalign.data.pictures import LIMITS, damage, picture_columns, row_places
from mmalign.errors import DataError
from mmalign.safe import open_file


def batch_records(batch: Any) -> list[dict[str, Any] | str]:
    """The rows of a record batch; what is wrong in the place of one that cannot be read."""
    kinds = {field.name: field.type for field in batch.schema}
    try:
        records = batch.to_pylist()
    except UnicodeDecodeError:
        return [_one(batch.slice(i, 1), kinds) for i in range(batch.num_rows)]
    return [_record(record, kinds) for record in records]


def _one(batch: Any, kinds: Mapping[str, Any]) -> dict[str, Any] | str:
    record: dict[str, Any] = {}
    for name in batch.schema.names:
        try:
            record[name] = batch.column(name)[0].as_py()
        except UnicodeDecodeError as error:
            return f"{name} is not UTF-8 ({error.reason} at byte {error.start})"
    return _record(record, kinds)


def _record(record: Mapping[str, Any], kinds: Mapping[str, Any]) -> dict[str, Any]:
    return {name: plain(_json_read(value, kinds[name])) for name, value in record.items()}


def _json_read(value: Any, kind: Any) -> Any:
    """A value with the texts of its `arrow.json` members read."""
    if value is None or not _has_json(kind):
        return value
    types: Any = import_module("pyarrow").types
    if str(getattr(kind, "extension_name", "")) == "arrow.json":
        with suppress(ValueError, RecursionError):
            return json.loads(value)
        return value
    if types.is_struct(kind):
        fields = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
        return {name: _json_read(member, fields[name]) for name, member in value.items()}
    return [_json_read(member, kind.value_type) for member in value]


def _has_json(kind: Any) -> bool:
    """Whether a type is, or holds in lists and objects, JSON text."""
    types: Any = import_module("pyarrow").types
    if types.is_struct(kind):
        return any(_has_json(kind.field(i).type) for i in range(kind.num_fields))
    if _is_list(kind):
        return _has_json(kind.value_type)
    return str(getattr(kind, "extension_name", "")) == "arrow.json"


def _is_list(kind: Any) -> bool:
    types: Any = import_module("pyarrow").types
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def plain(value: Any) -> Any:
    """A value without the null members of its objects: a table fills what one row lacks with null.

    Cells of the row itself stay, null or not.
    """
    record = as_object(value)
    if record is not None:
        return {name: _filled(member) for name, member in record.items()}
    return _filled(value)


def _filled(value: Any) -> Any:
    items, parts = as_list(value), as_object(value)
    if parts is not None:
        return {name: _filled(member) for name, member in parts.items() if member is not None}
    return value if items is None else [_filled(member) for member in items]


MOST_UNPACKED = 2**30
"""Bytes that the compressed parts of one file may have: they are unpacked all at once."""

_VALUE = 8  # bytes that any value takes at least, in a list of Python's
_BATCH, _DICTIONARY = 3, 2  # kinds of messages with a body


def size_of(batch: Any) -> tuple[int, int]:
    """Bytes that a record batch takes at least: its values and members of lists; their texts."""
    return _sum(map(_size, batch.columns))


def require_short(place: str, batch: Any, first: int = 1) -> None:
    """Refuse a record batch with a row that is longer than a line of JSONL may be.

    Images, which are read by themselves, do not count.

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
                f"{place}{first + i}: has {amount(size)}, and a record may have {amount(LONGEST)}, "
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
    if _is_list(kind):
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
                        f"{path}: up to record batch {number} it unfolds to {amount(total)}, more "
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
                f"{amount(total)}; at most {amount(most)} are unpacked. Save it again with "
                "save_to_disk, which does not compress"
            )


def _unpacked(about: memoryview, body: Any) -> int:
    """What the compressed buffers of a message say of their size; 0 where none is compressed.

    Source: Message.fbs of Arrow; a compressed buffer begins with its size, or -1 where it is not.

    Raises:
        ValueError: Nothing of the kind stands where it must.
    """
    try:
        message = unpack_from("<I", about)[0]
        kind = unpack_from("<B", about, _field(about, message, 1))[0]
        batch = _follow(about, message, 2)
        if kind == _DICTIONARY:
            batch = _follow(about, batch, 1)
        if kind not in (_BATCH, _DICTIONARY) or not _offset(about, batch, 3):
            return 0
        buffers = _follow(about, batch, 2)
        (count,) = unpack_from("<I", about, buffers)
        places = [unpack_from("<qq", about, buffers + 4 + 16 * i) for i in range(count)]
        starts = [start for start, length in places if length > 8]
        return sum(max(0, unpack_from("<q", memoryview(body), start)[0]) for start in starts)
    except StructError as error:
        raise ValueError(f"{error}") from error


def _offset(data: memoryview, table: int, number: int) -> int:
    """Where a field of a flatbuffers table stands from its begin on; 0 where it has none."""
    fields = table - unpack_from("<i", data, table)[0]
    slot = 4 + 2 * number
    (size,) = unpack_from("<H", data, fields)
    return unpack_from("<H", data, fields + slot)[0] if slot + 2 <= size else 0


def _field(data: memoryview, table: int, number: int) -> int:
    """Where a field stands that must be there."""
    offset = _offset(data, table, number)
    if not offset:
        raise ValueError(f"field {number} is missing")
    return table + offset


def _follow(data: memoryview, table: int, number: int) -> int:
    """Where what a field points at begins."""
    at = _field(data, table, number)
    return at + unpack_from("<I", data, at)[0]


_LONGEST = 64 * 2**20  # bytes; a state names every arrow file


def require_saved(folder: Path) -> None:
    """Refuse a saved dataset, or one of splits, that names no, damaged or other folders' files.

    Raises:
        DataError: A link or a name leads out of the folder, what describes it is damaged, or a file
            unfolds to far more than it holds.
    """
    fence = Fence(folder)
    splits = _described(fence, folder / "dataset_dict.json").get("splits")
    parts = [folder] if splits is None else [folder / str(name) for name in as_list(splits) or ()]
    for part in parts:
        if part != folder and part.parent != folder:
            raise DataError(f"{folder}: names a split {part.name!r} that is not a folder in it")
        state = _described(fence, part / "state.json")
        if not state:
            continue
        for entry in as_list(state.get("_data_files")) or [None]:
            name = (as_object(entry) or {}).get("filename")
            if not isinstance(name, str):
                raise DataError(f"{part / 'state.json'}: names no files; save the dataset again")
            require_plain(fence.require(part / name))


def _described(fence: Fence, file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no file."""
    if not file.exists():
        return {}
    try:
        value = as_object(json.loads(fence.read_text(file, _LONGEST)))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not JSON: {error}") from error
    if value is None:
        raise DataError(f"{file}: must hold an object; save the dataset again")
    return value


_BATCH_BYTES = 32 * 2**20
_SHARD = re.compile(r"(\w+)-\d+-of-\d+")


def parquet_rows(file: Path) -> Iterator[Row]:
    """The rows of a parquet file."""
    place = f"{file}:"
    try:
        open_file(file).close()  # not a pipe: the library would wait for it
        for row in _table_rows(file):
            place = f"{row.place}: what follows"
            yield row
    except damage() as error:
        raise DataError(f"{place} cannot be read as parquet: {error}") from error


def _table_rows(file: Path) -> Iterator[Row]:
    parquet: Any = import_module("pyarrow.parquet")
    with parquet.ParquetFile(file, **LIMITS) as table:
        schema = table.schema_arrow
        pictures, lists = picture_columns(schema)
        _refuse_lists(str(file), lists)
        pictures = [name for name in pictures if not _is_empty(table.metadata, name)]
        others = [name for name in schema.names if name not in pictures]
        pages = Pages(file, table.metadata)
        if others:
            records = _records_of(file, table, pages, others)
        else:
            pages.require_total(table.metadata.num_row_groups - 1, 8 * table.metadata.num_rows)
            records = repeat(dict[str, Any](), table.metadata.num_rows)
        for i, record in enumerate(records):
            if isinstance(record, str):
                yield Row(f"{file}:{i + 1}", None, record)
            else:
                cells = {name: Picture(file, i, name) for name in pictures}
                yield Row(f"{file}:{i + 1}", {**record, **cells})


def _records_of(
    file: Path, table: Any, pages: Pages, names: list[str]
) -> Iterator[dict[str, Any] | str]:
    """The rows of some columns, few at a time where they are long."""
    places = texts = number = 0
    for group in range(table.metadata.num_row_groups):
        rows = pages.rows_at_once(group, names, _BATCH_BYTES)
        for batch in table.iter_batches(batch_size=rows, row_groups=[group], columns=names):
            of_values, of_texts = size_of(batch)
            places, texts = places + of_values, texts + of_texts
            pages.require_total(group, places, texts)
            require_short(f"{file}:", batch, number + 1)
            number += batch.num_rows
            yield from batch_records(batch)


def shard_rows(
    folder: Path, split: str | None, wanted: Wanted | None = None
) -> Iterator[Row] | None:
    """The rows of a folder of parquet files, or None when it holds none.

    Files named SPLIT-00000-of-00012, as hubs name them, belong to that split.
    """
    files = sorted(folder.glob("*.parquet")) or sorted((folder / "data").glob("*.parquet"))
    if not files:
        return None
    fence = Fence(folder)
    files = [fence.require(file) for file in files]
    parts: dict[str, list[Path]] = {}
    for file in files:
        named = _SHARD.match(file.name)
        parts.setdefault(named[1] if named else "", []).append(file)
    if "" in parts:  # not all are named by a split: then none is
        return (row for file in files for row in parquet_rows(file))
    return _marked_rows(parts, _splits(str(folder), parts, split), wanted)


def _marked_rows(
    parts: Mapping[str, list[Path]], splits: Sequence[str], wanted: Wanted | None
) -> Iterator[Row]:
    for part in splits:
        for file in parts.get(part, ()):
            for row in parquet_rows(file):
                if wanted and not wanted(part):
                    break
                yield Row(row.place, {**(row.value or {}), "split": part})


def _splits(path: str, parts: Collection[str], split: str | None) -> tuple[str, ...]:
    """The named split, or the train and held-out ones."""
    wanted = (split,) if split else ("train", *HELD_OUT)
    if wanted[0] not in parts:
        raise DataError(
            f"{path}: has no split {wanted[0]!r}; set `split` to one of {sorted(parts)}"
        )
    return wanted


def _is_empty(metadata: Any, column: str) -> bool:
    """Whether the file's statistics say that no cell of a column has bytes."""
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        for leaf in map(group.column, range(group.num_columns)):
            if leaf.path_in_schema in (column, f"{column}.bytes"):
                counts = leaf.statistics
                if counts is None or counts.null_count != group.num_rows:
                    return False
    return True


def _refuse_lists(path: str, columns: list[str]) -> None:
    if named := [column for column in columns if column in LISTS]:
        raise DataError(
            f"{path}: the cells of column {named[0]!r} hold lists of images, and only cells of one "
            "image can be read. Write the images to files, and their paths into the column"
        )


def saved_rows(folder: Path, split: str | None, wanted: Wanted | None = None) -> Iterator[Row]:
    """The rows of a folder of `datasets.save_to_disk`."""
    datasets: Any = import_module("datasets")
    require_saved(folder)
    try:
        data = datasets.load_from_disk(str(folder))
    except damage() as error:
        raise DataError(
            f"{folder}: a folder must be one of datasets.save_to_disk, of parquet files, or of "
            f"images ({error})"
        ) from error
    return _dataset_rows(str(folder), data, split, wanted)


def hub_rows(
    path: str, name: str | None, split: str | None, wanted: Wanted | None = None
) -> Iterator[Row]:
    """The rows of a hub dataset."""
    datasets: Any = import_module("datasets")
    try:
        data = datasets.load_dataset(path, name, split=split)
    except damage() as error:
        raise DataError(
            f"{path}: neither a file or folder here nor a hub dataset that can be loaded: {error}"
        ) from error
    return _dataset_rows(path, data if split is None else {split: data}, split, wanted)


def _dataset_rows(path: str, data: Any, split: str | None, wanted: Wanted | None) -> Iterator[Row]:
    """Rows of a Dataset, or of the train and held-out splits of a DatasetDict."""
    splits: dict[str, Any] = dict(data) if hasattr(data, "keys") else {}
    chosen = _splits(path, splits, split) if splits else ("",)
    splits = splits or {"": data}
    for part in chosen:
        mark = {"split": part} if part else {}
        where = f"{path}/{part}" if part else path
        for i, record in enumerate(_records(where, splits.get(part)), start=1):
            if part and wanted and not wanted(part):
                break
            yield Row(f"{where}:{i}", {**record, **mark})


def _records(where: str, data: Any) -> Iterator[Mapping[str, Any]]:
    """The rows of one Dataset; iterating over its images would decode every one."""
    if data is None:
        return
    pictures, lists = picture_columns(data.features.arrow_schema)
    _refuse_lists(where, lists)
    if not pictures:
        yield from _read_through(where, data)
        return
    # A selection or an order of rows, made after loading, is not in the files.
    rows = -1 if getattr(data, "_indices", None) is not None else len(data)
    try:
        places = row_places([Path(entry["filename"]) for entry in data.cache_files], rows)
        others = data.remove_columns(pictures)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    for record, (file, i) in zip(_read_through(where, others), places, strict=True):
        yield {**record, **{name: Picture(file, i, name) for name in pictures}}


def _read_through(where: str, data: Any) -> Iterator[Mapping[str, Any]]:
    """The rows of a Dataset, in plain values."""
    number = 0
    try:
        for record in data:
            number += 1
            yield plain(record)
    except damage() as error:
        raise DataError(f"{where}: cannot be read after row {number}: {error}") from error
