"""Sound of a clip or a track: mono at 16 kHz, in step with the video."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmalign.config import VideoConfig
from mmalign.data.example import Clip, Sound
from mmalign.errors import DataError
from mmalign.video.media import span_numbers
from mmalign.video.sizes import SOUND_RATE, Array, Wave
from mmalign.video.timeline import (
    Deadline,
    decoded,
    open_media,
    packets_of,
    sound_stream,
    timeline,
    video_stream,
)

if TYPE_CHECKING:
    from av.audio.stream import AudioStream
    from av.container import InputContainer

_LEAD = 1.0  # seconds decoded before a span, which a decoder needs to come to the right values
_JUMP = 0.05  # seconds between two blocks from which on they are not heard as following each other
_COUNTED = ("mov", "matroska", "flac", "wav")
"""Formats whose header gives a length that was counted; others guess it from the bit rate."""

_RATES = range(1_000, 768_001)  # samples a second; others are in no use, and blow a sound up
_SLACK = 0.1  # seconds by which a sound may be longer than a model's window


def has_sound(path: Path) -> bool:
    """Whether a file has a sound track that can be decoded.

    Raises:
        DataError: It cannot be opened.
    """
    with open_media(path, Deadline(path, 60.0)) as container:
        return sound_stream(container) is not None


def sound_of(clip: Clip, settings: VideoConfig, longest: float | None = None) -> Wave:
    """A clip's own sound, exactly as long as its span of the video; silence where none is.

    Args:
        clip: Whose sound.
        settings: The `video` section.
        longest: Seconds that the model's window has; None: no limit.

    Raises:
        DataError: There is no audio track, the file cannot be read or ends before the span, or the
            span is too long.
    """
    line = timeline(clip.path, settings)
    if not clip.frames:
        span_numbers(line, clip, settings)
    end = min(inf if clip.end is None else clip.end, line.duration)
    _check_length(clip.path, end - clip.start, settings, longest)
    found = _read(Sound(clip.path, clip.start, end), settings, longest)
    samples = np.zeros(max(round((end - clip.start) * SOUND_RATE), 1), np.float32)
    samples[: len(found)] = found[: len(samples)]
    return Wave(samples)


def read_sound(sound: Sound, settings: VideoConfig, longest: float | None = None) -> Wave:
    """The span of a track. Second 0 is where the video starts; of a file without one, the audio.

    What is too long by the file's header is refused before it is decoded.

    Args:
        sound: The track and the part of it.
        settings: The `video` section.
        longest: Seconds that the model's window has; None: no limit.

    Raises:
        DataError: There is no audio track, nothing in the span, or the file cannot be read; or the
            span is longer than `max_seconds` or the window.
    """
    samples = _read(sound, settings, longest)
    if not len(samples):
        raise DataError(f"{sound.path}: has no sound after {sound.start:g} seconds")
    return Wave(samples)


def _read(sound: Sound, settings: VideoConfig, longest: float | None) -> Array:
    """[S] float32 in [-1, 1], up to where the sound ends."""
    path, end = sound.path, inf if sound.end is None else sound.end
    deadline = Deadline(path, settings.decode_timeout)
    most = min(settings.max_seconds, inf if longest is None else longest + _SLACK)
    wanted = min(end - sound.start, most)
    limit = inf if wanted == inf else round(wanted * SOUND_RATE)
    blocks: list[tuple[int, Array]] = []  # may leave gaps, which stay silent, and overlap
    length = 0
    with open_media(path, deadline) as container:
        stream = sound_stream(container)
        if stream is None:
            raise DataError(f"{path}: has no audio track")
        _check_rate(path, stream.codec_context.sample_rate)
        claimed = _claimed(container, stream)
        if claimed:
            _check_length(path, min(end, claimed) - sound.start, settings, longest)
        picture = video_stream(container)  # second 0 is where it starts
        zero, start = None, -inf
        if picture is not None:
            zero = float((picture.start_time or 0) * (picture.time_base or 0))
            start = zero + sound.start
        heard = False
        for time, samples in _blocks(container, stream, deadline, start):
            heard, zero = True, time if zero is None else zero
            at = round((time - zero - sound.start) * SOUND_RATE)
            at, samples = max(at, 0), samples[max(-at, 0) :]
            if len(samples):
                stop = int(min(at + len(samples), limit))
                length = max(length, stop)
                blocks.append((at, samples[: max(stop - at, 0)]))
            if length >= limit:
                break
        if not heard and not sound.start:
            raise DataError(f"{path}: no sound of it can be decoded")
        there = sound.start + length / SOUND_RATE
        if length < limit and there < 0.95 * min(claimed, end) - 0.5:
            raise DataError(
                f"{path}: is cut off: its header claims {claimed:.2f} seconds of sound, "
                f"{there:.2f} are there"
            )
    if length >= limit and end - sound.start > most:
        _check_length(path, inf, settings, longest)
    joined = np.zeros(length, np.float32)
    for at, samples in blocks:
        joined[at : at + len(samples)] = samples
    np.nan_to_num(joined, copy=False)
    return np.clip(joined, -1.0, 1.0, out=joined)


def _check_length(path: Path, seconds: float, settings: VideoConfig, longest: float | None) -> None:
    """Refuse a sound that is longer than the config or the model allows; inf: longer than both."""
    if longest is not None and seconds > longest + _SLACK and longest < settings.max_seconds:
        length = f"more than {longest:g} s" if seconds == inf else f"{seconds:.1f} s"
        raise DataError(
            f"{path}: a sound of {length}, but the model's feature extractor keeps {longest:g} s "
            "and would drop the rest; give start and end"
        )
    if seconds > settings.max_seconds:
        raise DataError(
            f"{path}: the sound lasts more than {settings.max_seconds:g} seconds, which is "
            "video.max_seconds"
        )


def _check_rate(path: Path, rate: int) -> None:
    if rate not in _RATES:
        raise DataError(
            f"{path}: its sound has {rate:,} samples a second by its header; between "
            f"{_RATES[0]:,} and {_RATES[-1]:,} are read"
        )


def _claimed(container: InputContainer, stream: AudioStream) -> float:
    """Seconds of sound by the header, where it is worth something; 0 where it is not."""
    if not container.format.name.startswith(_COUNTED):
        return 0.0
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    alone = len(container.streams) == 1
    return container.duration / 1e6 if alone and container.duration else 0.0


def _blocks(
    container: InputContainer, stream: AudioStream, deadline: Deadline, start: float
) -> Iterator[tuple[float, Array]]:
    """Sound at `SOUND_RATE` with the container's time of its first sample, from shortly before."""
    from av.audio.resampler import AudioResampler

    def from_start() -> Iterator[Any]:
        for packet in packets_of(container, deadline, stream):
            tick, unit = packet.pts, packet.time_base
            if tick is None or unit is None or float(tick * unit) >= start - _LEAD:
                yield packet

    resampler: AudioResampler | None = None
    kind: object = None  # of the blocks that the resampler takes
    position, expected = 0.0, 0.0  # times of what comes out, and of what goes in next
    for frame in decoded(stream, from_start()):
        _check_rate(deadline.path, frame.sample_rate)
        now = (frame.format.name, frame.layout.name, frame.sample_rate)
        time = expected if frame.time is None else frame.time
        if resampler is None or now != kind or abs(time - expected) > _JUMP:
            if resampler is not None:
                yield from _timed(resampler.resample(None), position)
            kind, position, expected = now, time, time
            resampler = AudioResampler(format="flt", layout="mono", rate=SOUND_RATE)
        for at, samples in _timed(resampler.resample(frame), position):
            yield at, samples
            position = at + len(samples) / SOUND_RATE
        expected += frame.samples / frame.sample_rate
    if resampler is not None:
        yield from _timed(resampler.resample(None), position)


def _timed(blocks: list[Any], position: float) -> Iterator[tuple[float, Array]]:
    for block in blocks:
        samples = block.to_ndarray()[0].astype(np.float32, copy=False)
        yield position, samples
        position += len(samples) / SOUND_RATE
