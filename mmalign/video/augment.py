"""Clips that no longer show (or sound like) what an answer says: one operation on a clip.

A changed clip has as many frames of the same size, the same times and as much sound as the
original, so a model reads as many tokens and rows stack. `times` and `indices` stay those of the
original: a model is told an even, rising clock whatever it sees. The note says what was moved.

Operations on frames leave the sound as it is, also those that move frames in time, and operations
on the sound leave the frames.

Source: PaMi-VDPO (arXiv:2504.05810) and RRPO (arXiv:2504.12083) name cropping, shuffling, reversing
and masking 25 to 50 % of frames; the other operations and ranges are ours.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mmalign.errors import ConfigError, DataError, NeedsError
from mmalign.video.augment_sound import SOUNDS, fitted
from mmalign.video.augment_space import PICTURES, resized
from mmalign.video.augment_time import MOVES, Drawn, some_places, spread
from mmalign.video.frames import Frames, Wave

if TYPE_CHECKING:
    Array = np.ndarray[Any, np.dtype[Any]]
    Donor = tuple[Frames, Wave | None]

NEEDS_DONOR = frozenset({"replace_frames", "swap_video", "swap_audio"})
NEEDS_SOUND = frozenset({*SOUNDS, "swap_audio"})
NEEDS_TIME = frozenset({*MOVES, "replace_frames", "mask_frames"})  # more than one frame
OPERATIONS = frozenset({*PICTURES, *NEEDS_DONOR, *NEEDS_SOUND, *NEEDS_TIME})

_DRAWS = 4  # tries to change a clip that happens to look the same afterwards


@dataclass(frozen=True, slots=True)
class Augmented:
    """A changed clip.

    Attributes:
        frames: As many as before, of the same size, with the original's times and indices.
        wave: As many samples as before; None where there was no sound.
        operation: What was done.
        note: What was drawn, ready for JSON. `changed`: whether anything differs from the original.
            `source`: for operations in time, the place in the original of each frame now shown.
            `places`: those masked or taken from the donor; `donor_source`: the places in the donor.
    """

    frames: Frames
    wave: Wave | None
    operation: str
    note: Mapping[str, Any]


def seed_for(seed: int, row: str, visit: int, candidate: int) -> int:
    """A 63-bit number for one changed clip, the same wherever and whenever it is made.

    Args:
        seed: Of the run.
        row: The example's id.
        visit: How often the row was seen before.
        candidate: Number of the clip within the row.
    """
    key = json.dumps([int(seed), row, int(visit), int(candidate)]).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


def rng_for(seed: int, row: str, visit: int, candidate: int) -> np.random.Generator:
    """The random numbers of one changed clip, started by `seed_for`."""
    return np.random.default_rng(seed_for(seed, row, visit, candidate))


def augment(
    frames: Frames,
    wave: Wave | None,
    operation: str,
    rng: np.random.Generator,
    *,
    donor: Donor | None = None,
) -> Augmented:
    """The clip under one operation; it differs from the original wherever that is possible.

    Args:
        frames: The original's, not changed.
        wave: The original's sound, or None.
        operation: One of `Operation`.
        rng: Decides all parameters.
        donor: Frames and sound of another row, for `NEEDS_DONOR`.

    Raises:
        ConfigError: There is no such operation.
        DataError: The clip has one frame or no sound, and the operation needs more.
        NeedsError: It needs a donor, or the donor's sound, and there is none.
    """
    _check(frames, wave, operation, donor)
    for _ in range(_DRAWS):
        if operation in NEEDS_SOUND:
            assert wave is not None, "checked"
            samples, note = _heard(wave.samples, operation, rng, donor)
            changed = not np.array_equal(samples, wave.samples)
            result = Augmented(frames, Wave(samples), operation, {"changed": changed, **note})
        else:
            pixels, note = _seen(frames.pixels, operation, rng, donor)
            changed = not np.array_equal(pixels, frames.pixels)
            shown = replace(frames, pixels=pixels)
            result = Augmented(shown, wave, operation, {"changed": changed, **note})
        if changed:
            break
    return result  # pyright: ignore[reportPossiblyUnboundVariable]


def _check(frames: Frames, wave: Wave | None, operation: str, donor: Donor | None) -> None:
    if operation not in OPERATIONS:
        raise ConfigError(
            f"video.corruption.operations: there is no '{operation}'; there are "
            f"{', '.join(sorted(OPERATIONS))}"
        )
    if operation in NEEDS_TIME and len(frames.pixels) < 2:
        raise DataError(
            f"'{operation}' moves or hides some frames of several, but the clip has "
            f"{len(frames.pixels)}; raise video.num_frames, or leave it out of "
            "video.corruption.operations"
        )
    if operation in NEEDS_SOUND and wave is None:
        raise DataError(
            f"'{operation}' changes the sound, but the clip has none; leave it out of "
            "video.corruption.operations, or use a model that hears and clips with sound"
        )
    if operation in NEEDS_DONOR and donor is None:
        raise NeedsError(
            f"'{operation}' takes from another row's clip, but none was given; leave it out of "
            "video.corruption.operations for data of one row"
        )
    if operation == "swap_audio" and donor is not None and donor[1] is None:
        raise NeedsError(
            "'swap_audio' takes the sound of another row's clip, but that clip has none; take a "
            "row with sound"
        )


def _seen(
    pixels: Array, operation: str, rng: np.random.Generator, donor: Donor | None
) -> tuple[Array, Drawn]:
    count, height, width = pixels.shape[:3]
    if operation in MOVES:
        source, drawn = MOVES[operation](count, rng)
        return pixels[source], {"source": source.tolist(), **drawn}
    if operation in PICTURES:
        return PICTURES[operation](pixels, rng)
    places = np.arange(count) if operation == "swap_video" else some_places(count, rng)
    note = {"places": places.tolist()}
    out = pixels.copy()
    if operation == "mask_frames":
        out[places] = 0
        return out, note
    assert donor is not None, "checked"
    source = spread(len(donor[0].pixels), count)[places]
    out[places] = resized(donor[0].pixels[source], height, width)
    return out, {**note, "donor_source": source.tolist()}


def _heard(
    samples: Array, operation: str, rng: np.random.Generator, donor: Donor | None
) -> tuple[Array, Drawn]:
    if operation in SOUNDS:
        return SOUNDS[operation](samples, rng)
    other = donor[1] if donor is not None else None
    assert other is not None, "checked"
    return fitted(other.samples, len(samples)), {"donor_seconds": other.seconds}
