"""Data files as they are opened: regular files, unfolded piece by piece where they are compressed.

A few bytes can unfold to more than any memory holds, so what comes out is counted beside what went
in.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from importlib import import_module
from typing import IO, TYPE_CHECKING, Any, BinaryIO

from mmalign.errors import DataError
from mmalign.safe import open_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from _typeshed import WriteableBuffer

MOST_FOLDED = 250
"""How many times larger than a file its text may be; of rows by people it is less than 20 times."""

FREE = 32 * 2**20
"""Bytes of text that may come of any file."""

_CHUNK = 2**17
_XZ_MEMORY = 2**27  # what a decoder may take, which the file itself asks for


def in_mib(size: int) -> str:
    """A number of bytes, for messages."""
    return f"{size:,} bytes" if size < 2**20 else f"{size / 2**20:,.1f} MiB"


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
    """What comes out of a compressed file, of which no more is made than is asked for."""

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
