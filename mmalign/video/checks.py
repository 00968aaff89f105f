"""Whether the media of rows can be used: each file is decoded before a run depends on it.

What a run found whole, the next one only looks up; see `check_journal`.
"""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mmalign.data.example import Clip, Picture, Sound
from mmalign.data.pictures import open_picture
from mmalign.errors import DataError
from mmalign.video.check_journal import CheckJournal, Verdict
from mmalign.video.media import read_frames
from mmalign.video.sound import has_sound, read_sound, sound_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from mmalign.config import VideoConfig
    from mmalign.data.example import Example

log = logging.getLogger(__name__)

Reference = Clip | Picture | Sound
Use = tuple[Reference, bool]
"""What a row refers to, and whether its own sound is to be heard."""

_NAMED = 10  # files that an error names
_MOST_THREADS = 4  # each holds the frames of one clip


@dataclass(frozen=True, slots=True)
class MediaReport:
    """What is wrong with the media of some rows.

    Attributes:
        num_files: Distinct files that are referred to.
        num_decoded: References that were decoded; the others were known.
        broken: What is wrong with each file that cannot be decoded, by its name; the texts name it.
        silent: The same for files of clips that are to be heard and have no sound track.
        faults: What is wrong, by the use that leads there.
    """

    num_files: int
    num_decoded: int = 0
    broken: dict[str, str] = field(default_factory=dict[str, str])
    silent: dict[str, str] = field(default_factory=dict[str, str])
    faults: dict[Use, str] = field(default_factory=dict[Use, str])

    def of(self, row: Example, *, hears: bool) -> list[str]:
        """What is wrong with the media of a row; `hears` as the report was made."""
        found = (self.faults.get(use) for use in _uses(row, hears))
        return list(dict.fromkeys(text for text in found if text))


def usable_rows(
    parts: Sequence[Sequence[Example]],
    settings: VideoConfig,
    *,
    hears: bool,
    journal: Path | None = None,
) -> list[list[Example]]:
    """The rows whose media can be decoded, in order; logs what is left out, each file once.

    Args:
        parts: Rows to train on, rows held out; those without media are kept.
        settings: The `video` section, with the policies.
        hears: Whether the model hears.
        journal: See `check_media`.

    Raises:
        DataError: A file cannot be used and the policy for it is `stop`.
    """
    examples = [row for part in parts for row in part]
    report = check_media(examples, settings, hears=hears, journal=journal)
    stops = _stopping(report, settings)
    if stops:
        named = "\n".join(f"  {text}" for text in stops[:_NAMED])
        more = f"\n  and {len(stops) - _NAMED} more" if len(stops) > _NAMED else ""
        raise DataError(
            f"{len(stops)} of {report.num_files} media files cannot be used:\n{named}{more}\n"
            "Take their rows out, or set video.bad_media to drop, or video.no_sound to drop or mute"
        )
    for text in (*report.broken.values(), *report.silent.values()):
        log.warning("%s", text)
    hears = hears and settings.sound == "auto"
    kept = [[row for row in part if not report.of(row, hears=hears)] for part in parts]
    num_lost = len(examples) - sum(map(len, kept))
    if num_lost:
        num_bad = len(report.broken.keys() | report.silent.keys())
        log.warning(
            "%d of %d rows are left out for the %d of %d media files named above",
            num_lost, len(examples), num_bad, report.num_files,
        )  # fmt: skip
    return kept


def check_media(
    examples: Sequence[Example],
    settings: VideoConfig,
    *,
    hears: bool,
    journal: Path | None = None,
) -> MediaReport:
    """Decode everything that rows refer to, each reference once, in a few threads.

    Args:
        examples: Rows.
        settings: The `video` section. With `no_sound: mute` a clip without a track is no fault.
        hears: Whether the model hears, so that clips need their sound.
        journal: A file with what is known, written to; what it says is whole is not decoded.
    """
    hears = hears and settings.sound == "auto"
    uses = {use for row in examples for use in _uses(row, hears)}
    if not uses:
        return MediaReport(num_files=0)
    order = sorted(uses, key=str)  # the parts of a file follow each other
    with CheckJournal(journal, settings) as book:
        verdicts = {use: book.find(*use) for use in order}
        todo = [use for use in order if verdicts[use] is None]
        for use, verdict in _decoded(todo, settings):
            book.add(*use, verdict)
            verdicts[use] = verdict
    bad = {use: verdict for use, verdict in verdicts.items() if verdict and verdict.fault}
    report = MediaReport(
        num_files=len({reference.path for reference, _ in uses}),
        num_decoded=len(todo),
        faults={use: verdict.fault for use, verdict in bad.items()},
    )
    for (reference, _), verdict in bad.items():
        named = report.silent if verdict.silent else report.broken
        named.setdefault(str(_name(reference)), verdict.fault)
    for name in report.broken:
        report.silent.pop(name, None)  # named once
    return report


def _decoded(uses: Sequence[Use], settings: VideoConfig) -> Iterator[tuple[Use, Verdict]]:
    """The verdict on each use, in order, with a bar on a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    hidden = not console.is_terminal or not uses
    pool = ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1))
    try:
        results = pool.map(lambda use: _verdict(use[0], use[1], settings), uses)
        shown = track(results, "media", total=len(uses), console=console, disable=hidden)
        yield from zip(uses, shown, strict=True)
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C waits for no more than is being decoded


def _stopping(report: MediaReport, settings: VideoConfig) -> list[str]:
    broken = report.broken if settings.bad_media == "stop" else {}
    silent = report.silent if settings.no_sound == "stop" else {}
    return [*broken.values(), *silent.values()]


def _verdict(reference: Reference, heard: bool, settings: VideoConfig) -> Verdict:
    try:
        if isinstance(reference, Picture):
            open_picture(reference)
        elif isinstance(reference, Sound):
            read_sound(reference, settings)
        else:
            read_frames(reference, settings)
            if heard and not has_sound(reference.path):
                if settings.no_sound == "mute":
                    return Verdict()
                what = f"{reference.path}: has no sound track, and the model hears"
                return Verdict(what, silent=True)
            if heard:
                sound_of(reference, settings)
    except DataError as error:
        return Verdict(str(error))
    return Verdict()


def _name(reference: Reference) -> object:
    """What a fault is named by: a file; of a table, the cell."""
    return reference if isinstance(reference, Picture) else reference.path


def _uses(row: Example, hears: bool) -> Iterator[Use]:
    """What a row refers to; a clip is heard by a model that hears, unless a track is given."""
    for media in (row.media, *(candidate.media for candidate in row.candidates)):
        if media is None:
            continue
        heard = hears and not media.sounds
        yield from ((clip, heard) for clip in media.videos)
        yield from ((reference, False) for reference in (*media.images, *media.sounds))
        if media.change is not None and media.change.donor is not None:
            yield media.change.donor, heard
