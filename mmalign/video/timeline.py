"""When each frame of a file is shown: the file opened, its packets, and what is decoded of them."""

from __future__ import annotations

import io
import os
import stat
import time
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import lru_cache, partial
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mmalign.config import VideoConfig
from mmalign.errors import DataError

if TYPE_CHECKING:
    from av.audio.stream import AudioStream
    from av.container import InputContainer
    from av.packet import Packet
    from av.stream import Stream
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream


# Data files come from strangers. A playlist or an edit list may name other files and addresses;
# only formats that hold their own streams are opened, the library gets an open file and no name,
# and whatever it asks to open besides is refused.

FORMATS = (
    "mov,matroska,webm,avi,gif,apng,mpegts,mpeg,flv,ogg,asf,mxf,ivf,rm,dv,h264,hevc,m4v,mpegvideo,"
    "wav,w64,mp3,flac,aac,ac3,eac3,aiff,au,caf,amr"
)
"""Names of demuxers that read one file and nothing else; told by content, never by the name."""

MOST_BYTES = 16 * 2**30
_BUFFER = 128 * 2**10  # bytes a read


class Deadline:
    """A moment after which the work on one file ends.

    Args:
        path: The file that is worked on.
        seconds: From now.
    """

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.seconds = path, seconds
        self._end = time.monotonic() + seconds

    def check(self) -> None:
        """Raise a DataError if it has passed."""
        if time.monotonic() > self._end:
            raise DataError(
                f"{self.path}: is not decoded after {self.seconds:g} seconds; raise "
                "video.decode_timeout, or cut the file"
            )


class GuardedFile(io.FileIO):
    """A file for reading that looks at the clock before each read."""

    def __init__(self, path: Path, deadline: Deadline) -> None:
        super().__init__(path, "rb")
        self._deadline = deadline

    def read(self, size: int | None = -1) -> bytes:
        """The next bytes, at most `size`."""
        self._deadline.check()
        return super().read(size)


