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
from mmalign.video.seen import Glimpse, Seen
from mmalign.video.sound import has_sound, read_sound, sound_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
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
        seen: Sizes, times and lengths of what is whole, by its use.
    """

    num_files: int
    num_decoded: int = 0
    broken: dict[str, str] = field(default_factory=dict[str, str])
    silent: dict[str, str] = field(default_factory=dict[str, str])
    faults: dict[Use, str] = field(default_factory=dict[Use, str])
    seen: dict[Use, Seen] = field(default_factory=dict[Use, Seen])

    def of(self, row: Example, *, hears: bool) -> list[str]:
        """What is wrong with the media of a row; `hears` as the report was made."""
        found = (self.faults.get(use) for use in uses_of(row, hears=hears))
        return list(dict.fromkeys(text for text in found if text))


def usable_rows(
    parts: Sequence[Sequence[Example]],
    settings: VideoConfig,
    *,
    hears: bool,
    journal: Path | None = None,
    longest: float | None = None,
) -> list[list[Example]]:
    """The rows whose media can be decoded, in order; logs what is left out, each file once.

    Args:
        parts: Rows to train on, rows held out; those without media are kept.
        settings: The `video` section, with the policies.
        hears: Whether the model hears.
        journal: See `check_media`.
        longest: Seconds that the window of a model that hears has; None: no limit.

    Raises:
        DataError: A file cannot be used and the policy for it is `stop`, or no row is left.
    """
    examples = [row for part in parts for row in part]
    report = check_media(examples, settings, hears=hears, journal=journal, longest=longest)
    return keep_usable(parts, report, settings, hears=hears)


def keep_usable(
    parts: Sequence[Sequence[Example]],
    report: MediaReport,
    settings: VideoConfig,
    *,
    hears: bool,
) -> list[list[Example]]:
    """The same for media that were looked at."""
    stops = _stopping(report, settings)
    if stops:
        raise DataError(
            f"{len(stops)} of {report.num_files} media files cannot be used:\n{_named(stops)}\n"
            "Take their rows out, or set video.bad_media to drop, or video.no_sound to drop or mute"
        )
    hears = hears and settings.sound == "auto"
    bad = {id(row) for part in parts for row in part if report.of(row, hears=hears)}
    faults = [*report.broken.values(), *report.silent.values()]
    what = f"{len(faults):,} of {report.num_files:,} media files"
    hint = "\nvideo.no_sound: mute shows clips without sound" if report.silent else ""
    return _without(parts, bad, faults, what, hint)


def leave_out(
    parts: list[list[Example]], faults: Mapping[int, str], settings: VideoConfig
) -> list[list[Example]]:
    """The rows whose media the model takes, as `bad_media` says; others are named by their files.

    Args:
        parts: Rows to train on, rows held out.
        faults: By id() of a row, what is wrong, naming files.
        settings: The `video` section.

    Raises:
        DataError: There are such rows and the policy is `stop`, or no row is left.
    """
    texts = list(dict.fromkeys(faults.values()))
    if texts and settings.bad_media == "stop":
        raise DataError(
            f"{len(faults):,} of {sum(map(len, parts)):,} rows show or play what the model cannot "
            f"take:\n{_named(texts)}\nTake them out, or set video.bad_media to drop"
        )
    count = f"{len(texts):,} thing{'s' * (len(texts) != 1)}"
    return _without(parts, set(faults), texts, f"{count} that the model cannot take,")


def _without(
    parts: Sequence[Sequence[Example]],
    bad: set[int],
    faults: Sequence[str],
    what: str,
    hint: str = "",
) -> list[list[Example]]:
    """The rows but those whose id() is among `bad`; what is wrong is logged, each once."""
    kept = [[row for row in part if id(row) not in bad] for part in parts]
    num_rows, num_kept = sum(map(len, parts)), sum(map(len, kept))
    if num_kept == num_rows:
        return kept
    lost = f"{num_rows - num_kept:,} of {num_rows:,} rows"
    if parts[0] and not kept[0]:
        raise DataError(
            f"no row is left to train on: {lost} cannot be shown or played:\n{_named(faults)}{hint}"
        )
    for text in faults[:_NAMED]:
        log.warning("%s", text)
    if len(faults) > _NAMED:
        log.warning("and %d more of the kind", len(faults) - _NAMED)
    log.warning("%s are left out for the %s named above", lost, what)
    return kept


def _named(faults: Sequence[str]) -> str:
    """The first of them, a line each, and how many more there are."""
    lines = [f"  {text}" for text in faults[:_NAMED]]
    if len(faults) > _NAMED:
        lines.append(f"  and {len(faults) - _NAMED} more")
    return "\n".join(lines)


def check_media(
    examples: Sequence[Example],
    settings: VideoConfig,
    *,
    hears: bool,
    journal: Path | None = None,
    longest: float | None = None,
) -> MediaReport:
    """Decode everything that rows refer to, each reference once, in a few threads.

    Args:
        examples: Rows.
        settings: The `video` section. With `no_sound: mute` a clip without a track is no fault.
        hears: Whether the model hears, so that clips need their sound.
        journal: A file with what is known, written to; what it says is whole is not decoded.
        longest: Seconds that the window of a model that hears has; None: no limit.
    """
    hears = hears and settings.sound == "auto"
    uses = {use for row in examples for use in uses_of(row, hears=hears)}
    if not uses:
        return MediaReport(num_files=0)
    order = sorted(uses, key=str)  # the parts of a file follow each other
    with CheckJournal(journal, settings, longest) as book:
        verdicts = {use: book.find(*use) for use in order}
        todo = [use for use in order if verdicts[use] is None]
        for use, verdict in _decoded(todo, settings, longest):
            book.add(*use, verdict)
            verdicts[use] = verdict
    bad = {use: verdict for use, verdict in verdicts.items() if verdict and verdict.fault}
    report = MediaReport(
        num_files=len({reference.path for reference, _ in uses}),
        num_decoded=len(todo),
        faults={use: verdict.fault for use, verdict in bad.items()},
        seen={use: verdict.seen for use, verdict in verdicts.items() if verdict and verdict.seen},
    )
    for (reference, _), verdict in bad.items():
        named = report.silent if verdict.silent else report.broken
        named.setdefault(str(_name(reference)), verdict.fault)
    for name in report.broken:
        report.silent.pop(name, None)  # named once
    return report


def _decoded(
    uses: Sequence[Use], settings: VideoConfig, longest: float | None
) -> Iterator[tuple[Use, Verdict]]:
    """The verdict on each use, in order, with a bar on a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    hidden = not console.is_terminal or not uses
    pool = ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1))
    try:
        results = pool.map(lambda use: _verdict(use[0], use[1], settings, longest), uses)
        shown = track(results, "media", total=len(uses), console=console, disable=hidden)
        yield from zip(uses, shown, strict=True)
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C waits for no more than is being decoded


