"""A copy of this process that does one thing, and may be killed at it."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass
class Child:
    """A fork of this process; what it prints goes to a file."""

    pid: int
    status: int | None = None

    def poll(self) -> bool:
        """Whether it has ended."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status is not None

    def wait(self, seconds: float) -> int:
        """Its exit status; -9 where it took too long and was killed."""
        end = time.monotonic() + seconds
        while not self.poll():
            if time.monotonic() > end:
                self.kill()
            time.sleep(0.005)
        assert self.status is not None
        return self.status

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send it a signal, if it is still there."""
        if not self.poll():
            os.kill(self.pid, number)


def fork(work: Callable[[], Any], said: str | os.PathLike[str], *, mebibytes: int = 4096) -> Child:
    """Do something in a copy of this process.

    Args:
        work: What to do; its status is 0 where it returns, 2 where mmalign refuses, 1 otherwise.
        said: The file that its output goes to.
        mebibytes: That it may ask for beyond what is in use.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return Child(pid)
    status = 1
    try:
        target = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(target, 1)
        os.dup2(target, 2)
        sys.stdout = sys.stderr = os.fdopen(target, "w", encoding="utf-8", errors="replace")
        with open("/proc/self/statm", encoding="ascii") as pages:
            used = int(pages.read().split()[0]) * resource.getpagesize()
        most = used + mebibytes * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        status = _status(work)
        sys.stdout.flush()
    finally:
        os._exit(status)
    raise AssertionError("a fork came back")


def _status(work: Callable[[], Any]) -> int:
    import traceback

    from mmalign.errors import MmalignError

    try:
        work()
    except MmalignError as error:
        print(f"{type(error).__name__}: {error}")
        return 2
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
