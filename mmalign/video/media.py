"""Frames of a clip: which ones, and their pixels, decoded once."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Hashable, Iterable, Sequence
from fractions import Fraction
from itertools import chain
from math import inf
from typing import TYPE_CHECKING

import numpy as np
from cachetools import LRUCache

from mmalign.config import VideoConfig
from mmalign.data.example import Clip
from mmalign.errors import DataError
from mmalign.video.sizes import Array, Frames, Sizes, shown_size, turn_of
from mmalign.video.timeline import (
    Deadline,
    Timeline,
    decoded,
    decoded_stretches,
    file_state,
    open_media,
    packets_of,
    pictures_of,
    stretches,
    timeline,
)

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

MOST_HELD = 2 * 2**30
"""Bytes of pixels of one clip."""

_NEAR = 3  # frames: a frame that cannot be decoded shows one of as many before it


class Glimpse:
    """A scale for frames that only have to be there: a pixel of each is kept."""

    draws = False

    def decoded(self, count: int, height: int, width: int, area: int | None) -> tuple[int, int]:
        """One pixel."""
        return 1, 1

    def shrink(self, image: Array, size: tuple[int, int], second: float = 0.0) -> Array:
        """The first one."""
        return image[:1, :1]


Scale = Sizes | Glimpse  # what frames are brought to as they are decoded


def choose(clip: Clip, settings: VideoConfig) -> tuple[int, ...]:
    """The frame numbers of a clip, the same in every run; a clip that has some keeps them.

    `num_frames` asks for the frames nearest to that many moments from the first to the last frame
    shown in [start, end), evenly spaced, both ends included; for one, the middle. A span with fewer
    frames repeats the nearest, so that the count is always the one asked for. `fps` asks for those
    nearest to the moments 1 / fps seconds apart, from the first on, each once; if they are more
    than `max_frames` or fewer than `min_frames`, for so many evenly spaced ones. Ties go to the
    earlier frame. A clip's own `fps` comes first.

    Raises:
        DataError: The file has no such frames, or cannot be read.
    """
    return _chosen(timeline(clip.path, settings), clip, settings)


def read_frames(clip: Clip, settings: VideoConfig, scale: Scale | None = None) -> Frames:
    """The chosen frames of a clip as a player shows them; the same numbers give the same pixels.

    Frames are turned, mirrored and widened as the file says. Only the stretches of the file that
    the chosen frames need are decoded, and nothing is held but the chosen frames, at the size that
    `scale` asks for. A frame that is damaged shows the nearest whole one of the three before it.
    Frames of another size than the first are brought to its size.

    Args:
        clip: What to decode.
        settings: The `video` section.
        scale: Of the model's processor; None: frames stay as large as they are.

    Raises:
        DataError: The file cannot be read, is cut off before a chosen frame, is too long, too large
            or takes too long; says which file and what is wrong.
    """
    deadline = Deadline(clip.path, settings.decode_timeout)
    line = timeline(clip.path, settings)
    numbers = _chosen(line, clip, settings)
    first, last = 0, len(line) - 1
    if clip.start or clip.end is not None:
        first, last = span_numbers(line, clip, settings)
        first, last = min(first, *numbers), max(last, *numbers)
    stack = _Stack(clip, numbers, settings.max_side, scale, begin=first, rate=line.told_fps)
    _fill(stack, line, deadline)
    assert stack.pixels is not None
    return Frames(
        pixels=stack.pixels,
        indices=numbers,
        times=tuple(line.seconds(number) for number in numbers),
        source_fps=line.fps,
        num_source=len(line),
        duration=line.duration,
        span=(first, last - first + 1),
        area=clip.max_pixels,
        size=stack.size,
        rate=line.told_fps,
        drawn=stack.is_drawn,
    )


def span_numbers(line: Timeline, clip: Clip, settings: VideoConfig) -> tuple[int, int]:
    """Numbers of the first and the last frame shown in the clip's span.

    Raises:
        DataError: The file ends before it, or it is too long.
    """
    end = inf if clip.end is None else clip.end
    if line.claimed is not None and end > line.duration:
        raise DataError(f"{clip.path}: is cut off after {len(line)} frames{_cut(line)}")
    if clip.start >= line.duration or end <= clip.start:
        raise DataError(
            f"{clip.path}: the clip is from {clip.start:g} seconds to "
            f"{'the end' if end == inf else f'{end:g}'}; the file has {line.duration:g}"
        )
    length = min(end, line.duration) - clip.start
    if length > settings.max_seconds:
        raise DataError(
            f"{clip.path}: the clip lasts {length:g} seconds; video.max_seconds is "
            f"{settings.max_seconds:g}"
        )
    half = 0.5 * float(line.unit)  # a time in a record may be rounded either way
    first = bisect_left(range(len(line)), clip.start - half, key=line.seconds)
    last = bisect_left(range(len(line)), end - half, key=line.seconds) - 1
    if first > last:  # between two frames: the one that is shown then
        first = last = max(last, 0)
    return first, last


def _chosen(line: Timeline, clip: Clip, settings: VideoConfig) -> tuple[int, ...]:
    if clip.frames:
        if not 0 <= min(clip.frames) <= max(clip.frames) < len(line):
            raise DataError(
                f"{clip.path}: frames {min(clip.frames)} to {max(clip.frames)} are asked for; it "
                f"has {len(line)} frames, counted from 0{_cut(line)}"
            )
        return clip.frames
    first, last = span_numbers(line, clip, settings)
    ticks = line.ticks
    count = settings.num_frames if clip.fps is None else None
    if count is None:
        fps = settings.fps if clip.fps is None else clip.fps
        assert fps is not None  # the config asks for one of the two
        step = 1 / (fps * float(line.unit))  # ticks
        length = ticks[last] - ticks[first]
        count = int(length / step + 1e-6) + 1
        least = min(settings.min_frames, last - first + 1)
        if least <= count <= settings.max_frames:
            moments = (ticks[first] + round(i * step) for i in range(count))
            return tuple(dict.fromkeys(_nearest(ticks, moments, 1, first, last)))
        count = min(max(count, least), settings.max_frames)
    if count == 1:
        return ((first + last) // 2,)
    # Moments in units of a tick's (count - 1)th part, which are whole numbers.
    parts = count - 1
    moments = (ticks[first] * (parts - i) + ticks[last] * i for i in range(count))
    return tuple(_nearest(ticks, moments, parts, first, last))


def _cut(line: Timeline) -> str:
    if line.claimed is None:
        return ""
    return f" (its header claims {line.claimed:.2f} seconds, {line.duration:.2f} are there)"


def _nearest(
    ticks: Sequence[int], moments: Iterable[int], parts: int, first: int, last: int
) -> Iterable[int]:
    """For each moment, in parts of a tick, the frame of [first, last] shown nearest to it."""
    for moment in moments:
        after = bisect_left(ticks, -(-moment // parts), first, last)
        before = max(after - 1, first)
        closer = moment - ticks[before] * parts <= ticks[after] * parts - moment
        yield before if closer else after


def _fill(stack: _Stack, line: Timeline, deadline: Deadline) -> None:
    """Put all its frames into a stack; from the file's start where its stretches give not each."""
    if not line.packets:
        _decode(stack, line, deadline, [])
    else:
        spans = ((line.starts[number], line.packets[number]) for number in stack.rows)
        _decode(stack, line, deadline, stretches(spans))
        if stack.rows:
            whole = [(0, max(line.packets[number] for number in stack.rows))]
            _decode(stack, line, deadline, whole)
    if stack.rows or stack.pixels is None:
        raise DataError(
            f"{stack.path}: frame {min(stack.rows)} of {len(line)} cannot be decoded, nor the "
            f"{_NEAR} before it"
        )


