"""Decoding by torchcodec where it is installed: the same frames by number, the same pixels."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from mmalign.video.container import Deadline, GuardedFile

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mmalign.video.frames import Array
    from mmalign.video.timeline import Timeline


@lru_cache(maxsize=1)
def _decoder() -> Any:
    try:
        from torchcodec.decoders import VideoDecoder  # pyright: ignore[reportMissingImports]
    except (ImportError, OSError, RuntimeError):  # it is there, but its shared libraries are not
        return None
    return VideoDecoder


def pixels_by_torchcodec(
    path: Path, line: Timeline, numbers: Sequence[int], deadline: Deadline, most_bytes: int
) -> Array | None:
    """Frames of a file that PyAV has opened and found whole; None where PyAV must decode it.

    That is where torchcodec is missing or fails, counts other frames or gives them other times, so
    that it never changes what a number means. It does not say which frames were patched up.

    Args:
        path: The file.
        line: Its timeline.
        numbers: Of the frames, in any order; may repeat.
        deadline: Checked at each read.
        most_bytes: Size of the pixels from which on they are left to PyAV, which refuses them.

    Returns:
        [T, H, W, 3] uint8.
    """
    make = _decoder()
    if make is None or line.claimed is not None or not line.packets:
        return None
    wanted = sorted(set(numbers))
    with GuardedFile(path, deadline) as file:
        try:
            decoder = make(file, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
            about = decoder.metadata
            if about.num_frames != len(line):
                return None
            if len(numbers) * about.height * about.width * 3 > most_bytes:
                return None
            found = decoder.get_frames_at(wanted)
        except (RuntimeError, ValueError, IndexError):
            deadline.check()
            return None
    times = np.array([float(line.ticks[number] * line.unit) for number in wanted])
    if np.abs(found.pts_seconds.numpy() - times).max() > 0.5 * float(line.unit):
        return None
    return found.data.numpy()[[wanted.index(number) for number in numbers]]
