"""Changes of the picture: the same one in every frame of a clip, [T, H, W, 3] uint8 to the same.

Arithmetic is on whole numbers wherever a result could depend on the processor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageFilter

from mmalign.video.augment_time import Drawn, between, one_of

if TYPE_CHECKING:
    Array = np.ndarray[Any, np.dtype[Any]]

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
    return resized(pixels, height, width, box), {
        "area": h * w / (height * width),
        "box": list(box),
    }


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
    drawn = {
        "brightness": brightness,
        "contrast": contrast,
        "saturation": saturation,
        "degrees": degrees,
    }
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


PICTURES: dict[str, Callable[[Array, np.random.Generator], tuple[Array, Drawn]]] = {
    "crop": crop,
    "mask_boxes": mask_boxes,
    "hflip": hflip,
    "vflip": vflip,
    "rotate90": rotate90,
    "color_jitter": color_jitter,
    "grayscale": grayscale,
    "gaussian_noise": gaussian_noise,
    "blur": blur,
}


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
