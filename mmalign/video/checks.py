"""Whether the media of rows can be used, and what is known of them from earlier runs."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image
from pydantic import TypeAdapter

from mmalign.config import VideoConfig
from mmalign.data.example import Clip, Example, Picture, Sound
from mmalign.data.jobs import first_few, is_main_process, track
from mmalign.data.pictures import open_picture
from mmalign.errors import DataError
from mmalign.video.media import Glimpse, read_frames
from mmalign.video.sizes import SOUND_RATE, Frames, Wave
from mmalign.video.sound import has_sound, read_sound, sound_of

log = logging.getLogger(__name__)

_NAMED = 10  # files that an error names
_MOST_THREADS = 4  # each holds the frames of one clip


@dataclass(frozen=True, slots=True)
class Seen:
    """A medium without its pixels and samples.

    Attributes:
        size: Height and width, of frames as a player shows them; (0, 0) of a sound.
        indices, times, fps, total, duration, span, rate: Of a clip's frames; see `Frames`.
        seconds: Of a sound, and of a clip's own where it is heard; None: there is none.
    """

    size: tuple[int, int] = (0, 0)
    indices: tuple[int, ...] = ()
    times: tuple[float, ...] = ()
    fps: float = 0.0
    total: int = 0
    duration: float = 0.0
    span: tuple[int, int] = (0, 0)
    rate: float = 0.0
    seconds: float | None = None

    @classmethod
    def of_clip(cls, frames: Frames, wave: Wave | None) -> Self:
        """What is kept of a clip."""
        return cls(
            size=frames.size or (int(frames.pixels.shape[1]), int(frames.pixels.shape[2])),
            indices=frames.indices,
            times=frames.times,
            fps=frames.source_fps,
            total=frames.num_source,
            duration=frames.duration,
            span=frames.span or (0, frames.num_source),
            rate=frames.rate or frames.source_fps,
            seconds=None if wave is None else wave.seconds,
        )

    def frames(self, clip: Clip) -> Frames:
        """Frames of the right shape and times that show nothing, and take no memory."""
        return Frames(
            pixels=np.broadcast_to(np.uint8(0), (len(self.indices), *self.size, 3)),
            indices=self.indices,
            times=self.times,
            source_fps=self.fps,
            num_source=self.total,
            duration=self.duration,
            span=self.span,
            area=clip.max_pixels,
            rate=self.rate,
        )

    def image(self) -> Image.Image:
        """A black image of the size."""
        return Image.new("RGB", (self.size[1], self.size[0]))

    def wave(self) -> Wave | None:
        """Silence of the length; None where there is no sound."""
        if self.seconds is None:
            return None
        return Wave(np.zeros(max(round(self.seconds * SOUND_RATE), 1), np.float32))


# A file that was found whole is not decoded again until it, or how it is read, changes. What was
# found broken is looked at again by the next run: a disk may have been away for a moment.

FILE = "media_checks.jsonl"
VERSION = 2  # raise it when the same file gets another verdict
_DECIDING = {"num_frames", "fps", "max_frames", "min_frames", "max_seconds", "max_side",
             "decode_timeout"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of decoding one reference.

    Attributes:
        fault: What is wrong, naming the file; "" for one that is whole.
        silent: Nothing but that no sound is there.
        seen: Sizes, times and lengths of one that is whole.
    """

    fault: str = ""
    silent: bool = False
    seen: Seen | None = None


_VERDICT = TypeAdapter(Verdict)


class CheckJournal:
    """Verdicts by what was decoded: file, size, time of change, part, and the settings that matter.

    Of several processes that train one model the first one decodes; the others, which come after
    it, take over its verdicts, so that all leave out the same rows.
    """

    def __init__(
        self, path: Path | None, settings: VideoConfig, longest: float | None = None
    ) -> None:
        """Read what is there; None for neither reading nor writing anything.

        `longest` is the window of a model with audio input, in seconds.
        """
        import av

        self._path, self._torn = path, False
        self._settings = {
            **settings.model_dump(mode="json", include=_DECIDING),
            "no_sound": settings.earlier_no_sound,  # as journals have it
            "av": av.__version__,
            "longest": longest,
            "version": VERSION,
        }
        self._follows = not is_main_process()
        self._known: dict[str, Verdict] = {}
        if path is not None and path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            self._torn = text[-1:] not in ("", "\n")  # a process was killed within a line
            for line in text.split("\n"):
                # One that is cut off or damaged tells nothing: its file is decoded again.
                with suppress(ValueError, KeyError, TypeError):
                    entry = json.loads(line)
                    key = json.dumps(entry["of"], sort_keys=True)
                    self._known[key] = _VERDICT.validate_python(entry)

    def find(self, reference: Clip | Picture | Sound, heard: bool) -> Verdict | None:
        """What is known; None where the reference is to be decoded."""
        found = self._known.get(self._key(reference, heard))
        return found if found is None or self._follows or not found.fault else None

    def add(self, reference: Clip | Picture | Sound, heard: bool, verdict: Verdict) -> None:
        """Write a verdict down; the last one about a reference counts."""
        key = self._key(reference, heard)
        if self._path is None or not key:
            return
        said: dict[str, Any] = {"fault": verdict.fault, "silent": verdict.silent}
        if verdict.seen is not None:
            said = {"seen": asdict(verdict.seen)}
        line = json.dumps({"of": json.loads(key), **said}, ensure_ascii=False)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write("\n" * self._torn + f"{line}\n")
        self._torn = False

    def _key(self, reference: Clip | Picture | Sound, heard: bool) -> str:
        """Of the file as it is now; "" where it cannot be looked at."""
        try:
            info = reference.path.stat()
        except OSError:
            return ""
        about: dict[str, Any] = {
            **asdict(reference),
            "path": str(reference.path),
            "kind": type(reference).__name__,
            "size": info.st_size,
            "mtime_ns": info.st_mtime_ns,
            "heard": heard,
            "settings": self._settings,
        }
        return json.dumps(about, sort_keys=True)


