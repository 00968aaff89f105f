"""Ctrl-C and SIGTERM: finish the step, save, and say how to go on; the second one quits at once."""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import FrameType, TracebackType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Context manager that turns the first SIGINT or SIGTERM into a wish the loop can read."""

    def __init__(self) -> None:
        self.wanted = False
        self._before: dict[int, object] = {}
        self._process = os.getpid()

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python's rule for handlers
            self._before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a data worker inherited this handler; the loop decides
            return
        self.wanted = True
        self._restore()  # the next signal has its usual effect
        # os.write, because a handler may interrupt a print that is half way through its buffer.
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: saving after this step; once more quits at once\n".encode())
