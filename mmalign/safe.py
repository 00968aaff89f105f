"""Texts as a terminal may show them, files as they may be opened, and files written whole.

A name in a config or a data file may lead to a pipe or a device, which never ends, and a text in it
may hold what moves a terminal's cursor or turns the direction of its writing. A file that is
written in place is half a file where the process is killed.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

MOST_SHOWN = 1_800
"""Characters of a message; of longer ones the middle is left out."""

# C0 and C1 controls but line feed and tab, marks of direction, line separators, halves of
# surrogate pairs (which cannot be written at all), tags.
_MOVING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def escaped(text: str) -> str:
    """A text in which what would move a terminal is written out, e.g. as `\\x1b`."""
    return _MOVING.sub(_written, text)


def printable(text: str) -> str:
    """A name or value from a file on one line: all that has no shape of its own is written out."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _code(c) for c in text)


def message(text: str) -> str:
    """A message as it is shown: escaped, and without its middle where it is long."""
    text = escaped(text)
    if len(text) <= MOST_SHOWN:
        return text
    half = MOST_SHOWN // 2 - 40
    left_out = len(text) - 2 * half
    return f"{text[:half]} ... ({left_out:,} characters left out) ... {text[-half:]}"


def _written(found: re.Match[str]) -> str:
    return _code(found[0])


def _code(character: str) -> str:
    return ascii(character)[1:-1]


class NotAFileError(OSError):
    """A name that leads to a folder, a pipe or a device."""


def open_file(path: str | Path) -> BinaryIO:
    """A regular file, open for reading; a pipe or a device is refused without waiting for it.

    Raises:
        OSError: It is not there or cannot be read, or is no file.
    """
    try:
        # Without waiting for a writer where it is a pipe; files do not heed the flag.
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except ValueError as error:  # a zero byte in the name
        raise NotAFileError(errno.EINVAL, str(error), str(path)) from error
    try:
        mode = os.fstat(number).st_mode
        if not stat.S_ISREG(mode):
            raise NotAFileError(errno.EINVAL, f"is {_kind(mode)} and no file", str(path))
    except BaseException:
        os.close(number)
        raise
    return os.fdopen(number, "rb")


def read_bytes(path: str | Path, most: int) -> bytes:
    """The bytes of a regular file.

    Raises:
        OSError: As `open_file`, or there are more than `most` bytes.
    """
    with open_file(path) as stream:
        data = stream.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"has more than {most // 2**10:,} KiB", str(path))
    return data


@contextmanager
def replacing(path: str | Path, *, several: bool = False, flush: bool = False) -> Generator[Path]:
    """A temporary file name beside `path`; what was written there takes its place at the end.

    Readers see the old file or the whole new one. Where the block raises, `path` stays as it was
    and the temporary file is removed; one that a killed process left is removed first.

    Args:
        path: The file to write, in a folder that exists.
        several: Other processes may write the same file now; each has a temporary name of its own.
        flush: Bring it to the disk first, so that not even a power failure leaves an empty file.

    Raises:
        OSError: The disk is full, or the folder is not there or not writable.
    """
    path = Path(path)
    ending = f"{os.getpid()}.part" if several else "tmp"
    temporary = path.with_name(f".{path.name}.{ending}")
    temporary.unlink(missing_ok=True)
    try:
        yield temporary
        if flush:
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file, whole or not at all; see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")
