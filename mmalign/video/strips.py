"""What a prompt shows and plays as one picture: frames over their times, sound as a curve."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mmalign.video.frames import Wave
    from mmalign.video.processing import Shown

    Block = Image.Image

_WIDTH = 1000  # of a sheet
_COLUMNS = 8
_SMALL, _LARGE = 64, 152  # sides between which frames are shown
_MOST = 64  # frames of a clip; more are shown in part
_GAP, _LINE, _CURVE = 6, 16, 44
_PAPER, _INK, _SOUND = "#16191f", "#c6ccd8", "#6fb1f2"
_MOST_BYTES = 250_000
_TRIES = ((82, 1.0), (60, 1.0), (40, 0.7), (25, 0.5))  # quality, share of the size; noise is last


def sheet(shown: Shown) -> Image.Image | None:
    """All media of a prompt, below each other; None where there are none."""
    blocks: list[Block] = []
    several = len(shown.clips) + len(shown.sounds) > 1
    for number, ((frames, wave), start) in enumerate(
        zip(shown.clips, shown.starts, strict=True), 1
    ):
        places = _places(len(frames.pixels), _MOST)
        name = f"video {number}" if several else ""
        if len(places) < len(frames.pixels):
            name = f"{name or 'video'}: {len(places)} of its {len(frames.pixels)} frames"
        if name:
            blocks.append(_words(name))
        pictures = [Image.fromarray(frames.pixels[i]) for i in places]
        grid = _grid(pictures, [f"{frames.times[i] - start:.2f} s" for i in places])
        blocks.append(grid)
        if wave is not None:
            blocks.append(_curve(wave, "its sound", grid.width))
    if shown.images:
        names = [f"image {i}" if len(shown.images) > 1 else "" for i in range(1, _MOST + 1)]
        pictures = list(shown.images)[:_MOST]
        blocks.append(_grid(pictures, names[: len(pictures)]))
    for number, wave in enumerate(shown.sounds, 1):
        blocks.append(_curve(wave, f"sound {number}" if several else "sound"))
    return _stacked(blocks) if blocks else None


def compared(own: Shown, altered: Shown) -> Image.Image:
    """What is altered of a prompt's media, as it is and below it as it was made."""
    blocks: list[Block] = []
    before, after = _first_sound(own), _first_sound(altered)
    moved = (
        before is not None
        and after is not None
        and not np.array_equal(before.samples, after.samples)
    )
    for name, shown, wave in (("as it is", own, before), ("altered", altered, after)):
        blocks.append(_words(name))
        if shown.clips:
            pixels = shown.clips[0][0].pixels
            pictures = [Image.fromarray(pixels[i]) for i in _places(len(pixels), _COLUMNS)]
        else:
            pictures = list(shown.images)[:1]
        if pictures:
            blocks.append(_grid(pictures, [""] * len(pictures)))
        if wave is not None and moved:
            blocks.append(_curve(wave, "sound", blocks[-1].width if pictures else _WIDTH))
    return _stacked(blocks)


def write(image: Image.Image, path: Path) -> None:
    """Write a WebP file of at most 250 kB, complete or not at all; of less size if it must be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.tmp")
    for quality, share in _TRIES:
        size = (round(image.width * share), round(image.height * share))
        smaller = image if share == 1.0 else image.resize(size, Image.Resampling.LANCZOS)
        smaller.save(unfinished, format="WEBP", quality=quality)
        if unfinished.stat().st_size <= _MOST_BYTES:
            break
    unfinished.replace(path)


def _places(count: int, most: int) -> list[int]:
    """At most `most` of `count` numbers, evenly spread, both ends among them."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()


def _grid(images: Sequence[Image.Image], labels: Sequence[str]) -> Block:
    """Pictures in rows of eight, or of as many as fit, each over its label."""
    side = min(_LARGE, (_WIDTH + _GAP) // min(len(images), _COLUMNS) - _GAP)
    cells = [_fitted(image, side) for image in images]
    width, height = max(c.width for c in cells), max(c.height for c in cells)
    columns = max(1, (_WIDTH + _GAP) // (width + _GAP))
    columns = min(len(cells), _COLUMNS, columns)
    line = _LINE if any(labels) else 0
    rows = -(-len(cells) // columns)
    size = (columns * (width + _GAP) - _GAP, rows * (height + line + _GAP) - _GAP)
    block = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(block)
    for index, (cell, label) in enumerate(zip(cells, labels, strict=True)):
        left = index % columns * (width + _GAP)
        top = index // columns * (height + line + _GAP)
        block.paste(cell, (left, top))
        draw.text((left, top + height + 1), label, font=_font(), fill=_INK)
    return block


def _fitted(image: Image.Image, side: int) -> Image.Image:
    """RGB, made smaller to `side`; below 64 pixels larger by a whole factor, pixel by pixel."""
    picture = image.convert("RGB")
    longest = max(picture.size)
    if longest > side:
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    elif longest < _SMALL:
        factor = -(-_SMALL // longest)
        size = (picture.width * factor, picture.height * factor)
        picture = picture.resize(size, Image.Resampling.NEAREST)
    return picture


def _first_sound(shown: Shown) -> Wave | None:
    return shown.clips[0][1] if shown.clips else next(iter(shown.sounds), None)


def _curve(wave: Wave, name: str, width: int = _WIDTH) -> Block:
    """The loudest of each column of pixels, around a middle line."""
    block = Image.new("RGB", (max(width, _LARGE), _CURVE + _LINE), _PAPER)
    draw = ImageDraw.Draw(block)
    middle = _CURVE // 2
    parts: list[Any] = np.array_split(np.abs(wave.samples), block.width)
    for column, part in enumerate(parts):
        reach = round(float(part.max(initial=0.0)) * (middle - 1))
        draw.line([(column, middle - reach), (column, middle + reach)], fill=_SOUND)
    text = f"{name}, {wave.seconds:.1f} s"
    draw.text((0, _CURVE + 1), text, font=_font(), fill=_INK)
    return block


def _words(text: str) -> Block:
    block = Image.new("RGB", (round(_font().getlength(text)) + 2, _LINE), _PAPER)
    ImageDraw.Draw(block).text((0, 1), text, font=_font(), fill=_INK)
    return block


def _stacked(blocks: Sequence[Block]) -> Image.Image:
    width = max(block.width for block in blocks) + 2 * _GAP
    height = sum(block.height + _GAP for block in blocks) + _GAP
    page = Image.new("RGB", (width, height), _PAPER)
    top = _GAP
    for block in blocks:
        page.paste(block, (_GAP, top))
        top += block.height + _GAP
    return page


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(12)
