"""Rows of parquet files and of Hugging Face datasets; pictures in their cells stay where they are.

A cell that holds a picture becomes a `Picture`, a reference: a table of pictures can be listed
without reading one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib import import_module
from itertools import repeat
from pathlib import Path
from typing import Any

from mmalign.data.arrow_files import require_short, size_of
from mmalign.data.arrow_rows import batch_records, plain
from mmalign.data.cells import LIMITS, damage, picture_columns, row_places
from mmalign.data.example import Picture
from mmalign.data.guard import Fence
from mmalign.data.pages import Pages
from mmalign.data.picture_layouts import LISTS
from mmalign.data.row import HELD_OUT, Row, Wanted
from mmalign.data.saved import require_saved
from mmalign.errors import DataError
from mmalign.safe import open_file

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
            place = f"{file}:{i + 1}"
            if isinstance(record, str):
                yield Row(place, None, record)
                continue
            cells = {name: Picture(file, i, name) for name in pictures}
            yield Row(place, {**record, **cells})


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
    for column in columns:
        if column in LISTS:
            raise DataError(
                f"{path}: the cells of column {column!r} hold lists of pictures, and only cells of "
                "one picture can be read. Write the pictures to files, and their paths into the "
                "column"
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
            f"pictures ({error})"
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
    if splits:
        chosen = _splits(path, splits, split)
    else:
        chosen, splits = ("",), {"": data}
    for part in chosen:
        mark = {"split": part} if part else {}
        where = f"{path}/{part}" if part else path
        for i, record in enumerate(_records(where, splits.get(part)), start=1):
            if part and wanted and not wanted(part):
                break
            yield Row(f"{where}:{i}", {**record, **mark})


def _records(where: str, data: Any) -> Iterator[Mapping[str, Any]]:
    """The rows of one Dataset; iterating over its pictures would decode every one."""
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
