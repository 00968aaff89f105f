"""Rows of files, folders and hub datasets, each with its place; unreadable ones are problems."""

from __future__ import annotations

import codecs
import csv
import io
import logging
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import IO, Any

from mmalign.data.convert import MOST_COLUMNS
from mmalign.data.example import Row, Wanted
from mmalign.data.fields import LONGEST, JsonText, NotJsonError, as_list, as_object, parse, show
from mmalign.data.media_layouts import CAPTIONS, HIGHER, LOWER
from mmalign.data.opening import ERRORS, FOLDED, Fence, as_text, open_data, text_lines
from mmalign.data.tables import hub_rows, parquet_rows, saved_rows, shard_rows
from mmalign.data.turns import Unreadable, are_messages, literal
from mmalign.errors import DataError
from mmalign.safe import open_file

log = logging.getLogger("mmalign.data")

LONGEST_LINE = LONGEST
Reader = Callable[[Path, IO[bytes]], Iterator[Row]]
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
        path: File, folder of images or of `save_to_disk`, or hub name such as `owner/dataset`.
        name: Configuration of a hub dataset.
        split: Split of a saved or hub dataset; for files the caller looks at the `split` column.
        wanted: Asked for the split of each row at the moment at which it would be read. Rows that
            are not wanted may be passed over, where that spares reading them.

    Raises:
        DataError: when nothing can be read at all; a bad row is a Row with a problem.
    """
    file = Path(path)
    if os.path.isdir(file):
        of_files = folder_rows(file) or shard_rows(file, split, wanted)
        return of_files or saved_rows(file, split, wanted)
    if os.path.exists(file):
        return _file_rows(file, wanted)
    require_there(path)
    return hub_rows(str(path), name, split, wanted)


def require_there(*paths: str | Path) -> None:
    """Refuse what is named as a file and does not exist; names of hub datasets pass.

    Raises:
        DataError: naming the first such file, and one of a name like it.
    """
    for path in paths:
        file = Path(path)
        named = file.suffix in (*_SUFFIXES, *FOLDED) or str(path).startswith((".", "/", "~"))
        if named and not os.path.exists(file):
            raise DataError(f"{path}: there is no such file{_nearest_file(file)}")


def _nearest_file(file: Path) -> str:
    folder = file.parent
    if not os.path.isdir(folder):
        return f", and no folder {folder}"
    near = get_close_matches(file.name, [p.name for p in folder.iterdir()], 1)
    return f". Did you mean {folder / near[0]}?" if near else ""


def _file_rows(file: Path, wanted: Wanted | None) -> Iterator[Row]:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    folded = bool(suffixes) and suffixes[-1] in FOLDED
    kind = suffixes[-2 if folded else -1] if len(suffixes) > folded else ""
    if kind == ".parquet" and not folded:
        return parquet_rows(file)
    lines = partial(_jsonl, wanted=wanted)
    readers: dict[str, Reader] = {".jsonl": lines, ".ndjson": lines, ".txt": _prompts}
    readers |= {".json": partial(_json, wanted=wanted), ".csv": _csv, ".tsv": _csv}
    if kind not in readers:
        raise DataError(
            f"{file}: the name ends in {file.suffix or 'nothing'}; it must end in one of "
            f"{', '.join(_SUFFIXES)}, or {', '.join(FOLDED)} after a text format"
        )
    return _opened(file, readers[kind])


def _opened(file: Path, read: Reader) -> Iterator[Row]:
    place = f"{file}:"
    try:
        with open_data(file) as handle:
            for row in read(file, handle):
                place = f"{row.place}: what follows"
                yield row
    except ERRORS as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(f"{place} cannot be read: {why}") from error


def _jsonl(file: Path, handle: IO[bytes], wanted: Wanted | None = None) -> Iterator[Row]:
    line, number = handle.readline(LONGEST_LINE), 1
    while line:
        place = f"{file}:{number}"
        if len(line) == LONGEST_LINE:
            raise DataError(
                f"{place}: the line is longer than {LONGEST_LINE // 2**20} MiB; a JSONL file has "
                "one record a line, and one big array belongs in a .json file"
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
        value = parse(text)
    except NotJsonError as error:
        return Row(place, None, str(error))
    record = as_object(value)
    if record is None:
        return Row(place, None, f"a record must be a JSON object, but is {show(value)}")
    return Row(place, record)


def _json(file: Path, handle: IO[bytes], wanted: Wanted | None = None) -> Iterator[Row]:
    with open_data(file) as first:
        is_lines = _has_json_lines(first)
    if is_lines:
        yield from _jsonl(file, handle, wanted)
        return
    number = 0
    try:
        for number, item in enumerate(_array(file, JsonText(handle)), start=1):
            record = as_object(item)
            problem = "" if record else f"a record must be a JSON object, but is {show(item)}"
            yield Row(f"{file}:{number}", record, problem)
    except NotJsonError as error:
        place = f"{file}: after record {number}: " if number else f"{file}: "
        raise DataError(f"{place}{error}") from error


def _array(file: Path, text: JsonText) -> Iterator[Any]:
    """The members of the array that the file is, or that it has under `data`."""
    opening = text.peek()
    found, has_data = "", opening == "["
    if opening == "[":
        yield from text.records()
    elif opening == "{":
        names: list[str] = []
        for name in text.names():
            names.append(name)
            if name == "data" and text.peek() == "[":
                has_data = True
                yield from text.records()
            else:
                text.value()
        found = show(sorted(names))
    else:
        found = show(text.value())
    if text.peek():
        raise NotJsonError("not JSON: more follows after its end")
    if not has_data:
        raise DataError(
            f"{file}: must be an array of records, or an object with that array under `data`; "
            f"found {found}"
        )


def _has_json_lines(handle: IO[bytes]) -> bool:
    """Whether the first line is a record by itself, which `datasets` reads as JSON Lines too."""
    line = handle.readline(LONGEST_LINE)
    while line and not line.strip():
        line = handle.readline(LONGEST_LINE)
    more = bool(handle.readline(LONGEST_LINE).strip())
    try:
        record = as_object(parse(line.decode("utf-8-sig", errors="surrogateescape"))) or {}
    except NotJsonError:
        return False
    if not record or as_list(record.get("data")) is not None:
        return False
    # One object with one list is a conversation, or else the records under some name.
    return more or len(record) > 1 or are_messages(next(iter(record.values())))


def _prompts(file: Path, handle: IO[bytes]) -> Iterator[Row]:
    """Prompts, one a line."""
    for place, text, problem in text_lines(file, handle, LONGEST_LINE):
        yield Row(place, None if problem else {"prompt": text.strip()}, problem)


def _csv(file: Path, handle: IO[bytes]) -> Iterator[Row]:
    csv.field_size_limit(LONGEST_LINE)
    text = io.TextIOWrapper(handle, encoding="utf-8-sig", errors="surrogateescape", newline="")
    length = 0  # characters of a record, which none may have too many of

    def lines() -> Iterator[str]:
        nonlocal length
        for number, line in enumerate(iter(partial(text.readline, LONGEST_LINE), ""), start=1):
            length += len(line)
            if length >= LONGEST_LINE:
                most = f"{LONGEST_LINE // 2**20} MiB"
                raise DataError(
                    f"{file}:{number}: a record is longer than {most}; is a quote missing?"
                )
            yield line

    delimiter = "\t" if ".tsv" in file.suffixes else ","
    reader = csv.DictReader(lines(), delimiter=delimiter, strict=True)
    try:
        if len(reader.fieldnames or ()) > MOST_COLUMNS:
            raise DataError(f"{file}:1: names more than {MOST_COLUMNS:,} columns")
        for cells in reader:
            yield _csv_row(f"{file}:{reader.line_num}", cells)
            length = 0
    except csv.Error as error:
        raise DataError(f"{file}:{reader.line_num}: {error}") from error


def _csv_row(place: str, cells: dict[Any, Any]) -> Row:
    if None in cells:
        return Row(place, None, "has more cells than the header has names")
    if None in cells.values():
        return Row(place, None, "has fewer cells than the header has names")
    try:
        "".join([*cells.keys(), *cells.values()]).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: not UTF-8; save the file as UTF-8") from error
    return Row(place, {key: _csv_value(key, cell) for key, cell in cells.items()})


def _csv_value(column: str, cell: str) -> Any:
    """Numbers, flags and lists are read, in the columns that hold such."""
    if column not in _NOT_TEXT and not _NUMBER.fullmatch(column):
        return cell
    with suppress(NotJsonError):
        return parse(cell)
    with suppress(Unreadable):
        return literal(cell)
    return {"true": True, "false": False, "": None}.get(cell.strip().lower(), cell)


IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif"),
    *(".bmp", ".tif", ".tiff", ".gif"),
)
UNREAD = (
    *(".heic", ".heif", ".hif", ".jxl", ".jp2", ".j2k", ".jpx", ".tga", ".psd", ".exr"),
    *(".ppm", ".pgm", ".pnm", ".qoi", ".dng", ".cr2", ".nef", ".arw"),
)
"""Images of other formats: named as such, since a row without them would be lost unseen."""
CAPTION_FILES = (".txt", ".caption")
SIDES = ("chosen", "rejected")
_TABLES = ("metadata.jsonl", "captions.jsonl", "captions.txt")
_NAMES = ("file_name", "file", "image", "name", "stem")
_LONGEST_CAPTION = 2**20  # bytes
_LARGEST_TABLE = 2**26
_NO_CAPTION = "has no caption: give NAME.txt beside an image, metadata.jsonl or captions.txt"
_NAMED = 4

Names = dict[str, list[str]]  # name without suffix -> files of that name


def folder_rows(folder: Path) -> Iterator[Row] | None:
    """The rows of a folder of images with captions, or None when it is not such a folder.

        chosen/NAME.png  rejected/NAME.jpg     a pair: files of one name, in any format
        NAME.png                               one image, where there is no chosen/ and rejected/

    The caption of NAME stands in metadata.jsonl or captions.jsonl (`file_name`, and `prompt`,
    `caption` or `text`; other keys go along), in captions.txt (NAME, a tab, the caption), or in
    NAME.txt or NAME.caption beside an image. Where both images of a pair have one, each keeps its
    own. Files and folders whose names begin with a dot are of the system's and passed over.

    Raises:
        DataError: One of chosen/ and rejected/ is missing, or several files hold captions.
    """
    there = [side for side in SIDES if (folder / side).is_dir()]
    if (folder / "dataset_dict.json").exists() or (folder / "dataset_info.json").exists():
        return None
    if len(there) == 1:
        other = SIDES[there[0] == "chosen"]
        raise DataError(f"{folder}: has {there[0]}/, but no {other}/ beside it")
    files = {side: _files(folder / side, IMAGE_SUFFIXES + UNREAD) for side in there or [""]}
    if not any(files.values()):
        if there:
            raise DataError(f"{folder}: chosen/ and rejected/ hold no images")
        return None
    _name_lonely_captions(folder, files)
    return _rows(folder, files, _Captions(folder))


def _files(folder: Path, suffixes: tuple[str, ...]) -> Names:
    """The files with some suffixes below a folder, by their path from it without suffix."""
    found: Names = defaultdict(list)
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        inside = os.path.relpath(parent, folder)
        for file in sorted(files):
            name, suffix = os.path.splitext(file)
            if suffix.lower() in suffixes and not file.startswith("."):
                found[os.path.normpath(os.path.join(inside, name))].append(
                    os.path.normpath(os.path.join(inside, file))
                )
    return dict(found)


def _name_lonely_captions(folder: Path, files: dict[str, Names]) -> None:
    """Say which caption files have no image: one may be missing, or of an unknown format."""
    lonely = [
        os.path.join(side, file)
        for side, images in files.items()
        for name, found in _files(folder / side, CAPTION_FILES if side else (".caption",)).items()
        if name not in images
        for file in found
    ]
    if lonely:
        named = ", ".join([*lonely[:_NAMED], *(["..."] if len(lonely) > _NAMED else [])])
        message = "%s: caption files without an image beside them: %d (%s)"
        log.warning(message, folder, len(lonely), named)


def _rows(folder: Path, files: dict[str, Names], captions: _Captions) -> Iterator[Row]:
    yield from captions.problems
    names = sorted({name for found in files.values() for name in found})
    for name in names:
        place = f"{folder}:{name}"
        if unread := _unread(files, name):
            yield Row(place, None, f"{unread} is of a format that is not read: convert it to png")
            continue
        found = {side: files[side].get(name, []) for side in files}
        missing = [side for side in found if not found[side]]
        several = [side for side in found if len(found[side]) > 1]
        if missing:
            yield Row(place, None, f"has no image of the same name in {missing[0]}/")
        elif several:
            where = f" in {several[0]}/" if several[0] else ""
            yield Row(place, None, f"has more than one image of the same name{where}")
        else:
            paths = {side: os.path.join(side, *found[side]) for side in found}
            yield captions.row(place, name, paths)
    for name in sorted(set(captions.said) - set(names)):
        yield Row(f"{folder}:{name}", None, "has a caption, but no image")


def _unread(files: dict[str, Names], name: str) -> str:
    """An image of another format with no other of its name; "" where all can be read."""
    for side, found in files.items():
        there = found.get(name, [])
        read = [file for file in there if os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES]
        if there and not read:
            return os.path.join(side, there[0])
        found |= {name: read} if there else {}
    return ""


class _Captions:
    """What is said of each image, or of both of a pair."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.fence = folder, Fence(folder)
        self.said: dict[str, dict[str, dict[str, Any]]] = {}  # name -> side, "" for both -> record
        self.problems: list[Row] = []
        tables = [name for name in _TABLES if (folder / name).is_file()]
        if len(tables) > 1:
            raise DataError(f"{folder}: has {' and '.join(tables)}; keep one of them")
        for table in tables:
            file = self.fence.require(folder / table)
            for row in read_rows(file) if file.suffix == ".jsonl" else _caption_lines(file):
                self._take(row)

    def _take(self, row: Row) -> None:
        record = dict(row.value or {})
        key = next((key for key in _NAMES if isinstance(record.get(key), str)), None)
        if row.value is None or key is None:
            problem = row.problem or f"names no image; it must have `{_NAMES[0]}`"
            self.problems.append(Row(row.place, None, problem))
            return
        name = os.path.normpath(record.pop(key))
        side, _, inside = name.partition(os.sep)
        side, name = (side, inside) if side in SIDES and inside else ("", name)
        stem, suffix = os.path.splitext(name)
        is_file = suffix.lower() in IMAGE_SUFFIXES + UNREAD
        self.said.setdefault(stem if is_file else name, {})[side] = record

    def row(self, place: str, name: str, paths: dict[str, str]) -> Row:
        """The row of one image or pair."""
        said = self.said.get(name, {})
        value = {"id": name, **{k: v for record in said.values() for k, v in record.items()}}
        keys = {side: f"image_{side}" if side else "image" for side in paths}
        value = {k: v for k, v in value.items() if k not in CAPTIONS}
        value |= {keys[side]: path for side, path in paths.items()}
        try:
            own = {side: self._caption(said, side, path) for side, path in paths.items()}
        except DataError as error:
            return Row(place, None, f"has a caption that cannot be read: {error}")
        given = {caption for caption in own.values() if caption}
        if all(f"prompt_{side}" in value for side in own):
            return Row(place, value)
        if not given:
            return Row(place, None, _NO_CAPTION)
        if len(given) == 1:
            return Row(place, value | {"prompt": given.pop()})
        return Row(place, value | {f"prompt_{side}": caption for side, caption in own.items()})

    def _caption(self, said: dict[str, dict[str, Any]], side: str, path: str) -> str:
        """The caption of one image: its own in the table, that of both, or a file beside it."""
        for record in (said.get(side, {}), said.get("", {})):
            texts = [record[key] for key in CAPTIONS if isinstance(record.get(key), str)]
            if texts and texts[0].strip():
                return texts[0]
        texts = {
            file.name: self.fence.read_text(file, _LONGEST_CAPTION).strip()
            for file in ((self.folder / path).with_suffix(end) for end in CAPTION_FILES)
            if file.exists()
        }
        if len(set(texts.values())) > 1:
            raise DataError(f"{' and '.join(texts)} differ; keep one of them")
        return next(iter(texts.values()), "")


def _caption_lines(table: Path) -> Iterator[Row]:
    """The lines of captions.txt: a name, a tab, the caption."""
    try:
        with open_file(table) as handle:
            start = handle.read(2)
            handle.seek(0)
            stream = handle
            if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):  # as Windows' editors write
                stream = io.BytesIO(as_text(handle.read(_LARGEST_TABLE)).encode())
            for place, line, problem in text_lines(table, stream, _LONGEST_CAPTION):
                name, tab, caption = line.partition("\t")
                if not tab:
                    problem = problem or "must be the name of an image, a tab, and its caption"
                value = {"file_name": name.strip(), "caption": caption.strip()}
                yield Row(place, None if problem else value, problem)
    except UnicodeError as error:
        raise DataError(f"{table}: not UTF-16, as its first bytes say: {error}") from error
    except OSError as error:
        raise DataError(f"{table}: cannot be read: {error.strerror or error}") from error