def _stopping(report: MediaReport, settings: VideoConfig) -> list[str]:
    """What is wrong with the files for which the policy is to stop."""
    broken = report.broken if settings.bad_media == "stop" else {}
    silent = report.silent if (settings.no_sound or settings.bad_media) == "stop" else {}
    return [*broken.values(), *silent.values()]


def _verdict(
    reference: Reference, heard: bool, settings: VideoConfig, longest: float | None
) -> Verdict:
    try:
        if isinstance(reference, Picture):
            image = open_picture(reference)
            return Verdict(seen=Seen(size=(image.height, image.width)))
        if isinstance(reference, Sound):
            wave = read_sound(reference, settings, longest)
            return Verdict(seen=Seen(seconds=wave.seconds))
        frames = read_frames(reference, settings, Glimpse())
        if not heard:
            return Verdict(seen=Seen.of_clip(frames, None))
        if not has_sound(reference.path):
            if settings.no_sound == "mute":
                return Verdict(seen=Seen.of_clip(frames, None))
            what = f"{reference.path}: has no sound track, and the model hears"
            return Verdict(what, silent=True)
        return Verdict(seen=Seen.of_clip(frames, sound_of(reference, settings, longest)))
    except DataError as error:
        return Verdict(str(error))


def _name(reference: Reference) -> object:
    """What a fault is named by: a file; of a table, the cell."""
    return reference if isinstance(reference, Picture) else reference.path


def uses_of(row: Example, *, hears: bool) -> Iterator[Use]:
    """What a row refers to; a clip is heard by a model that hears, unless a track is given."""
    for media in (row.media, *(candidate.media for candidate in row.candidates)):
        if media is None:
            continue
        heard = hears and not media.sounds
        yield from ((clip, heard) for clip in media.videos)
        yield from ((reference, False) for reference in (*media.images, *media.sounds))
        if media.change is not None and media.change.donor is not None:
            yield media.change.donor, heard
