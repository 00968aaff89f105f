"""Memory that pictures take while they are decoded, of all threads of a process together."""

from __future__ import annotations

import os
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Generator

    from PIL.Image import Image

MOST = 480 * 2**20
"""Bytes. One picture that would take more is refused; several wait for each other."""

_WORKING = {"WEBP": 8, "AVIF": 8}  # bytes a pixel that decoders take besides
_PROGRESSIVE = 6  # of a JPEG: the coefficients of all its passes
_DEEP = {"1": 1, "L": 1, "P": 1, "LA": 4, "PA": 4, "I;16": 2, "I;16B": 2, "I;16L": 2}
_RGB = 4  # bytes a pixel as the library keeps it


def bytes_a_pixel(image: Image, *, turned: bool) -> int:
    """What it takes to decode an opened picture and make upright RGB of it.

    Args:
        image: Opened, not yet decoded.
        turned: Whether its metadata say that it lies on a side.
    """
    own = _DEEP.get(image.mode, 4)
    is_progressive = image.format == "JPEG" and "progressive" in image.info
    decoding = own + (_PROGRESSIVE if is_progressive else _WORKING.get(image.format or "", 0))
    is_rgb = image.mode == "RGB" and not image.has_transparency_data
    return max(decoding, 2 * own if turned else own, own if is_rgb else own + _RGB)


class Room:
    """How much is taken now; who finds too little waits."""

    def __init__(self) -> None:
        self.reset()
        os.register_at_fork(after_in_child=self.reset)

    def reset(self) -> None:
        """Nothing is taken; also what a forked process begins with, which has one thread."""
        self._taken = 0
        self._change = threading.Condition()

    @contextmanager
    def take(self, size: int) -> Generator[None]:
        """Take so many bytes for a while; who is alone need not wait."""
        change = self._change
        with change:
            change.wait_for(lambda: not self._taken or self._taken + size <= MOST)
            self._taken += size
        try:
            yield
        finally:
            with change:
                self._taken -= size
                change.notify_all()
