"""Decoding by torchcodec where it is installed: the same frames by number, the same pixels."""

from __future__ import annotations

from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from mmalign.video.container import Deadline, GuardedFile, open_media
from mmalign.video.decode import decoded, packets_of
from mmalign.video.display import Turn, turn_of
from mmalign.video.timeline import pictures_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmalign.video.media import Stack
    from mmalign.video.timeline import Timeline

_AT_ONCE = 8  # frames decoded together, at their full size


@lru_cache(maxsize=1)
def _decoder() -> Any:
    try:
        from torchcodec.decoders import VideoDecoder  # pyright: ignore[reportMissingImports]
    except (ImportError, OSError, RuntimeError):  # it is there, but its shared libraries are not
        return None
    return VideoDecoder


def pixels_by_torchcodec(
    stack: Stack, line: Timeline, numbers: Sequence[int], deadline: Deadline
) -> bool:
    """Fill a stack with frames of a file that PyAV has opened and found whole; whether it is full.

    It is not where torchcodec is missing or fails, counts other frames or gives them other times,
    so that it never changes what a number means; nor where a player turns or widens the frames,
    which it does in its own way. PyAV then decodes what is missing. It does not say which frames
    were patched up.

    Args:
        stack: Of the file's frames by number.
        line: Its timeline.
        numbers: Of the frames, in any order; may repeat.
        deadline: Checked at each read.
    """
    make = _decoder()
    if make is None or line.claimed is not None or not line.packets:
        return False
    if not _is_plain(stack, deadline):
        return False
    wanted = sorted(set(numbers))
    with GuardedFile(stack.path, deadline) as file:
        try:
            decoder = make(file, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
            if decoder.metadata.num_frames != len(line):
                return False
            for start in range(0, len(wanted), _AT_ONCE):
                part = wanted[start : start + _AT_ONCE]
                found = decoder.get_frames_at(part)
                times = np.array([float(line.ticks[number] * line.unit) for number in part])
                if np.abs(found.pts_seconds.numpy() - times).max() > 0.5 * float(line.unit):
                    return False
                for number, image in zip(part, found.data.numpy(), strict=True):
                    stack.put_image(number, image)
        except (RuntimeError, ValueError, IndexError):
            deadline.check()
            return False
    return True


def _is_plain(stack: Stack, deadline: Deadline) -> bool:
    """Whether frames are shown as they are stored, by the first one that can be decoded."""
    with open_media(stack.path, deadline) as container:
        stream = pictures_of(container, stack.path, stack.max_side)
        if (stream.sample_aspect_ratio or 1) != 1:
            return False
        frames = decoded(stream, packets_of(container, deadline, stream))
        return all(turn_of(frame) == Turn() for frame in islice(frames, 1))
