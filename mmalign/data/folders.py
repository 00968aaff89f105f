"""Rows of a folder of images with captions: two paired folders, or single images.

    chosen/NAME.png  rejected/NAME.jpg     a pair: files of one name, in any format
    NAME.png                               one image, where there is no chosen/ and rejected/

The caption of NAME stands in metadata.jsonl or captions.jsonl (`file_name`, and `prompt`,
`caption` or `text`; other keys go along), in captions.txt (NAME, a tab, the caption), or in
NAME.txt or NAME.caption beside an image. Where both images of a pair have one, each keeps its
own. Files and folders whose names begin with a dot are of the system's and passed over.
"""

from __future__ import annotations

import codecs
import io
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mmalign.data.example import Row
from mmalign.data.media_layouts import CAPTIONS
from mmalign.data.opening import Fence, as_text, text_lines
from mmalign.errors import DataError
from mmalign.safe import open_file

SUFFIXES = (
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

log = logging.getLogger("mmalign.data")

Names = dict[str, list[str]]  # name without suffix -> files of that name


def folder_rows(folder: Path, read: Callable[[Path], Iterator[Row]]) -> Iterator[Row] | None:
    """The rows of a folder of images, or None when it is not such a folder.

    Args:
        folder: Holds chosen/ and rejected/, or images.
        read: Reads a JSONL file.

    Raises:
        DataError: One of chosen/ and rejected/ is missing, or several files hold captions.
    """
    there = [side for side in SIDES if (folder / side).is_dir()]
    if (folder / "dataset_dict.json").exists() or (folder / "dataset_info.json").exists():
        return None
    if len(there) == 1:
        other = SIDES[there[0] == "chosen"]
        raise DataError(f"{folder}: has {there[0]}/, but no {other}/ beside it")
    files = {side: _files(folder / side, SUFFIXES + UNREAD) for side in there or [""]}
    if not any(files.values()):
        if there:
            raise DataError(f"{folder}: chosen/ and rejected/ hold no images")
        return None
    _name_lonely_captions(folder, files)
    return _rows(folder, files, _Captions(folder, read))


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
        unread = _unread(files, name)
        counts = {side: len(files[side].get(name, ())) for side in files}
        missing = next((side for side in files if counts[side] == 0), None)
        several = next((side for side in files if counts[side] > 1), None)
        if unread:
            yield Row(place, None, f"{unread} is of a format that is not read: convert it to png")
        elif missing is not None:
            yield Row(place, None, f"has no image of the same name in {missing}/")
        elif several is not None:
            where = f" in {several}/" if several else ""
            yield Row(place, None, f"has more than one image of the same name{where}")
        else:
            paths = {side: os.path.join(side, files[side][name][0]) for side in files}
            yield captions.row(place, name, paths)
    for name in captions.left(names):
        yield Row(f"{folder}:{name}", None, "has a caption, but no image")


def _unread(files: dict[str, Names], name: str) -> str:
    """An image of another format with no other of its name; "" where all can be read."""
    for side, found in files.items():
        there = found.get(name, [])
        read = [file for file in there if os.path.splitext(file)[1].lower() in SUFFIXES]
        if there and not read:
            return os.path.join(side, there[0])
        found |= {name: read} if there else {}
    return ""


class _Captions:
    """What is said of each image, or of both of a pair."""

    def __init__(self, folder: Path, read: Callable[[Path], Iterator[Row]]) -> None:
        self.folder, self.fence = folder, Fence(folder)
        self.said: dict[str, dict[str, dict[str, Any]]] = {}  # name -> side, "" for both -> record
        self.problems: list[Row] = []
        tables = [name for name in _TABLES if (folder / name).is_file()]
        if len(tables) > 1:
            raise DataError(f"{folder}: has {' and '.join(tables)}; keep one of them")
        for table in tables:
            file = self.fence.require(folder / table)
            for row in read(file) if file.suffix == ".jsonl" else _lines(file):
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
        is_file = suffix.lower() in SUFFIXES + UNREAD
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

    def left(self, names: list[str]) -> list[str]:
        """Names with a caption and without an image."""
        return sorted(set(self.said) - set(names))


def _lines(table: Path) -> Iterator[Row]:
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
