"""Files that stay open for reading in small pieces."""

from __future__ import annotations

import os
from collections import OrderedDict
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

MOST = 128
"""Files kept open, those used last."""


class OpenFiles:
    """Files open for reading: opening one costs more than reading an entry.

    Reads name their offset, so that threads and forked processes may share an open file. A pickled
    copy, as spawned processes get, starts without any.
    """

    def __init__(self) -> None:
        self._open: OrderedDict[Path, _Descriptor] = OrderedDict()

    def read(self, path: Path, offset: int, count: int) -> bytes:
        """`count` bytes from `offset` on, fewer where the file ends."""
        if not hasattr(os, "pread"):  # Windows
            with path.open("rb") as stream:
                stream.seek(offset)
                return stream.read(count)
        file = self._open.get(path)
        if file is None:
            file = self._open[path] = _Descriptor(path)
            if len(self._open) > MOST:
                self._open.popitem(last=False)  # closed when the last thread is done with it
        else:
            with suppress(KeyError):  # closed by another thread just now
                self._open.move_to_end(path)
        return os.pread(file.number, count, offset)

    def close(self, path: Path) -> None:
        """Forget a file."""
        self._open.pop(path, None)

    def clear(self) -> None:
        """Forget all files."""
        self._open.clear()

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
