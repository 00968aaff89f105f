"""Long jobs: one writer a folder, passes over records that can be resumed, and progress."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mmalign.data.fields import as_object
from mmalign.data.pictures import PictureRoot
from mmalign.data.records import Record, json_line, picture_root, read_records
from mmalign.errors import ConfigError, DataError
from mmalign.safe import replacing

if TYPE_CHECKING:
    from rich.progress import Progress

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

    The folder is made, and removed again where nothing was put into it. The system takes the lock
    back when its process ends, however it ends; what that has left is taken over, and said.

    Args:
        folder: To write into.
        what: What it is, for messages, e.g. "output".
        wait: Until whoever writes there has ended; else that is an error.

    Raises:
        ConfigError: Another process writes there, or the folder cannot be written to.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    place = os.path.realpath(folder)
    # filelock's lock is of the open file, so that loader workers of a killed run would hold it on,
    # and it does not say who has it.
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


def _opened(folder: Path, what: str, tries: int = _TRIES) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        # A run that was refused may just have removed the folder; in /proc none can be made.
        if isinstance(error, FileNotFoundError) and tries:
            time.sleep(0.01)
            return _opened(folder, what, tries - 1)
        raise ConfigError(
            f"{what} {folder} cannot be written to: {error.strerror}. Choose another {what}, or "
            "make it writable"
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
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    mine = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
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


NAMED = 8
"""How many of the rows that were left out a message names."""

OnProgress = Callable[[int, int], Any]
"""Told how many more rows are done, and how many there are in all."""


def no_progress(done: int, total: int) -> None:
    """Where nobody looks on."""


@dataclass(frozen=True, slots=True)
class Source:
    """Records to go through, as `read_records` takes them.

    Attributes:
        path: File, saved dataset or hub name.
        split: Only these rows.
        layout: Of its records; None to recognize it.
        pictures: Where paths of images start; None: the folder of `path`.
        drop_bad: Leave out records with problems instead of stopping.
    """

    path: str
    split: str | None = None
    layout: str | None = None
    pictures: Path | None = None
    drop_bad: bool = False

    def records(self) -> Iterator[Record]:
        """Its records, in order."""
        return read_records(self.path, split=self.split, layout=self.layout, pictures=self.pictures)

    def facts(self) -> dict[str, Any]:
        """What tells it from another, and from itself before a change."""
        file = Path(self.path)
        state = file.stat() if file.is_file() else None
        return {
            "source": self.path,
            "source_size": state and state.st_size,
            "source_time": state and state.st_mtime_ns,
            "split": self.split,
            "layout": self.layout,
            "pictures": None if self.pictures is None else str(self.pictures),
            "drop_bad": self.drop_bad,
        }

    def root(self) -> PictureRoot:
        """Where paths of its images start."""
        return picture_root(Path(self.path), self.pictures)


def require_new(*files: Path) -> None:
    """Refuse to write over files, unless an interrupted pass to the first of them goes on.

    Raises:
        DataError: One is there, and the first has no journal.
    """
    found = next((file for file in files if file.exists()), None)
    if found is not None and not _journal_of(files[0]).exists():
        raise DataError(f"{found}: already exists; delete it, or give another --out")


@contextmanager
def resumable(out: Path, asked: Mapping[str, Any]) -> Generator[Journal]:
    """The journal of a pass over records that writes `out` at the end of the block.

    Each result goes to the journal at once, so that a killed pass goes on where it was.

    Args:
        out: The file to write; its folder is made. The journal is OUT.partial.
        asked: What results depend on, so that others are not mixed with these.

    Raises:
        DataError: The journal there is of another pass, or damaged.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    journal = Journal(_journal_of(out), dict(asked))
    try:
        yield journal
    except BaseException:
        journal.close()
        if not journal.done:  # nothing to go on from: the next call may ask something else
            journal.path.unlink(missing_ok=True)
        raise
    journal.close()
    journal.path.unlink(missing_ok=True)  # the job is done


def _journal_of(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSON object a line; the file is there whole, and on the disk, or not at all.

    Args:
        path: The file; its folder is made.
        records: JSON objects; what JSON does not know is written as text.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        replacing(path, flush=True) as temporary,
        temporary.open("w", encoding="utf-8") as handle,
    ):
        handle.writelines(map(json_line, records))


def first_few(texts: Sequence[str], most: int = NAMED) -> list[str]:
    """The first of some texts, and how many more there are."""
    more = len(texts) - most
    return [*texts[:most], *([f"and {more} more"] if more > 0 else [])]


