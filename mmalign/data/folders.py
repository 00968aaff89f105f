"""Rows of a folder of pictures with captions: two paired folders, or single pictures.

    chosen/NAME.png  rejected/NAME.jpg     a pair: files of one name, in any format
    NAME.png                               one picture, where there is no chosen/ and rejected/

The caption of NAME stands in metadata.jsonl or captions.jsonl (`file_name`, and `prompt`,
`caption` or `text`; other keys go along), in captions.txt (NAME, a tab, the caption), or in
NAME.txt beside a picture. Where both pictures of a pair have one, each keeps its own.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmalign.data.picture_layouts import CAPTIONS
from mmalign.data.row import Row
from mmalign.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
SIDES = ("chosen", "rejected")
_TABLES = ("metadata.jsonl", "captions.jsonl", "captions.txt")
_NAMES = ("file_name", "file", "image", "name", "stem")
_NO_CAPTION = "has no caption: give NAME.txt beside a picture, metadata.jsonl or captions.txt"

Names = dict[str, list[str]]  # name without suffix -> files of that name


def folder_rows(folder: Path, read: Callable[[Path], Iterator[Row]]) -> Iterator[Row] | None:
    """The rows of a folder of pictures, or None when it is no such folder.

    Args:
        folder: Holds chosen/ and rejected/, or pictures.
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
    files = {side: _pictures(folder / side) for side in there or [""]}
    if not any(files.values()):
        if there:
            raise DataError(f"{folder}: chosen/ and rejected/ hold no pictures")
        return None
    return _rows(folder, files, _Captions(folder, read))


def _pictures(folder: Path) -> Names:
    """The picture files below a folder, by their path from it without suffix."""
    found: Names = defaultdict(list)
    for parent, folders, files in os.walk(folder):
        folders.sort()
        inside = os.path.relpath(parent, folder)
        for file in sorted(files):
            name, suffix = os.path.splitext(file)
            if suffix.lower() in SUFFIXES:
                found[os.path.normpath(os.path.join(inside, name))].append(
                    os.path.normpath(os.path.join(inside, file))
                )
    return dict(found)


def _rows(folder: Path, files: dict[str, Names], captions: _Captions) -> Iterator[Row]:
    yield from captions.problems
    names = sorted({name for found in files.values() for name in found})
    for name in names:
        place = f"{folder}:{name}"
        counts = {side: len(files[side].get(name, ())) for side in files}
        missing = next((side for side in files if counts[side] == 0), None)
        several = next((side for side in files if counts[side] > 1), None)
        if missing is not None:
            yield Row(place, None, f"has no picture of the same name in {missing}/")
        elif several is not None:
            where = f" in {several}/" if several else ""
            yield Row(place, None, f"has more than one picture of the same name{where}")
        else:
            paths = {side: os.path.join(side, files[side][name][0]) for side in files}
            yield captions.row(place, name, paths)
    for name in captions.left(names):
        yield Row(f"{folder}:{name}", None, "has a caption, but no picture")


@dataclass(slots=True)
class _Captions:
    """What is said of each picture, or of both of a pair."""

    folder: Path
    read: Callable[[Path], Iterator[Row]]
    said: dict[str, dict[str, dict[str, Any]]] = field(  # name -> side, or "" for both -> record
        default_factory=dict[str, "dict[str, dict[str, Any]]"]
    )
    problems: list[Row] = field(default_factory=list[Row])

    def __post_init__(self) -> None:
        tables = [name for name in _TABLES if (self.folder / name).is_file()]
        if len(tables) > 1:
            raise DataError(f"{self.folder}: has {' and '.join(tables)}; keep one of them")
        if tables:
            table = self.folder / tables[0]
            for row in self.read(table) if table.suffix == ".jsonl" else _lines(table):
                self._take(row)

    def _take(self, row: Row) -> None:
        record = dict(row.value or {})
        key = next((key for key in _NAMES if isinstance(record.get(key), str)), None)
        if row.value is None or key is None:
            problem = row.problem or f"names no picture; it must have `{_NAMES[0]}`"
            self.problems.append(Row(row.place, None, problem))
            return
        name = os.path.normpath(record.pop(key))
        side, _, inside = name.partition(os.sep)
        side, name = (side, inside) if side in SIDES and inside else ("", name)
        stem, suffix = os.path.splitext(name)
        self.said.setdefault(stem if suffix.lower() in SUFFIXES else name, {})[side] = record

    def row(self, place: str, name: str, paths: dict[str, str]) -> Row:
        """The row of one picture or pair."""
        said = self.said.get(name, {})
        value = {"id": name, **{k: v for record in said.values() for k, v in record.items()}}
        keys = {side: f"image_{side}" if side else "image" for side in paths}
        value = {k: v for k, v in value.items() if k not in CAPTIONS}
        value |= {keys[side]: path for side, path in paths.items()}
        try:
            own = {side: self._caption(said, side, path) for side, path in paths.items()}
        except (OSError, UnicodeDecodeError) as error:
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
        """The caption of one picture: its own in the table, that of both, or a file beside it."""
        for record in (said.get(side, {}), said.get("", {})):
            texts = [record[key] for key in CAPTIONS if isinstance(record.get(key), str)]
            if texts and texts[0].strip():
                return texts[0]
        beside = (self.folder / path).with_suffix(".txt")
        return beside.read_text(encoding="utf-8").strip() if beside.is_file() else ""

    def left(self, names: list[str]) -> list[str]:
        """Names with a caption and without a picture."""
        return sorted(set(self.said) - set(names))


def _lines(table: Path) -> Iterator[Row]:
    """The lines of captions.txt: a name, a tab, the caption."""
    try:
        lines = table.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{table}: cannot be read as UTF-8: {error}") from error
    for number, line in enumerate(lines, start=1):
        name, tab, caption = line.partition("\t")
        if not line.strip():
            continue
        if not tab:
            problem = "must be the name of a picture, a tab, and its caption"
            yield Row(f"{table}:{number}", None, problem)
        else:
            yield Row(f"{table}:{number}", {"file_name": name.strip(), "caption": caption.strip()})
