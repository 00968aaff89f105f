"""Clips that no longer show what an answer says: frames, time and sound changed."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from statistics import NormalDist
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from mmalign.errors import ConfigError, DataError, NeedsError
from mmalign.video.sizes import Array, Frames, Wave

# Each function takes the number of frames T > 1 and a generator, and returns the source of every
# place, [T] int64 in [0, T), with what was drawn. None returns the clip as it was.

Drawn = Mapping[str, Any]
Altering = Callable[[Any, np.random.Generator], tuple[Array, Drawn]]


def _by_name(*changes: Altering) -> dict[str, Altering]:
    return {change.__name__: change for change in changes}


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


def _share(count: int, rng: np.random.Generator) -> int:
    """25 to 50 % of the places, at least one and never all of them."""
    return min(max(round(between(rng, 0.25, 0.5) * count), 1), count - 1)


MOVES = _by_name(shuffle, reverse, clip_crop, shift, drop_frames, repeat_frame, freeze, speed)


# Changes of the image: the same one in every frame of a clip, [T, H, W, 3] uint8 to the same.
#
# Arithmetic is on whole numbers wherever a result could depend on the processor.

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_UNIT = 1 << 10  # of fixed-point factors
_GRAY = 128  # what contrast turns about


def resized(
    pixels: Array, height: int, width: int, box: tuple[int, int, int, int] | None = None
) -> Array:
    """Frames brought to a size, bilinear with antialiasing; sides may be stretched unequally.

    Args:
        pixels: [T, h, w, 3] uint8.
        height: Of the result.
        width: Of the result.
        box: (left, upper, right, lower) of the part that is taken; None: all of it.
    """
    if box is None and pixels.shape[1:3] == (height, width):
        return np.ascontiguousarray(pixels)
    return _each(
        pixels, lambda f: f.resize((width, height), Image.Resampling.BILINEAR, box=box)
    )  # [T, height, width, 3]


def crop(pixels: Array, rng: np.random.Generator) -> tuple[Array, Drawn]:
    """One box of 20 to 60 % of the area, in the frame's proportions, brought back to its size."""
    height, width = pixels.shape[1:3]
    side = math.sqrt(between(rng, 0.2, 0.6))
    h, w = max(round(side * height), 1), max(round(side * width), 1)
    top, left = one_of(rng, 0, height - h), one_of(rng, 0, width - w)
    box = (left, top, left + w, top + h)
    return resized(pixels, height, width, box), {"area": h * w / (height * width), "box": list(box)}


