"""One writer a folder: a lock that the system takes back when its process ends, however it ends.

filelock's lock is of the open file, so that the loader workers of a killed run would hold it on,
and it does not say who has it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from mmalign.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

LOCK = ".mmalign.lock"
"""Name of the file in a folder that is being written to; it says by whom."""

_TRIES = 50  # to make a folder that somebody removes
_EVERY = 0.2  # seconds between two looks at a lock that is waited for
_TAKEN = (errno.EACCES, errno.EAGAIN)
_held: set[str] = set()  # by this process: the system does not tell its own threads apart

log = logging.getLogger("mmalign.data")


@contextmanager
def only_writer(folder: Path, what: str, *, wait: bool = False) -> Generator[None]:
    """Nobody else who asks writes into the folder meanwhile.

    The folder is made, and removed again where nothing was put into it. What a process that died
    has left of its lock is taken over, and said.

    Args:
        folder: To write into.
        what: What it is, for messages, e.g. "output".
        wait: Until whoever writes there has ended; else that is an error.

    Raises:
        ConfigError: Another process writes there, or the folder cannot be written to.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    place = os.path.realpath(folder)
    descriptor = _locked(folder, place, what, wait=wait)
    _held.add(place)
    try:
        _sign(descriptor, f"{what} {folder}")
        yield
    finally:
        with suppress(OSError):  # a disk that has become read-only
            (folder / LOCK).unlink()  # before it is let go, so that nobody gets one without a name
        os.close(descriptor)
        _held.discard(place)
        for path in made:
            try:
                path.rmdir()
            except OSError:  # not empty
                break


def _locked(folder: Path, place: str, what: str, *, wait: bool) -> int:
    """The open and locked file of a folder."""
    said = False
    while True:
        descriptor = -1 if place in _held else _opened(folder, what)
        if descriptor >= 0 and _lock(descriptor, folder):
            if _is_named(descriptor, folder / LOCK):
                return descriptor
            os.close(descriptor)  # its holder removed it and ended in this moment
            continue
        owner = "this process"  # whose lock would end if it opened the file again
        if descriptor >= 0:
            owner = _owner(descriptor) or "another process"
            os.close(descriptor)
        if not wait:
            raise ConfigError(
                f"{what} {folder}: {owner} is writing there. Wait until it has ended, stop it, or "
                f"choose another {what}"
            )
        if not said:
            log.warning("%s %s: waiting for %s, which is writing there", what, folder, owner)
            said = True
        time.sleep(_EVERY)


def _opened(folder: Path, what: str) -> int:
    tries = 0
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            # A run that was refused may just have removed the folder; in /proc none can be made.
            if isinstance(error, FileNotFoundError) and tries < _TRIES:
                tries += 1
                time.sleep(0.01)
                continue
            raise ConfigError(
                f"{what} {folder} cannot be written to: {error.strerror}. Choose another {what}, "
                "or make it writable"
            ) from error


def _lock(descriptor: int, folder: Path) -> bool:
    """Whether the lock is had; it belongs to the process alone and not to its loader workers."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            return False
        log.warning(
            "%s: this file system keeps no locks (%s), so a second run that writes there would not "
            "be noticed", folder, error.strerror,
        )  # fmt: skip
    return True


def _is_named(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def _sign(descriptor: int, where: str) -> None:
    """Write down who holds the lock, after saying who held it and never let go."""
    if before := _owner(descriptor):
        log.warning("%s: taken over from %s, which ended without finishing", where, before)
    mine = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    with suppress(OSError):  # a full disk: the lock holds without it
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(mine).encode(), 0)


def _owner(descriptor: int) -> str:
    """Who has signed a lock, in words; "" where nobody has."""
    try:
        said: Any = json.loads(os.pread(descriptor, 1000, 0))
        number, host, since = int(said["pid"]), str(said["host"])[:64], str(said["since"])[:32]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    if not (host + since).isprintable():
        return f"process {number}"
    return f"process {number} on {host} (since {since})"
