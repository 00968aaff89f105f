"""Files of a converted data file: where they lie from it, and copies of those that lie elsewhere.

Pictures that are responses are copied as they are; clips and sounds, which are large, get a second
name for the same bytes (a hard link) where the disk allows it, and are copied where not.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmalign.data.example import Example, Picture
from mmalign.data.fields import as_list, as_object
from mmalign.data.parse_media import KINDS, MEDIA_KEYS
from mmalign.data.pictures import PictureRoot, picture_bytes

_STARTS = {
    b"\xff\xd8": ".jpg",
    b"\x89PNG": ".png",
    b"RIFF": ".webp",
    b"GIF8": ".gif",
    b"BM": ".bmp",
    b"II*\0": ".tif",
    b"MM\0*": ".tif",
}
"""How files of the formats that are read begin."""


class PictureCopies:
    """Paths of pictures as a data file in `target`'s folder names them."""

    def __init__(self, target: Path, source: PictureRoot) -> None:
        """Copies go to TARGET_pictures/ beside the file, in the order of folders of `source`."""
        self.parent = Path(os.path.realpath(target.parent))
        self.folder = self.parent / f"{target.stem}_pictures"
        self._is_new = not self.folder.exists()
        self._source = source
        self._linked_files: set[Path] = set()

    def columns(self, example: Example) -> dict[str, Any]:
        """The canonical picture keys of a row; none for texts.

        Raises:
            DataError: A picture cannot be read.
        """
        responses = [c.response for c in example.candidates]
        pictures = [picture for picture in responses if isinstance(picture, Picture)]
        if not pictures:
            return {}
        paths = [self._path(picture) for picture in pictures]
        if example.kind == "pair":
            return {"image_chosen": paths[0], "image_rejected": paths[1]}
        return {"images": paths} if example.kind == "list" else {"image": paths[0]}

    def media(self, record: Mapping[str, Any], example: Example) -> dict[str, Any]:
        """The canonical media keys of a row of texts, with paths from the new file."""
        if any(isinstance(candidate.response, Picture) for candidate in example.candidates):
            return {}
        return {key: self._named(record[key]) for key in MEDIA_KEYS if record.get(key) is not None}

    def _named(self, value: Any) -> Any:
        items, parts = as_list(value), as_object(value)
        if items is not None:
            return [self._named(item) for item in items]
        if parts is not None:
            key = next(name for name in ("path", *KINDS) if isinstance(parts.get(name), str))
            return {**parts, key: self._named(parts[key])}
        found = value if isinstance(value, Picture) else self._source.find(str(value))
        if not isinstance(found, Picture):
            return value
        return self._path(found) if found.row >= 0 else self._linked(found.path)

    def _linked(self, file: Path) -> str:
        if file.is_relative_to(self.parent):
            return file.relative_to(self.parent).as_posix()
        copy = self.folder / self._inside(file)
        if file not in self._linked_files and _make_room(copy, file):
            try:
                os.link(file, copy)
            except OSError:  # another disk, or one without hard links
                shutil.copyfile(file, copy)
            self._linked_files.add(file)
        return copy.relative_to(self.parent).as_posix()

    def _path(self, picture: Picture) -> str:
        file = picture.path
        if picture.row < 0 and file.is_relative_to(self.parent):
            return file.relative_to(self.parent).as_posix()
        data = picture_bytes(picture)
        inside = self._inside(Path(os.path.realpath(file)))
        if picture.row >= 0:
            name = f"{picture.row:06d}-{picture.column}{_suffix(data)}"
            inside = inside.with_suffix("") / name
        copy = self.folder / inside
        if _make_room(copy, file):
            copy.write_bytes(data)
        return copy.relative_to(self.parent).as_posix()

    def _inside(self, file: Path) -> Path:
        root = self._source.folder
        is_below = root is not None and file.is_relative_to(root)
        return file.relative_to(root) if root and is_below else Path(file.name)

    def remove(self) -> None:
        """Take back what was copied, unless the folder had been there before."""
        if self._is_new:
            shutil.rmtree(self.folder, ignore_errors=True)


def _make_room(copy: Path, file: Path) -> bool:
    """Take away what an earlier run left in a copy's place; False where the file itself is there.

    What was left may be another name of a source, which must not be written into.
    """
    if os.path.realpath(copy) == os.path.realpath(file):  # the folder of copies is a link
        return False
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.unlink(missing_ok=True)
    return True


def _suffix(data: bytes) -> str:
    if data[4:12] in (b"ftypavif", b"ftypavis"):
        return ".avif"
    return next((suffix for start, suffix in _STARTS.items() if data.startswith(start)), ".bin")