def mask_boxes(pixels: Array, rng: np.random.Generator) -> tuple[Array, Drawn]:
    """25 to 50 % of the cells of a grid in black; a cell is 1/8 to 1/4 of the shorter side."""
    height, width = pixels.shape[1:3]
    size = max(round(between(rng, 1 / 8, 1 / 4) * min(height, width)), 1)
    rows, columns = -(-height // size), -(-width // size)
    count = rows * columns
    num = max(round(between(rng, 0.25, 0.5) * count), 1)
    hidden = np.zeros(count, dtype=bool)
    hidden[rng.permutation(count)[:num]] = True
    cells = np.repeat(np.repeat(hidden.reshape(rows, columns), size, 0), size, 1)
    out = pixels * ~cells[None, :height, :width, None]
    return out, {"p": num / count, "size": size}


def hflip(pixels: Array, rng: np.random.Generator) -> tuple[Array, Drawn]:
    """Left and right exchanged."""
    return np.ascontiguousarray(pixels[:, :, ::-1]), {}


def vflip(pixels: Array, rng: np.random.Generator) -> tuple[Array, Drawn]:
    """Upside down."""
    return np.ascontiguousarray(pixels[:, ::-1]), {}


def rotate90(pixels: Array, rng: np.random.Generator) -> tuple[Array, Drawn]:
    """A quarter turn to the left or right; a frame that is no square is stretched to its size."""
    quarters = 1 if rng.random() < 0.5 else 3  # counterclockwise
    height, width = pixels.shape[1:3]
    return resized(np.rot90(pixels, quarters, axes=(1, 2)), height, width), {
        "degrees": 90 * quarters
    }


def color_jitter(pixels: Array, rng: np.random.Generator) -> tuple[Array, Drawn]:
    """Brightness, contrast and saturation times 0.5 to 0.8 or 1.25 to 2, hue turned 30 to 180."""
    brightness, contrast, saturation = (_away_from_one(rng) for _ in range(3))
    degrees = between(rng, 30.0, 180.0) * (1 if rng.random() < 0.5 else -1)
    chroma = _hue(degrees)  # [3, 3]: keeps the luma, turns what is left of a color after it
    luma = np.tile(_LUMA, (3, 1))
    mix = brightness * contrast * (luma + saturation * (chroma - luma))
    drawn = dict(brightness=brightness, contrast=contrast, saturation=saturation, degrees=degrees)
    return _mixed(pixels, mix, _GRAY * (1.0 - contrast)), drawn


def grayscale(pixels: Array, rng: np.random.Generator) -> tuple[Array, Drawn]:
    """Luma alone, in all three channels."""
    tall = Image.fromarray(np.ascontiguousarray(pixels).reshape(-1, *pixels.shape[2:]))
    gray = np.asarray(tall.convert("L")).reshape(pixels.shape[:3])
    return np.repeat(gray[..., None], 3, axis=-1), {}


def gaussian_noise(pixels: Array, rng: np.random.Generator) -> tuple[Array, Drawn]:
    """Independent normal noise of 10 to 30 % of the range of values."""
    sigma = between(rng, 25.5, 76.5)  # of 255
    levels = np.rint(normal_quantiles() * sigma).astype(np.int16)
    out = levels[rng.integers(0, len(levels), pixels.shape, dtype=np.uint16)]
    out += pixels
    return np.clip(out, 0, 255, out=out).astype(np.uint8), {"sigma": sigma}


def blur(pixels: Array, rng: np.random.Generator) -> tuple[Array, Drawn]:
    """The mean of a box whose radius is 1/40 to 1/16 of the shorter side, at least 1 pixel."""
    radius = max(between(rng, 1 / 40, 1 / 16) * min(pixels.shape[1:3]), 1.0)
    return _each(pixels, lambda f: f.filter(ImageFilter.BoxBlur(radius))), {"radius": radius}


PICTURES = _by_name(
    crop, mask_boxes, hflip, vflip, rotate90, color_jitter, grayscale, gaussian_noise, blur
)


@cache
def normal_quantiles() -> Array:  # [4096]
    """The standard normal distribution in 4096 equally likely values, to 5 decimals."""
    count = 4096
    values = [NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)]
    out = np.round(values, 5)
    out.setflags(write=False)
    return out


def _each(pixels: Array, change: Callable[[Image.Image], Image.Image]) -> Array:
    return np.stack([np.asarray(change(Image.fromarray(np.ascontiguousarray(f)))) for f in pixels])


def _away_from_one(rng: np.random.Generator) -> float:
    factor = between(rng, 0.5, 0.8)
    return factor if rng.random() < 0.5 else 1.0 / factor


def _hue(degrees: float) -> Array:  # [3, 3]
    """A turn of the color plane of YIQ."""
    to_yiq = np.array([_LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)])
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turn = np.array([[1.0, 0.0, 0.0], [0.0, cos, -sin], [0.0, sin, cos]])
    return np.linalg.solve(to_yiq, turn @ to_yiq)


def _mixed(pixels: Array, factors: Array, offset: float) -> Array:
    """Channels out = factors in + offset, in fixed point."""
    fixed = np.rint(factors * _UNIT).astype(np.int32)
    start = np.int32(round(offset * _UNIT) + _UNIT // 2)
    channels = [pixels[..., i].astype(np.int32) for i in range(3)]
    out = np.empty_like(pixels)
    for target, row in enumerate(fixed):
        value = channels[0] * row[0]
        value += channels[1] * row[1]
        value += channels[2] * row[2]
        value += start
        value >>= 10
        out[..., target] = np.clip(value, 0, 255, out=value)
    return out


# Changes of the sound, of a given length: a model must hear as many tokens as before.

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


SOUNDS = _by_name(silence, time_shift, noise)


# A changed clip has as many frames of the same size, the same times and as much sound as the
# original, so a model reads as many tokens and rows stack. `times` and `indices` stay those of the
# original: a model is told an even, rising clock whatever it sees. The note says what was moved.
#
# Operations on frames leave the sound as it is, also those that move frames in time, and operations
# on the sound leave the frames.
#
# Source: PaMi-VDPO (arXiv:2504.05810) and RRPO (arXiv:2504.12083) name cropping, shuffling,
# reversing and masking 25 to 50 % of frames; the other operations and ranges are ours.

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
            "video.corruption.operations, or use a model with audio input and clips with audio"
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
    places = np.arange(count)
    if operation != "swap_video":  # 25 to 50 % of them, in order
        places = np.sort(rng.permutation(count)[: _share(count, rng)])
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
    # Cut, or played again and again until it is long enough.
    return np.resize(other.samples, len(samples)), {"donor_seconds": other.seconds}