class Journal:
    """A JSONL file of results by id, appended to as they come.

    The first line says what was asked. A last line that is cut off, as a killed process leaves it,
    is taken back; its row is done again.
    """

    def __init__(self, path: Path, asked: dict[str, Any]) -> None:
        """Open, or begin, the journal of a job.

        Raises:
            DataError: The file is the journal of another job, or damaged.
        """
        self.path = path
        self.done: dict[str, dict[str, Any]] = {}
        lines = self._whole_lines()
        if lines:
            before, now = _given(as_object(lines[0]["asked"]) or {}), _given(asked)
            if before != now:
                keys = sorted(key for key in now if before.get(key) != now[key])
                raise DataError(
                    f"{path}: was begun for something else ({', '.join(keys) or 'another job'} "
                    "differs). Run that command again to end it, or delete the file"
                )
            self.done = {line.pop("id"): line for line in lines[1:]}
        self._handle = path.open("a", encoding="utf-8")
        if not lines:
            self._write([{"asked": asked}])

    def _whole_lines(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        data = self.path.read_bytes()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            with self.path.open("r+b") as handle:
                handle.truncate(end)
        lines: list[dict[str, Any]] = []
        for number, text in enumerate(data[:end].splitlines(), start=1):
            try:
                line = as_object(json.loads(text))
                if line is None or ("asked" if number == 1 else "id") not in line:
                    raise ValueError
            except ValueError:
                raise DataError(f"{self.path}:{number}: is damaged; delete the file") from None
            lines.append(line)
        return lines

    @property
    def broken(self) -> dict[str, str]:
        """Why a row has no result, by id."""
        return {key: line["broken"] for key, line in self.done.items() if "broken" in line}

    @property
    def finished(self) -> set[str]:
        """What need not be done again; a file that was broken may have been repaired."""
        return self.done.keys() - self.broken.keys()

    def add(self, results: dict[str, dict[str, Any]]) -> None:
        """Write down the results of some ids."""
        self._write([{"id": key, **result} for key, result in results.items()])
        self.done |= results

    def _write(self, lines: list[dict[str, Any]]) -> None:
        self._handle.writelines(map(json_line, lines))
        self._handle.flush()

    def add_broken(self, key: str, error: DataError) -> None:
        """Write down why a row has no result."""
        self.add({key: {"broken": str(error)}})

    def close(self) -> None:
        """Close the file; it stays."""
        self._handle.close()


def _given(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked, without what is left at nothing: a journal from before need not name it."""
    return {key: value for key, value in asked.items() if value is not None and value is not False}


T = TypeVar("T")

DELAY = 1.0  # seconds before a bar appears
_LOOK_EVERY = 0.1  # seconds between two looks at how far it is

_busy = False  # whether a bar is there: a terminal shows one at a time


def track(
    items: Iterable[T], what: str, *, total: int | None = None, unit: str = "rows", size: int = 1
) -> Generator[T]:
    """The items, unchanged; where they take longer than `DELAY`, a bar on the terminal meanwhile.

    Args:
        items: Anything to go through.
        what: What is being done, e.g. "reading pairs.jsonl".
        total: How many units there are; None where nobody knows.
        unit: What is counted.
        size: Units of one item.
    """
    if not _is_watched():
        yield from items
        return
    shown: Progress | None = None
    began = looked = time.monotonic()
    done = 0
    with ExitStack() as stack:
        for item in items:
            yield item
            done += size
            now = time.monotonic()
            if now - looked < _LOOK_EVERY:
                continue
            looked = now
            if shown is None and now - began > DELAY and not _busy:
                shown = stack.enter_context(_bar(what, total))
            if shown is not None:
                count = f"{done:,} {unit}" if total is None else f"{min(done, total):,}/{total:,}"
                shown.update(shown.task_ids[0], completed=done, count=count)


def duration(seconds: float) -> str:
    """Seconds for people: 40 s, 12 min, 3 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


@contextmanager
def waiting(what: str) -> Generator[None]:
    """Say on the terminal what is being waited for, where nothing can be counted."""
    with ExitStack() as stack:
        if _is_watched() and not _busy:
            stack.enter_context(_bar(what, None))
        yield


def is_main_process() -> bool:
    """Whether this is the process that reports and writes, where several train one model."""
    return os.environ.get("RANK", "0") == "0"


def _is_watched() -> bool:
    """Whether somebody looks on, and this is the process that reports."""
    return sys.stderr.isatty() and is_main_process()


@contextmanager
def _bar(what: str, total: int | None) -> Generator[Progress]:
    global _busy
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        SpinnerColumn() if total is None else BarColumn(bar_width=20),
        TextColumn("{task.fields[count]}"),
        TimeElapsedColumn(),
    )
    _busy = True
    try:
        with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
            shown.add_task(what, total=total, count="")
            yield shown
    finally:
        _busy = False
