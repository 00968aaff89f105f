"""The folder that the paths in a data file start from, and that none of them may leave.

Data files and folders come from strangers: a path in one, or a link, must not reach other files of
this machine. What the user names is the user's own choice, and may be a link itself.
"""

from __future__ import annotations

import codecs
import os
from pathlib import Path

from mmalign.errors import DataError
from mmalign.safe import read_bytes


class Fence:
    """A folder, and whether files lie in it when all links are followed."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = os.path.realpath(folder)
        self._places = [_inside(self.folder)]
        parts = Path(self.folder).parts
        # The hub's cache keeps the files themselves in blobs/, beside snapshots/ of links to them.
        if "snapshots" in parts:
            home = Path(*parts[: parts.index("snapshots")])
            self._places.append(_inside(str(home / "blobs")))

    def holds(self, path: str) -> bool:
        """Whether a path without links is that of something inside."""
        return path.startswith(tuple(self._places))

    def require(self, file: Path) -> Path:
        """The file, which must lie inside.

        Raises:
            DataError: A link or a name leads elsewhere.
        """
        if not self.holds(os.path.realpath(file)):
            raise DataError(
                f"{file}: leads out of {self.folder}, and only files inside it are read; copy the "
                "file there"
            )
        return file

    def read_text(self, file: Path, most: int) -> str:
        """The text of a small file inside.

        Raises:
            DataError: It leads elsewhere, cannot be read, is no UTF-8, or has over `most` bytes.
        """
        try:
            return as_text(read_bytes(self.require(file), most))
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: not UTF-8 ({error}); save the file as UTF-8") from error


def as_text(data: bytes) -> str:
    """UTF-8, or UTF-16 where a byte order mark says so; without the mark."""
    is_wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return data.decode("utf-16" if is_wide else "utf-8-sig")


def _inside(folder: str) -> str:
    return folder.rstrip(os.sep) + os.sep
