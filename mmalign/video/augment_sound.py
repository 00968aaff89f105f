"""Changes of the sound, of a given length: a model must hear as many tokens as before."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from mmalign.video.augment_space import normal_quantiles
from mmalign.video.augment_time import Drawn, between, one_of

if TYPE_CHECKING:
    Array = np.ndarray[Any, np.dtype[Any]]

_QUIET = 0.02  # rms of the noise's measure where the sound is quieter
_STEPS = 1 << 15  # the sound's power is taken from whole numbers: the same on every processor


def silence(samples: Array, rng: np.random.Generator) -> tuple[Array, Drawn]:
    """Nothing is heard."""
    return np.zeros_like(samples), {}


def time_shift(samples: Array, rng: np.random.Generator) -> tuple[Array, Drawn]:
    """The sound begins a quarter to three quarters later and ends with what was left out."""
    count = len(samples)
    offset = one_of(rng, count // 4, count - count // 4)
    return np.roll(samples, -offset), {"samples": offset}


def noise(samples: Array, rng: np.random.Generator) -> tuple[Array, Drawn]:
    """White noise of 0.3 to 1.5 times the sound's rms (or of a quiet sound's), then clipped."""
    whole = np.rint(samples * np.float32(_STEPS)).astype(np.int64)
    rms = math.sqrt(int(whole @ whole) / max(len(whole), 1)) / _STEPS
    sigma = between(rng, 0.3, 1.5) * max(rms, _QUIET)
    values = (normal_quantiles() * sigma).astype(np.float32)
    out = values[rng.integers(0, len(values), samples.shape, dtype=np.uint16)]
    out += samples
    return np.clip(out, -1.0, 1.0, out=out), {"sigma": sigma}


def fitted(samples: Array, count: int) -> Array:  # [count]
    """A sound cut to `count` samples, or played again and again until it has so many."""
    return np.resize(samples, count)


SOUNDS: dict[str, Callable[[Array, np.random.Generator], tuple[Array, Drawn]]] = {
    "silence": silence,
    "time_shift": time_shift,
    "noise": noise,
}
