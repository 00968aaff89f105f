"""Data files as they are opened: unfolded piece by piece, and never outside their folder."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from importlib import import_module
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO

from mmalign.errors import DataError
from mmalign.safe import open_file, read_bytes

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


class Fence:
    """A folder that paths in a data file start from, and whether files lie in it, links followed.

    Data files and folders come from strangers: a path in one, or a link, must not reach other files
    of this machine. What the user names is the user's own choice, and may be a link itself.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = os.path.realpath(folder)
        places = [self.folder]
        parts = Path(self.folder).parts
        # The hub's cache keeps the files themselves in blobs/, beside snapshots/ of links to them.
        if "snapshots" in parts:
            places.append(os.path.join(*parts[: parts.index("snapshots")], "blobs"))
        self._places = tuple(place.rstrip(os.sep) + os.sep for place in places)

    def holds(self, path: str) -> bool:
        """Whether a path without links is that of something inside."""
        return path.startswith(self._places)

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


def text_lines(path: Path, handle: IO[bytes], most: int) -> Iterator[tuple[str, str, str]]:
    """Place, text and problem of every line that is not blank.

    Args:
        path: For places.
        handle: Of UTF-8; a line that is not has a problem.
        most: Bytes of a line.

    Raises:
        DataError: A line is longer.
    """
    for number, line in enumerate(iter(partial(handle.readline, most), b""), start=1):
        place = f"{path}:{number}"
        if len(line) == most:
            raise DataError(
                f"{place}: the line is longer than {most // 2**20} MiB; a text file has one prompt "
                "or caption a line"
            )
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            yield place, "", f"not UTF-8 ({error}); save the file as UTF-8"
            continue
        if text.strip():
            yield place, text, ""


MOST_FOLDED = 250
"""How many times larger than a file its text may be; of rows by people it is less than 20 times."""

FREE = 32 * 2**20
"""Bytes of text that may come of any file."""

_CHUNK = 2**17
_XZ_MEMORY = 2**27  # what a decoder may take, which the file itself asks for


def amount(size: int) -> str:
    """A number of bytes for people: 12,345 bytes, 1.5 MiB, and from ten of them on 10.0 GiB."""
    if size < 2**20:
        return f"{size:,} bytes"
    return f"{size / 2**20:,.1f} MiB" if size < 10 * 2**30 else f"{size / 2**30:,.1f} GiB"


class _Xz:
    """The text of an xz file, whose decoder gets no more memory than `_XZ_MEMORY`."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decoder = lzma.LZMADecompressor(memlimit=_XZ_MEMORY)

    def read(self, size: int) -> bytes:
        """Some bytes, at most `size`; none at the end."""
        while True:
            data = b""
            if self._decoder.eof:  # several streams may follow each other
                data = self._decoder.unused_data.lstrip(b"\0") or self._file.read(_CHUNK)
                if not data.strip(b"\0"):
                    return b""
                self._decoder = lzma.LZMADecompressor(memlimit=_XZ_MEMORY)
            elif self._decoder.needs_input:
                data = self._file.read(_CHUNK)
                if not data:
                    raise EOFError("it is cut off")
            found = self._decoder.decompress(data, size)
            if found:
                return found


def _zst(file: BinaryIO) -> Any:
    arrow: Any = import_module("pyarrow")
    return arrow.CompressedInputStream(arrow.PythonFile(file, mode="r"), "zstd")


_READERS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file, mode="rb"),
    ".bz2": bz2.BZ2File,
    ".xz": _Xz,
    ".zst": _zst,
}

FOLDED = tuple(_READERS)
"""Endings of compressed files."""

ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""What reading a damaged file raises."""


class _Unfolded(io.RawIOBase):
    """What comes out of a compressed file, of which no more is made than is asked for.

    A few bytes can unfold to more than any memory holds, so what comes out is counted beside what
    went in.
    """

    def __init__(self, path: Path, file: BinaryIO, reader: Any) -> None:
        super().__init__()
        self._path, self._file, self._reader = path, file, reader
        self._count = 0

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Fill a buffer; returns the bytes read."""
        view = memoryview(buffer).cast("B")
        data: bytes = self._reader.read(len(view))
        view[: len(data)] = data
        self._count += len(data)
        if self._count > FREE and self._count > MOST_FOLDED * max(self._file.tell(), 1):
            raise DataError(
                f"{self._path}: unfolds to more than {MOST_FOLDED} times its size, which rows of "
                "text never do; unpack it yourself if it is what you want"
            )
        return len(data)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


def open_data(path: Path) -> IO[bytes]:
    """A data file, open for reading its text.

    Raises:
        OSError: It cannot be read, or is a pipe or a device.
    """
    file = open_file(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        return file
    return io.BufferedReader(_Unfolded(path, file, reader(file)), _CHUNK)


MOST = 128
"""Files kept open, those used last."""


class OpenFiles:
    """Files open for reading: opening one costs more than reading an entry.

    Reads name their offset, so that threads and forked processes may share an open file. A pickled
    copy, as spawned processes get, starts without any.
    """

    def __init__(self) -> None:
        # Unlike the one of cachetools, this cache needs no lock, which a fork might copy locked.
        self._opened = lru_cache(MOST)(_Descriptor)

    def read(self, path: Path, offset: int, count: int) -> bytes:
        """`count` bytes from `offset` on, fewer where the file ends."""
        file = self._opened(path)  # held: another thread may make the cache forget it
        return os.pread(file.number, count, offset)

    def clear(self) -> None:
        """Forget all files; each is closed when the last thread is done with it."""
        self._opened.cache_clear()

    def __reduce__(self) -> tuple[type[OpenFiles], tuple[()]]:
        return (OpenFiles, ())


class _Descriptor:
    """A file open for reading, closed with its last use."""

    def __init__(self, path: Path) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)