class _Stack:
    """Pixels of chosen frames, filled in any order.

    Attributes:
        pixels: [T, H, W, 3] uint8, once a frame is there.
        rows: Number of a frame that is missing to its places in the stack.
        size: Height and width of the file's frames as a player shows them.
    """

    def __init__(
        self, clip: Clip, numbers: Sequence[int], max_side: int, scale: Scale | None,
        *, begin: int, rate: float,
    ) -> None:  # fmt: skip
        """Empty; `begin` is the frame from which processors count, at `rate` a second."""
        self.path, self.max_side = clip.path, max_side
        self._begin_at, self._rate = begin, rate
        self.pixels: Array | None = None
        self.size = (0, 0)
        self.rows: dict[int, list[int]] = {}
        for row, number in enumerate(numbers):
            self.rows.setdefault(number, []).append(row)
        self._num_rows = len(numbers)
        self._area, self._scale = clip.max_pixels, scale

    def put(self, number: int, frame: VideoFrame, ratio: Fraction | None) -> None:
        """Write a frame to its places; its number is missing no longer.

        `ratio` is the width of a stored pixel to its height.
        """
        turn = turn_of(frame)
        if self.pixels is None:
            size = shown_size(frame.height, frame.width, ratio, self.max_side)
            self._begin(size[::-1] if turn.axes else size)
        assert self.pixels is not None
        height, width = self.size[::-1] if turn.axes else self.size
        image = turn(frame.to_ndarray(format="rgb24", height=height, width=width))
        size = self.pixels.shape[1:3]
        if image.shape[:2] != size and self._scale is not None:
            second = (number - self._begin_at) / self._rate
            image = self._scale.shrink(image, size, second)
        self.pixels[self.rows.pop(number)] = image

    @property
    def is_drawn(self) -> bool:
        """Whether times were drawn on the frames."""
        is_smaller = self.pixels is not None and self.pixels.shape[1:3] != self.size
        return is_smaller and self._scale is not None and self._scale.draws

    def _begin(self, size: tuple[int, ...]) -> None:
        height, width = self.size = (size[0], size[1])
        if self._scale is not None:
            try:
                height, width = self._scale.decoded(self._num_rows, height, width, self._area)
            except DataError as error:
                raise DataError(f"{self.path}: {error}") from error
        if self._num_rows * height * width * 3 > MOST_HELD:
            raise DataError(
                f"{self.path}: {self._num_rows} frames of {width} x {height} are more than "
                f"{MOST_HELD // 2**30} GiB; choose fewer, or make the video smaller"
            )
        self.pixels = np.empty((self._num_rows, height, width, 3), np.uint8)