Reference = Clip | Picture | Sound
Use = tuple[Reference, bool]
"""What a row refers to, and whether its own sound is to be heard."""


@dataclass(frozen=True, slots=True)
class MediaReport:
    """What is wrong with the media of some rows.

    Attributes:
        num_files: Distinct files that are referred to.
        num_decoded: References that were decoded; the others were known.
        broken: What is wrong with each file that cannot be decoded, by its name; the texts name it.
        silent: The same for files of clips that are to be heard and have no audio track.
        faults: What is wrong, by the use that leads there.
        seen: Sizes, times and lengths of what is whole, by its use.
    """

    num_files: int
    num_decoded: int = 0
    broken: dict[str, str] = field(default_factory=dict[str, str])
    silent: dict[str, str] = field(default_factory=dict[str, str])
    faults: dict[Use, str] = field(default_factory=dict[Use, str])
    seen: dict[Use, Seen] = field(default_factory=dict[Use, Seen])

    def of(self, row: Example, *, uses_audio: bool) -> list[str]:
        """What is wrong with the media of a row; `uses_audio` as the report was made."""
        found = (self.faults.get(use) for use in uses_of(row, uses_audio=uses_audio))
        return list(dict.fromkeys(text for text in found if text))


def keep_usable(
    parts: Sequence[Sequence[Example]],
    report: MediaReport,
    settings: VideoConfig,
    *,
    uses_audio: bool,
) -> list[list[Example]]:
    """The rows whose media can be used, in order; logs what is left out, each file once.

    Args:
        parts: Rows to train on, rows held out; those without media are kept.
        report: On the media of all of them.
        settings: The `video` section, with the policies.
        uses_audio: As the report was made.

    Raises:
        DataError: A file cannot be used and the policy for it is `stop`, or no row is left.
    """
    broken = report.broken if settings.bad_media == "stop" else {}
    silent = report.silent if (settings.missing_audio or settings.bad_media) == "stop" else {}
    stops = [*broken.values(), *silent.values()]
    if stops:
        raise DataError(
            f"{len(stops)} of {report.num_files} media files cannot be used:\n{_named(stops)}\n"
            "Take their rows out, or set video.bad_media to drop, or video.missing_audio to "
            "drop or ignore"
        )
    uses_audio = uses_audio and settings.sound == "auto"
    bad = {id(row) for part in parts for row in part if report.of(row, uses_audio=uses_audio)}
    faults = [*report.broken.values(), *report.silent.values()]
    what = f"{len(faults):,} of {report.num_files:,} media files"
    hint = "\nvideo.missing_audio: ignore shows clips without audio" if report.silent else ""
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
    for text in first_few(faults, _NAMED):
        log.warning("%s", text)
    log.warning("%s are left out for the %s named above", lost, what)
    return kept


def _named(faults: Sequence[str]) -> str:
    return "\n".join(f"  {text}" for text in first_few(faults, _NAMED))


def check_media(
    examples: Sequence[Example],
    settings: VideoConfig,
    *,
    uses_audio: bool,
    journal: Path | None = None,
    longest: float | None = None,
) -> MediaReport:
    """Decode everything that rows refer to, each reference once, in a few threads.

    Args:
        examples: Rows.
        settings: The `video` section. With `missing_audio: ignore` no track is no fault.
        uses_audio: Whether clips are taken with their own audio, and need it.
        journal: A file with what is known, written to; what it says is whole is not decoded.
        longest: Seconds that the window of a model with audio input has; None: no limit.
    """
    uses_audio = uses_audio and settings.sound == "auto"
    uses = {use for row in examples for use in uses_of(row, uses_audio=uses_audio)}
    if not uses:
        return MediaReport(num_files=0)
    order = sorted(uses, key=str)  # the parts of a file follow each other
    book = CheckJournal(journal, settings, longest)
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
        of_table = isinstance(reference, Picture)  # where a cell is named
        named.setdefault(str(reference if of_table else reference.path), verdict.fault)
    for name in report.broken:
        report.silent.pop(name, None)  # named once
    return report


def _decoded(
    uses: Sequence[Use], settings: VideoConfig, longest: float | None
) -> Iterator[tuple[Use, Verdict]]:
    """The verdict on each use, in order, with a bar on a terminal."""
    pool = ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1))
    try:
        results = pool.map(lambda use: _verdict(use[0], use[1], settings, longest), uses)
        shown = track(results, "decoding media", total=len(uses), unit="media")
        yield from zip(uses, shown, strict=True)
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C waits for no more than is being decoded


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
        frames, wave = read_frames(reference, settings, Glimpse()), None
        if heard and has_sound(reference.path):
            wave = sound_of(reference, settings, longest)
        elif heard and settings.missing_audio != "ignore":
            what = f"{reference.path}: has no audio track, and the model takes audio"
            return Verdict(what, silent=True)
        return Verdict(seen=Seen.of_clip(frames, wave))
    except DataError as error:
        return Verdict(str(error))


def uses_of(row: Example, *, uses_audio: bool) -> Iterator[Use]:
    """What a row refers to; a clip's own audio counts, unless a track is given."""
    for media in (row.media, *(candidate.media for candidate in row.candidates)):
        if media is None:
            continue
        heard = uses_audio and not media.sounds
        yield from ((clip, heard) for clip in media.videos)
        yield from ((reference, False) for reference in (*media.images, *media.sounds))
        if media.change is not None and media.change.donor is not None:
            yield media.change.donor, heard