@contextmanager
def open_media(path: Path, deadline: Deadline) -> Iterator[InputContainer]:
    """A media file, open for demuxing.

    Args:
        path: A file that the data layer has found to lie where it may.
        deadline: Checked at each read of the file.

    Raises:
        DataError: It is missing, empty, too large, or of no format that is read; or the library
            failed on it inside the `with`.
    """
    import av
    import av.error

    _check_file(path)
    try:
        with (
            GuardedFile(path, deadline) as file,
            av.open(
                file,
                "r",
                container_options={"format_whitelist": FORMATS},
                metadata_errors="replace",
                buffer_size=_BUFFER,
                io_open=partial(_refuse, path),
            ) as container,
        ):
            yield container
    except DataError:
        raise
    except av.error.FFmpegError as error:
        raise DataError(f"{path}: {_reason(error)}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def video_stream(container: InputContainer) -> VideoStream | None:
    """The first video stream that can be decoded; a cover image is none."""
    from av.stream import Disposition

    for stream in container.streams.video:
        # Without a decoder the library gives a stream no codec context.
        if stream.codec_context and not stream.disposition & Disposition.attached_pic:
            return stream
    return None


def sound_stream(container: InputContainer) -> AudioStream | None:
    """The first sound track that can be decoded."""
    return next((stream for stream in container.streams.audio if stream.codec_context), None)


def _check_file(path: Path) -> None:
    info = _stat(path)
    if not stat.S_ISREG(info.st_mode):
        raise DataError(f"{path}: is not a file")
    if not info.st_size:
        raise DataError(f"{path}: the file is empty")
    if info.st_size > MOST_BYTES:
        raise DataError(f"{path}: has more than {MOST_BYTES // 2**30} GiB")


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _refuse(path: Path, name: str, flags: int, options: dict[str, str]) -> NoReturn:
    raise DataError(f"{path}: asks for another file, {name[:200]!r}, which is not opened")


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return (
        "cannot be decoded: it is of no format that is read, broken or cut off "
        f"({text[0].lower()}{text[1:]})"
    )


def packets_of(container: InputContainer, deadline: Deadline, *streams: Stream) -> Iterator[Packet]:
    """The packets that hold anything, in the file's order, up to where the file is broken.

    Args:
        container: An open file.
        deadline: Checked at each packet.
        *streams: Of these only; none: of all.
    """
    import av.error

    try:
        for packet in container.demux(*streams):
            deadline.check()
            if packet.size:
                yield packet
    except (av.error.InvalidDataError, IndexError):
        # What came before it counts. The library looks up streams that appear late where it has
        # listed none, after the last packet.
        return


def decoded(stream: Any, packets: Iterable[Packet]) -> Iterator[Any]:
    """The frames of packets, in the order in which they are shown, the decoder emptied at the end.

    A packet that cannot be decoded gives none; a frame that was patched up is left out.
    """
    import av.error

    def feed(packet: Packet | None) -> list[Any]:
        try:
            return [frame for frame in stream.codec_context.decode(packet) if not frame.is_corrupt]
        except av.error.FFmpegError:
            return []

    for packet in packets:
        yield from feed(packet)
    yield from feed(None)


def stretches(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges of packets [first, last], joined where they touch, in the file's order."""
    joined: list[tuple[int, int]] = []
    for first, last in sorted(spans):
        if joined and first <= joined[-1][1] + 1:
            joined[-1] = joined[-1][0], max(joined[-1][1], last)
        else:
            joined.append((first, last))
    return joined


def decoded_stretches(
    stream: VideoStream, packets: Iterable[Packet], ranges: Sequence[tuple[int, int]]
) -> Iterator[VideoFrame]:
    """The frames of some ranges of packets; each range starts with a key packet.

    Args:
        stream: What is decoded.
        packets: All packets of the stream.
        ranges: From `stretches`.
    """
    packets, place = iter(packets), 0
    for first, last in ranges:
        yield from decoded(stream, islice(packets, first - place, last + 1 - place))
        stream.codec_context.flush_buffers()
        place = last + 1


# A header's count of frames and their rate are claims; the packets are what is there. Frames are
# numbered in the order in which they are shown, so a number means the same image in every run.

_SLACK = 2  # frames, and then a twentieth: what a header may claim too much
_NEAR = 0.02  # of a rate, by which a header may be off
_FALLBACK_RATE = Fraction(25)  # frames a second, of streams that know no time at all
_UNTIMED = ("avi", "h264", "hevc", "m4v", "mpegvideo")
"""Formats without times, or whose times are wrong where frames are not stored as shown."""

_TIMED = (
    "h264", "hevc", "vp8", "libvpx", "vp9", "libvpx-vp9", "av1", "libdav1d", "mpeg4",
    "mpeg1video", "mpeg2video", "mjpeg", "prores", "dnxhd", "ffv1", "rawvideo",
)  # fmt: skip
"""Decoders that make a frame of each packet and whose key packets can be started from."""


@dataclass(frozen=True, slots=True)
class Timeline:
    """The frames of a file.

    Attributes:
        ticks: Time of each frame as shown, ascending; frame n is `ticks[n]`.
        zero: Tick that counts as second 0: the start of the video.
        end: Tick at which the last frame goes.
        unit: Seconds a tick.
        packets: Place in the file's order of the packet of each frame; empty where the packets
            carry no times, and the frames had to be decoded to be counted.
        starts: Place of the packet to start decoding from, for each frame.
        claimed: Seconds that the header claims where the file ends earlier; None where it is whole.
        rate: Frames a second by the header; None: it says nothing.
    """

    ticks: Sequence[int]
    zero: int
    end: int
    unit: Fraction
    packets: Sequence[int] = field(default=(), repr=False)
    starts: Sequence[int] = field(default=(), repr=False)
    claimed: float | None = None
    rate: Fraction | None = None

    def __len__(self) -> int:
        """Frames."""
        return len(self.ticks)

    def seconds(self, number: int) -> float:
        """When a frame is shown."""
        return float((self.ticks[number] - self.zero) * self.unit)

    def number(self, tick: int | None) -> int | None:
        """Which frame is shown from a tick on; None: none, or an edit list cuts it."""
        if tick is None:
            return None
        number = bisect_left(self.ticks, tick)
        return number if number < len(self) and self.ticks[number] == tick else None

    @property
    def duration(self) -> float:
        """Seconds."""
        return float((self.end - self.zero) * self.unit)

    @property
    def fps(self) -> float:
        """Average frames a second."""
        span = (self.ticks[-1] - self.ticks[0]) * self.unit
        if span > 0:
            return float((len(self) - 1) / span)
        shown = (self.end - self.ticks[0]) * self.unit
        return float(1 / shown) if shown > 0 else float(_FALLBACK_RATE)

    @property
    def told_fps(self) -> float:
        """Frames a second by the header, by which other readers count; where it is about right."""
        counted, told = self.fps, float(self.rate or 0)
        return told if abs(told - counted) < _NEAR * counted else counted


def timeline(path: Path, settings: VideoConfig) -> Timeline:
    """The timeline of a file, kept for the files asked about last.

    Args:
        path: The file.
        settings: The `video` section; limits on sides and time are read.

    Raises:
        DataError: There are no frames, they are too large, or the file cannot be read.
    """
    return _kept(*file_state(path), settings.max_side, settings.decode_timeout)


def file_state(path: Path) -> tuple[Path, int, int]:
    """A file, its size and its time of change, by which what is kept of it is found again.

    Raises:
        DataError: It is not there.
    """
    info = _stat(path)
    return path, info.st_size, info.st_mtime_ns


@lru_cache(maxsize=16)  # an hour's takes 3 MiB
def _kept(path: Path, size: int, changed: int, max_side: int, seconds: float) -> Timeline:
    deadline = Deadline(path, seconds)
    with open_media(path, deadline) as container:
        stream = pictures_of(container, path, max_side)
        found = None
        if container.format.name not in _UNTIMED and stream.codec_context.name in _TIMED:
            found = _from_packets(container, stream, path, deadline)
    if found is not None:
        return found
    with open_media(path, deadline) as container:
        stream = pictures_of(container, path, max_side)
        return _from_frames(container, stream, path, deadline)


def pictures_of(container: InputContainer, path: Path, max_side: int) -> VideoStream:
    """The stream to decode, told not to allocate larger frames, on one thread.

    Frames that the decoder patches up after an error depend on the number of threads.
    """
    stream = video_stream(container)
    if stream is None:
        raise DataError(f"{path}: has no video stream that can be decoded")
    context = stream.codec_context
    if max(context.width, context.height) > max_side:
        raise DataError(
            f"{path}: its frames are {context.width} x {context.height}; video.max_side is "
            f"{max_side}"
        )
    # A decoder rounds sides up to whole blocks before it asks whether the area is allowed.
    context.options = {"max_pixels": str((max_side + 256) ** 2)}
    context.thread_count = 1
    return stream


def _from_packets(
    container: InputContainer, stream: VideoStream, path: Path, deadline: Deadline
) -> Timeline | None:
    """None where the packets do not say when their frames are shown."""
    shown: list[tuple[int, int, int]] = []  # tick, place, place of the key packet
    key_place, key_tick, before = -1, 0, -1  # the last key packet, and the one before it
    end, place, last = 0, -1, 0.0  # `last`: seconds at which the last packet of any stream ends
    read_until = 0  # every frame that is shown up to here has been stored before
    for packet in packets_of(container, deadline):
        if packet.pts is not None and packet.time_base is not None:
            last = max(last, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream is not stream:
            continue
        if packet.pts is None:
            return None
        place += 1
        if packet.is_keyframe:
            key_place, key_tick, before = place, packet.pts, key_place
        # A frame shown before the key frame that it follows needs the key frame before, too.
        start = key_place if packet.pts >= key_tick else before
        if start < 0 or packet.is_discard:
            continue  # it cannot be decoded, or an edit list cuts it
        shown.append((packet.pts, place, start))
        read_until = packet.pts if packet.dts is None else packet.dts
        end = max(end, packet.pts + (packet.duration or 0))
    if place < 0:
        raise DataError(f"{path}: holds no frame; it is empty or cut off after its header")
    if not shown:
        return None
    shown.sort()
    unit = stream.time_base
    assert unit is not None
    zero = shown[0][0] if stream.start_time is None else stream.start_time
    claimed = _claimed(container, stream, place + 1, float((end - zero) * unit), last)
    if claimed is not None:  # of the frames after it, some are missing between others
        shown = [frame for frame in shown if frame[0] <= read_until] or shown[:1]
    ticks, places, starts = (array("q", column) for column in zip(*shown, strict=True))
    if any(one == two for one, two in pairwise(ticks)):
        return None
    if end <= ticks[-1] or claimed is not None:
        end = ticks[-1] + max((ticks[-1] - ticks[0]) // max(len(ticks) - 1, 1), 1)
    return Timeline(ticks, zero, end, unit, places, starts, claimed, stream.average_rate)


def _claimed(
    container: InputContainer, stream: VideoStream, num_packets: int, there: float, last: float
) -> float | None:
    """Seconds that a cut file claims to have; a header that is off by a few frames claims none."""
    if stream.frames:
        if num_packets + _SLACK + stream.frames // 20 >= stream.frames:
            return None
        header = float((stream.duration or 0) * (stream.time_base or 0))
        return header or there * stream.frames / num_packets
    if container.duration is None:
        return None
    # Formats that count no frames give the length of their longest stream.
    claimed = container.duration / 1e6
    begins = (container.start_time or 0) / 1e6
    return claimed if last - begins < 0.95 * claimed - 0.5 else None


def _from_frames(
    container: InputContainer, stream: VideoStream, path: Path, deadline: Deadline
) -> Timeline:
    """By decoding everything: where packets carry no times, or none that can be trusted.

    Where the frames' times cannot be trusted either, those at which packets stand in the file are
    taken in order, if there is one for each frame; else the frames stand at equal distances.
    """
    stored = array("q")  # times at which packets are stored, which ascend

    def noted() -> Iterator[Packet]:
        for packet in packets_of(container, deadline, stream):
            if packet.dts is not None:
                stored.append(packet.dts)
            yield packet

    shown: list[int | None] = [frame.pts for frame in decoded(stream, noted())]
    if not shown:
        raise DataError(f"{path}: no frame of it can be decoded")
    unit = stream.time_base
    trusted = container.format.name not in _UNTIMED
    ticks = array("q", [tick for tick in shown if tick is not None]) if trusted else stored
    if unit is None or len(ticks) != len(shown) or any(one >= two for one, two in pairwise(ticks)):
        ticks = array("q", range(len(shown)))
        unit = 1 / (stream.average_rate or stream.guessed_rate or _FALLBACK_RATE)
    step = max((ticks[-1] - ticks[0]) // max(len(ticks) - 1, 1), 1)
    line = Timeline(ticks, ticks[0], ticks[-1] + step, unit, rate=stream.average_rate)
    claimed = float((stream.duration or 0) * (stream.time_base or 0))
    return replace(line, claimed=claimed) if line.duration < 0.95 * claimed - 0.5 else line