def _decode(
    stack: _Stack, line: Timeline, deadline: Deadline, ranges: Sequence[tuple[int, int]]
) -> None:
    """Put the missing frames into a stack, or those shown shortly before them.

    As far as some ranges of packets give them; without any, the whole file, whose frames are
    counted and not told by their times.
    """
    with open_media(stack.path, deadline) as container:
        stream = pictures_of(container, stack.path, stack.max_side)
        packets = packets_of(container, deadline, stream)
        frames = decoded_stretches(stream, packets, ranges) if ranges else decoded(stream, packets)
        wanted = sorted(stack.rows, reverse=True)
        held: tuple[float, VideoFrame] | None = None  # the last one before those wanted
        for count, frame in chain(enumerate(frames), [(inf, None)]):  # in the order they are shown
            number = line.number(frame.pts) if ranges and frame else count
            if number is None:
                continue
            while wanted and wanted[-1] <= number:
                target = wanted.pop()
                if frame is not None and target == number:
                    stack.put(target, frame, stream.sample_aspect_ratio)
                elif held is not None and target - held[0] <= _NEAR:
                    stack.put(target, held[1], stream.sample_aspect_ratio)
            if not wanted or frame is None:
                return
            held = number, frame


class FrameCache:
    """Frames of clips by what the file is: its path, size and time of change, and the part asked.

    May be used from several threads. What it gives out is shared, so its pixels cannot be written.

    Attributes:
        budget: Bytes of pixels that it holds at most.
        hits, misses: Lookups so far.
    """

    def __init__(self, settings: VideoConfig, scale: Scale | None = None) -> None:
        """Hold nothing yet; `settings.frame_cache` MiB at most, of frames as `scale` wants them."""
        self.settings, self.scale = settings, scale
        self.budget = settings.frame_cache << 20
        self.hits = self.misses = 0
        self._kept: LRUCache[Hashable, Frames] = LRUCache(
            self.budget, lambda frames: frames.pixels.nbytes
        )
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Clips held."""
        return len(self._kept)

    @property
    def num_bytes(self) -> int:
        """Of the pixels held now."""
        return int(self._kept.currsize)

    def get(self, clip: Clip, *, bare: bool = False) -> Frames:
        """The chosen frames of a clip, decoded if they are not held.

        Args:
            clip: Which.
            bare: Without times on them, and so whole where the processor draws them.

        Raises:
            DataError: The file cannot be decoded.
        """
        scale = None if bare and self.scale is not None and self.scale.draws else self.scale
        key = (*file_state(clip.path), clip, scale is None)
        with self._lock:
            found = self._kept.get(key)
            self.hits, self.misses = self.hits + (found is not None), self.misses + (found is None)
        if found is not None:
            return found
        # Two threads that miss the same clip both decode it, to the same pixels.
        frames = read_frames(clip, self.settings, scale)
        frames.pixels.flags.writeable = False
        if frames.pixels.nbytes <= self.budget:
            with self._lock:
                self._kept.setdefault(key, frames)
        return frames
