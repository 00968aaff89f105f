"""Decoded media: frames with their times, and sound in step with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    Array = np.ndarray[Any, np.dtype[Any]]

SOUND_RATE = 16_000  # Hz


@dataclass(frozen=True, slots=True)
class Frames:
    """Chosen frames of a clip.

    Attributes:
        pixels: [T, H, W, 3] uint8, RGB.
        indices: Number of each frame in the file, in display order, from 0.
        times: Seconds from the start of the file at which each is shown.
        source_fps: Average frames a second of the file.
        num_source: Frames of the file (by its header or its end).
        duration: Seconds of the file.
        span: Number of the first frame of the clip's part of the file, and how many that has;
            None: the whole file.
        area: Most pixels a frame, of this clip alone; None: as the config says.
        size: Height and width of the file's frames, before they were made smaller; None: as here.
        rate: Frames a second by the file's header; None: `source_fps`.
        drawn: Whether the time of each is drawn on it, as the model's processor does it.
    """

    pixels: Array
    indices: tuple[int, ...]
    times: tuple[float, ...]
    source_fps: float
    num_source: int
    duration: float
    span: tuple[int, int] | None = None
    area: int | None = None
    size: tuple[int, int] | None = None
    rate: float | None = None
    drawn: bool = False

    @property
    def fps(self) -> float:
        """Average rate of the chosen frames, a second; the file's where there is only one."""
        span = self.times[-1] - self.times[0] if len(self.times) > 1 else 0.0
        return (len(self.times) - 1) / span if span > 0 else self.source_fps


@dataclass(frozen=True, slots=True)
class Wave:
    """Mono sound in [-1, 1] at `SOUND_RATE`."""

    samples: Array  # [S] float32

    @property
    def seconds(self) -> float:
        """Length."""
        return len(self.samples) / SOUND_RATE
