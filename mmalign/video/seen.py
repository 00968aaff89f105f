"""What is known of media that were decoded once: sizes, times, lengths, without the content."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from mmalign.video.frames import SOUND_RATE, Frames, Wave

if TYPE_CHECKING:
    from collections.abc import Mapping

    from PIL.Image import Image

    from mmalign.data.example import Clip
    from mmalign.video.frames import Array


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

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """What `to_json` wrote.

        Raises:
            ValueError, TypeError: It is something else.
        """
        height, width = map(int, value["size"])
        seconds, (first, count) = value["seconds"], map(int, value["span"])
        return cls(
            size=(height, width),
            indices=tuple(map(int, value["indices"])),
            times=tuple(map(float, value["times"])),
            fps=float(value["fps"]),
            total=int(value["total"]),
            duration=float(value["duration"]),
            span=(first, count),
            rate=float(value["rate"]),
            seconds=None if seconds is None else float(seconds),
        )

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    def frames(self, clip: Clip) -> Frames:
        """Frames of the right shape and times that show nothing, and take no memory."""
        black = np.broadcast_to(np.zeros((), np.uint8), (len(self.indices), *self.size, 3))
        return Frames(
            pixels=black,
            indices=self.indices,
            times=self.times,
            source_fps=self.fps,
            num_source=self.total,
            duration=self.duration,
            span=self.span,
            area=clip.max_pixels,
            rate=self.rate,
        )

    def image(self) -> Image:
        """A black picture of the size."""
        from PIL import Image

        return Image.new("RGB", (self.size[1], self.size[0]))

    def wave(self) -> Wave | None:
        """Silence of the length; None where there is no sound."""
        if self.seconds is None:
            return None
        return Wave(np.zeros(max(round(self.seconds * SOUND_RATE), 1), np.float32))


class Glimpse:
    """A scale for frames that only have to be there: a pixel of each is kept."""

    draws = False

    def decoded(self, count: int, height: int, width: int, area: int | None) -> tuple[int, int]:
        """One pixel."""
        return 1, 1

    def shrink(self, image: Array, size: tuple[int, int], second: float = 0.0) -> Array:
        """The first one."""
        return image[:1, :1]
