"""Changes of time: which of a clip's frames is shown at each of its T places.

Each function takes the number of frames T > 1 and a generator, and returns the source of every
place, [T] int64 in [0, T), with what was drawn. None returns the clip as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    Array = np.ndarray[Any, np.dtype[Any]]

Drawn = Mapping[str, Any]


def between(rng: np.random.Generator, low: float, high: float) -> float:
    """A number in [low, high), computed in Python: the same on every processor."""
    return low + (high - low) * float(rng.random())


def one_of(rng: np.random.Generator, low: int, high: int) -> int:
    """A whole number from `low` to `high`, both included."""
    return int(rng.integers(low, high + 1))


def spread(count: int, over: int) -> Array:  # [over]
    """`over` places shared evenly and in order among the numbers 0 to count - 1."""
    return np.arange(over) * count // over


def shuffle(count: int, rng: np.random.Generator) -> tuple[Array, Drawn]:
    """2 to 8 segments of about equal length, in another order."""
    num = one_of(rng, 2, min(8, count))
    parts = np.array_split(np.arange(count), num)
    order = rng.permutation(num)
    while np.array_equal(order, np.arange(num)):
        order = rng.permutation(num)
    return np.concatenate([parts[i] for i in order]), {"segments": num}


def reverse(count: int, rng: np.random.Generator) -> tuple[Array, Drawn]:
    """The last frame first."""
    return np.arange(count)[::-1], {}


def clip_crop(count: int, rng: np.random.Generator) -> tuple[Array, Drawn]:
    """A window of 30 to 70 % of the clip, stretched over it."""
    ratio = between(rng, 0.3, 0.7)
    kept = min(max(round(ratio * count), 1), count - 1)
    start = one_of(rng, 0, count - kept)
    return start + spread(kept, count), {"ratio": kept / count, "start": start}


def shift(count: int, rng: np.random.Generator) -> tuple[Array, Drawn]:
    """The clip begins a quarter to three quarters later and ends with what was left out."""
    least = max(count // 4, 1)
    offset = one_of(rng, least, count - least)
    return np.roll(np.arange(count), -offset), {"offset": offset}


def drop_frames(count: int, rng: np.random.Generator) -> tuple[Array, Drawn]:
    """25 to 50 % of the frames are left out; the others are stretched over the clip."""
    num = _share(count, rng)
    kept = np.sort(rng.permutation(count)[num:])
    return kept[spread(len(kept), count)], {"p": num / count}


def repeat_frame(count: int, rng: np.random.Generator) -> tuple[Array, Drawn]:
    """The clip hangs once: a frame stands in place of the 25 to 50 % of the clip after it."""
    num = _share(count, rng)
    frame = one_of(rng, 0, count - 1 - num)
    source = np.arange(count)
    source[frame : frame + num + 1] = frame
    return source, {"frame": frame, "times": num + 1}


def freeze(count: int, rng: np.random.Generator) -> tuple[Array, Drawn]:
    """One frame all the time: nothing moves."""
    frame = one_of(rng, 0, count - 1)
    return np.full(count, frame), {"frame": frame}


def speed(count: int, rng: np.random.Generator) -> tuple[Array, Drawn]:
    """1.5 to 3 times as fast, then the last frame stays; or as slow, and the end is missing."""
    source = np.arange(count)
    factor = 1.0
    while np.array_equal(source, np.arange(count)):  # a clip of 2 or 3 frames
        factor = between(rng, 1.5, 3.0)
        if rng.random() < 0.5:
            factor = 1.0 / factor
        source = np.minimum(np.floor(np.arange(count) * factor).astype(np.int64), count - 1)
    return source, {"factor": factor}


def some_places(count: int, rng: np.random.Generator) -> Array:
    """25 to 50 % of the places, at least one and never all of them, in order."""
    return np.sort(rng.permutation(count)[: _share(count, rng)])


def _share(count: int, rng: np.random.Generator) -> int:
    return min(max(round(between(rng, 0.25, 0.5) * count), 1), count - 1)


MOVES: dict[str, Callable[[int, np.random.Generator], tuple[Array, Drawn]]] = {
    "shuffle": shuffle,
    "reverse": reverse,
    "clip_crop": clip_crop,
    "shift": shift,
    "drop_frames": drop_frames,
    "repeat_frame": repeat_frame,
    "freeze": freeze,
    "speed": speed,
}
