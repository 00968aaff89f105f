"""Rows of a file or a Hugging Face dataset, each with its place; what cannot be read is a problem.

JSONL, JSON, CSV and parquet files, prompts as lines of text, `.gz` of all but parquet, folders of
pictures, of parquet files or of `datasets.save_to_disk`, and names of hub datasets.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import IO, Any

from mmalign.data.fields import DEEPEST, as_list, as_object, is_deep, show
from mmalign.data.folders import folder_rows
from mmalign.data.layout import HIGHER, LOWER
from mmalign.data.row import HELD_OUT, Row, Wanted
from mmalign.data.stored import Unreadable, literal
from mmalign.data.tables import hub_rows, parquet_rows, saved_rows, shard_rows
from mmalign.data.turns import are_messages
from mmalign.errors import DataError

__all__ = ["HELD_OUT", "LONGEST_LINE", "Row", "read_rows"]

LONGEST_LINE = 64 * 2**20  # bytes
_SPLIT = re.compile(r'"split"\s*:\s*"([^"\\]*)"')  # in a text its quotes would be escaped
_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".parquet")
# fmt: off
_NOT_TEXT = frozenset((
    "weight", "p_chosen", "agreement", "votes_chosen", "votes_rejected", "votes_a", "votes_b",
    "tie", "desirable", "label", "kto_tag", "better_response_id", "responses", "scores",
    "completions", "generations", "answers", "rating", "labels", "ranks", "ratings", "online",
    "spans", "spans_chosen", "spans_rejected", "steps",
    "steps_chosen", "steps_rejected", "cut", "chosen_cut", "rejected_cut", "meta", "history",
    "label_0", "label_1", "has_label", "images", "image_paths", "human_preference", "rank",
    "overall_preference", "preference_strength", "winner_model_a", "winner_model_b", "winner_tie",
    "label_chosen", "label_rejected", "votes_0", "votes_1", "votes_2", "votes_tie",
))
# fmt: on
_STEM = "|".join((*HIGHER, *LOWER))
_NUMBER = re.compile(
    rf"(?:{_STEM})[_-](?:chosen|rejected|[abAB0-9])|(?:chosen|rejected)[_-](?:{_STEM})"
)
"""A number of a response: score_chosen, rejected-rating, score_A."""


def read_rows(
    path: str | Path,
    *,
    name: str | None = None,
    split: str | None = None,
    wanted: Wanted | None = None,
) -> Iterator[Row]:
    """The rows of a file, a saved dataset or a hub dataset, in order.

    Args:
        path: File, folder of pictures or of `save_to_disk`, or hub name such as `owner/dataset`.
        name: Configuration of a hub dataset.
        split: Split of a saved or hub dataset; for files the caller looks at the `split` column.
        wanted: Asked for the split of each row at the moment at which it would be read. Rows that
            are not wanted may be passed over, where that spares reading them.

    Raises:
        DataError: when nothing can be read at all; a bad row is a Row with a problem.
    """
    file = Path(path)
    if file.is_dir():
        of_files = folder_rows(file, read_rows) or shard_rows(file, split, wanted)
        return of_files or saved_rows(file, split, wanted)
    if file.is_file():
        return _file_rows(file, wanted)
    if file.suffix in (*_SUFFIXES, ".gz") or str(path).startswith((".", "/", "~")):
        raise DataError(f"{path}: there is no such file{_nearest_file(file)}")
    return hub_rows(str(path), name, split, wanted)


def _nearest_file(file: Path) -> str:
    folder = file.parent
    if not folder.is_dir():
        return f", and no folder {folder}"
    near = get_close_matches(file.name, [p.name for p in folder.iterdir()], 1)
    return f". Did you mean {folder / near[0]}?" if near else ""


def _file_rows(file: Path, wanted: Wanted | None) -> Iterator[Row]:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    zipped = bool(suffixes) and suffixes[-1] == ".gz"
    kind = suffixes[-2 if zipped else -1] if len(suffixes) > zipped else ""
    if kind == ".parquet" and not zipped:
        return parquet_rows(file)
    lines = partial(_jsonl, wanted=wanted)
    readers = {".jsonl": lines, ".ndjson": lines, ".json": _json, ".txt": _prompts}
    readers |= {".csv": _csv, ".tsv": _csv}
    if kind not in readers:
        raise DataError(
            f"{file}: the name ends in {file.suffix or 'nothing'}; it must end in one of "
            f"{', '.join(_SUFFIXES)}, or .gz after a text format"
        )
    return _opened(file, zipped, readers[kind])


def _opened(file: Path, zipped: bool, read: Any) -> Iterator[Row]:
    try:
        with gzip.open(file, "rb") if zipped else file.open("rb") as handle:
            yield from read(file, handle)
    except (OSError, EOFError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error


def _jsonl(file: Path, handle: IO[bytes], wanted: Wanted | None = None) -> Iterator[Row]:
    line, number = handle.readline(LONGEST_LINE), 1
    while line:
        place = f"{file}:{number}"
        if len(line) == LONGEST_LINE:
            raise DataError(
                f"{place}: the line is longer than {LONGEST_LINE // 2**20} MiB; a JSONL file has "
                "one record a line, and one big array belongs in a file named .json"
            )
        text = line.decode("utf-8-sig" if number == 1 else "utf-8", errors="surrogateescape")
        following = handle.readline(LONGEST_LINE)
        if text.strip() and not (wanted and _is_of_others(text, wanted)):
            row = _json_row(place, text)
            if row.problem and not following and not line.endswith(b"\n"):
                row = Row(place, None, "the last line is cut off: it is not a whole JSON object")
            yield row
        line, number = following, number + 1


def _is_of_others(line: str, wanted: Wanted) -> bool:
    """Whether a line names a split, and none that is wanted: told without parsing it."""
    named = _SPLIT.findall(line)
    return bool(named) and not any(map(wanted, named))


def _json_row(place: str, text: str) -> Row:
    try:
        value = _parse(text)
    except _NotJson as error:
        return Row(place, None, str(error))
    record = as_object(value)
    if record is None:
        return Row(place, None, f"a record must be a JSON object, but is {show(value)}")
    return Row(place, record)


class _NotJson(Exception):
    pass


def _refuse(constant: str) -> Any:
    raise _NotJson(f"{constant} is not a number that JSON can hold")


_DECODER = json.JSONDecoder(parse_constant=_refuse)  # one for all lines: making it takes time


def _parse(text: str) -> Any:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _NotJson(f"not UTF-8 at character {error.start}; save the file as UTF-8") from error
    try:
        value = _DECODER.decode(text)
        if "\\ud" in text or "\\uD" in text:  # an escape may be half of a pair
            json.dumps(value, ensure_ascii=False).encode()
        if text.count("[") + text.count("{") > DEEPEST and is_deep(value):
            raise _NotJson("nested too deeply")
        return value
    except UnicodeEncodeError as error:
        raise _NotJson(f"holds half of a surrogate pair, {error.object[error.start]!a}") from error
    except RecursionError as error:
        raise _NotJson("nested too deeply") from error
    except ValueError as error:  # JSONDecodeError, and whole numbers of thousands of digits
        raise _NotJson(f"not JSON: {error}") from error


def _json(file: Path, handle: IO[bytes]) -> Iterator[Row]:
    if _has_json_lines(handle):
        yield from _jsonl(file, handle)
        return
    try:
        value = _parse(handle.read().decode("utf-8-sig", errors="surrogateescape"))
    except _NotJson as error:
        raise DataError(f"{file}: {error}") from error
    wrapped = as_object(value) or {}
    records = as_list(value) if not wrapped else as_list(wrapped.get("data"))
    if records is None:
        raise DataError(
            f"{file}: must be an array of records, or an object with that array under `data`; "
            f"found {show(sorted(wrapped)) if wrapped else show(value)}"
        )
    for i, item in enumerate(records, start=1):
        place, record = f"{file}:{i}", as_object(item)
        problem = "" if record else f"a record must be a JSON object, but is {show(item)}"
        yield Row(place, record, problem)


def _has_json_lines(handle: IO[bytes]) -> bool:
    """Whether the first line is a record by itself, which `datasets` reads as JSON Lines too."""
    line = handle.readline(LONGEST_LINE)
    while line and not line.strip():
        line = handle.readline(LONGEST_LINE)
    more = bool(handle.readline(LONGEST_LINE).strip())
    handle.seek(0)
    try:
        record = as_object(_parse(line.decode("utf-8-sig", errors="surrogateescape"))) or {}
    except _NotJson:
        return False
    if not record or as_list(record.get("data")) is not None:
        return False
    # One object with one list is a conversation, or else the records under some name.
    return more or len(record) > 1 or are_messages(next(iter(record.values())))


def _prompts(file: Path, handle: IO[bytes]) -> Iterator[Row]:
    """Prompts, one a line."""
    for number, line in enumerate(handle, start=1):
        try:
            prompt = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            yield Row(f"{file}:{number}", None, f"not UTF-8 ({error}); save the file as UTF-8")
            continue
        if prompt:
            yield Row(f"{file}:{number}", {"prompt": prompt})


def _csv(file: Path, handle: IO[bytes]) -> Iterator[Row]:
    csv.field_size_limit(LONGEST_LINE)
    text = io.TextIOWrapper(handle, encoding="utf-8-sig", newline="")
    delimiter = "\t" if ".tsv" in file.suffixes else ","
    reader = csv.DictReader(text, delimiter=delimiter, strict=True)
    try:
        for cells in reader:
            yield _csv_row(f"{file}:{reader.line_num}", cells)
    except csv.Error as error:
        raise DataError(f"{file}:{reader.line_num}: {error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 ({error}); save the file as UTF-8") from error


def _csv_row(place: str, cells: dict[Any, Any]) -> Row:
    if None in cells:
        return Row(place, None, "has more cells than the header has names")
    if None in cells.values():
        return Row(place, None, "has fewer cells than the header has names")
    return Row(place, {key: _csv_value(key, cell) for key, cell in cells.items()})


def _csv_value(column: str, cell: str) -> Any:
    """Numbers, flags and lists are read, in the columns that hold such."""
    if column not in _NOT_TEXT and not _NUMBER.fullmatch(column):
        return cell
    with suppress(_NotJson):
        return _parse(cell)
    with suppress(Unreadable):
        return literal(cell)
    return {"true": True, "false": False, "": None}.get(cell.strip().lower(), cell)
