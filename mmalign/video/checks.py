"""Whether the media of rows can be used: each file is decoded once, before a run depends on it."""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mmalign.data.example import Clip, Picture, Sound
from mmalign.data.pictures import open_picture
from mmalign.errors import DataError
from mmalign.video.media import read_frames
from mmalign.video.sound import has_sound, read_sound, sound_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

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
        num_files: Distinct files that were decoded.
        broken: What is wrong with each file that cannot be decoded, by its name; the texts name it.
        silent: The same for files of clips that are to be heard and have no sound track.
        unusable: Uses that lead there.
    """

    num_files: int
    broken: dict[str, str] = field(default_factory=dict[str, str])
    silent: dict[str, str] = field(default_factory=dict[str, str])
    unusable: frozenset[Use] = frozenset()


def usable_rows(
    examples: Sequence[Example], settings: VideoConfig, *, hears: bool
) -> list[Example]:
    """The rows whose media can be decoded, in order; logs what is left out, each file once.

    Args:
        examples: Rows; those without media are kept.
        settings: The `video` section, with the policies.
        hears: Whether the model hears.

    Raises:
        DataError: A file cannot be used and the policy for it is `stop`.
    """
    report = check_media(examples, settings, hears=hears)
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
    kept = [row for row in examples if report.unusable.isdisjoint(_uses(row, hears))]
    if len(kept) < len(examples):
        num_bad = len(report.broken.keys() | report.silent.keys())
        log.warning(
            "%d of %d rows are left out for the %d of %d media files named above",
            len(examples) - len(kept), len(examples), num_bad, report.num_files,
        )  # fmt: skip
    return kept


def check_media(examples: Sequence[Example], settings: VideoConfig, *, hears: bool) -> MediaReport:
    """Decode everything that rows refer to, each reference once, in a few threads.

    Args:
        examples: Rows.
        settings: The `video` section. With `no_sound: mute` a clip without a track is no fault.
        hears: Whether the model hears, so that clips need their sound.
    """
    hears = hears and settings.sound == "auto"
    uses = {use for row in examples for use in _uses(row, hears)}
    order = sorted(uses, key=str)  # the parts of a file follow each other
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        results = pool.map(lambda use: _fault(use[0], use[1], settings), order)
        faults = {use: fault for use, fault in zip(order, results, strict=True) if fault}
    report = MediaReport(
        num_files=len({reference.path for reference, _ in uses}), unusable=frozenset(faults)
    )
    for (reference, _), (text, is_silent) in faults.items():
        named = report.silent if is_silent else report.broken
        named.setdefault(str(_name(reference)), text)
    for name in report.broken:
        report.silent.pop(name, None)  # named once
    return report


def _stopping(report: MediaReport, settings: VideoConfig) -> list[str]:
    broken = report.broken if settings.bad_media == "stop" else {}
    silent = report.silent if settings.no_sound == "stop" else {}
    return [*broken.values(), *silent.values()]


def _fault(reference: Reference, heard: bool, settings: VideoConfig) -> tuple[str, bool] | None:
    """What is wrong with a reference, and whether it is only that no sound is there."""
    try:
        if isinstance(reference, Picture):
            open_picture(reference)
        elif isinstance(reference, Sound):
            read_sound(reference, settings)
        else:
            read_frames(reference, settings)
            if heard and not has_sound(reference.path):
                if settings.no_sound == "mute":
                    return None
                return f"{reference.path}: has no sound track, and the model hears", True
            if heard:
                sound_of(reference, settings)
    except DataError as error:
        return str(error), False
    return None


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
