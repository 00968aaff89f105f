"""Decoded clips in memory: those used last, up to a budget."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

from mmalign.errors import DataError
from mmalign.video.media import read_frames

if TYPE_CHECKING:
    from collections.abc import Hashable

    from mmalign.config import VideoConfig
    from mmalign.data.example import Clip
    from mmalign.video.frames import Frames
    from mmalign.video.media import Scale


class FrameCache:
    """Frames of clips by what the file is: its path, size and time of change, and the part asked.

    May be used from several threads. What it gives out is shared, so its pixels cannot be written.

    Attributes:
        hits, misses: Lookups so far.
        num_bytes: Pixels held now.
    """

    def __init__(self, settings: VideoConfig, scale: Scale | None = None) -> None:
        """Hold nothing yet; `settings.frame_cache` MiB at most, of frames as `scale` wants them."""
        self.settings, self.scale = settings, scale
        self.budget = settings.frame_cache * 2**20
        self.hits = self.misses = self.num_bytes = 0
        self._kept: OrderedDict[Hashable, Frames] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Clips held."""
        return len(self._kept)

    def get(self, clip: Clip, *, bare: bool = False) -> Frames:
        """The chosen frames of a clip, decoded if they are not held.

        Args:
            clip: Which.
            bare: Without times on them, and so whole where the processor draws them.

        Raises:
            DataError: The file cannot be decoded.
        """
        scale = None if bare and self.scale is not None and self.scale.draws else self.scale
        key = self._key(clip), scale is None
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
                self.hits += 1
                return found
            self.misses += 1
        # Two threads that miss the same clip both decode it, to the same pixels.
        frames = read_frames(clip, self.settings, scale)
        frames.pixels.flags.writeable = False
        self._keep(key, frames)
        return frames

    def _keep(self, key: Hashable, frames: Frames) -> None:
        size = frames.pixels.nbytes
        if size > self.budget:
            return
        with self._lock:
            if key in self._kept:
                return
            self._kept[key] = frames
            self.num_bytes += size
            while self.num_bytes > self.budget:
                _, oldest = self._kept.popitem(last=False)
                self.num_bytes -= oldest.pixels.nbytes

    def _key(self, clip: Clip) -> Hashable:
        try:
            info = clip.path.stat()
        except OSError as error:
            raise DataError(f"{clip.path}: cannot be read: {error.strerror or error}") from error
        asked = clip.start, clip.end, clip.frames, clip.fps, clip.max_pixels
        return clip.path, info.st_size, info.st_mtime_ns, asked
