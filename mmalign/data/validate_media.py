"""What prompts of checked files show and play: how much there is, and pictures that are broken.

That a clip or a sound is there was seen when its record was read. Whether it can be decoded is
found out where that is asked for, and before a run's first step, with the run's limits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmalign.data.example import Picture
from mmalign.data.fields import Problem
from mmalign.data.pictures import decode_all
from mmalign.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from PIL.Image import Image

    from mmalign.data.example import Example
    from mmalign.data.records import ProblemList, Record

    Decode = Callable[[Sequence[Example]], Sequence[Sequence[str]]]
    """Rows to what is wrong with the media of each; callers bring it, for data decodes no clips."""


class MediaBook:
    """Collects what the prompts of all records show, corrupted clips of their own included."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = dict.fromkeys(("clip", "picture", "sound"), 0)
        self.files: dict[str, set[Path | Picture]] = {name: set() for name in self.counts}
        self.pictures: list[tuple[Record, Picture]] = []
        self.rows: list[tuple[Record, Example]] = []

    def add(self, record: Record, row: Example) -> None:
        """Take in the media of one row, and of its candidates."""
        if row.media or any(c.media for c in row.candidates):
            self.rows.append((record, row))
        for media in (row.media, *(c.media for c in row.candidates)):
            if media is None:
                continue
            self._count("clip", [clip.path for clip in media.videos])
            self._count("picture", media.images)
            self._count("sound", [sound.path for sound in media.sounds])
            self.pictures += [(record, picture) for picture in media.images]

    def close(self, problems: ProblemList, decode: Decode | None = None) -> None:
        """Decode the pictures, in threads, and with `decode` all else, and add what is wrong."""
        if decode is not None:
            faults = decode([row for _, row in self.rows])
            for (record, _), texts in zip(self.rows, faults, strict=True):
                for text in texts:
                    problems.add(record, Problem("what is shown must be decodable", text))
            return
        self._add_absent(problems)
        found = decode_all((picture for _, picture in self.pictures), _seen)
        for record, picture in self.pictures:
            result = found[picture]
            if isinstance(result, DataError):
                problems.add(record, Problem("a picture must be decodable", str(result)))

    def _add_absent(self, problems: ProblemList) -> None:
        """Clips and sounds that are not there; pictures are opened anyway."""
        kinds = ("clip", "sound")
        absent = {file for kind in kinds for file in self.files[kind] if not _is_there(file)}
        for record, row in self.rows if absent else ():
            media = [row.media, *(c.media for c in row.candidates if c.media is not None)]
            for file in dict.fromkeys(file for item in media for file in item.files()):
                if file in absent:
                    what = "what is shown or played must be a media file that is there"
                    problems.add(record, Problem(what, f"there is no {file}"))

    def lines(self) -> list[str]:
        """How many media there are of each kind, and in how many files."""
        parts = [
            f"{_times(count, name)} ({_times(len(self.files[name]), 'file')})"
            for name, count in self.counts.items()
            if count
        ]
        return [f"  {'shown':8} " + ", ".join(parts)] if parts else []

    def _count(self, name: str, files: Sequence[Path | Picture]) -> None:
        self.counts[name] += len(files)
        self.files[name].update(files)


def _is_there(file: Path | Picture) -> bool:
    return isinstance(file, Picture) or file.is_file()


def _times(count: int, name: str) -> str:
    return f"{count} {name}{'s' * (count != 1)}"


def _seen(_: Image) -> None:
    """Nothing is kept of a picture that can be decoded."""
