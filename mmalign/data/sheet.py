"""Sheets of images: grids with labels, and models side by side for the same prompts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from mmalign.safe import replacing

if TYPE_CHECKING:
    from PIL import ImageFont
    from PIL.Image import Image

_SMALL, _LARGE = 96, 256  # sides between which images are shown
_GAP, _PAPER, _INK, _SOFT = 8, "white", "#1b1f27", "#505968"
_MAX_LINES = 3
_PAGE = 1100  # width of a sheet


def grid(images: Sequence[Image], columns: int, labels: Sequence[str] | None = None) -> Image:
    """Images row by row, each over its label.

    Args:
        images: Of any sizes; small ones are enlarged by a whole factor without smoothing, large
            ones made smaller.
        columns: Images in a row.
        labels: Text under each image; None for none.

    Raises:
        ValueError: No images, or as many labels as there are not images.
    """
    if not images or columns < 1:
        raise ValueError("a grid needs at least one image and one column")
    names = [""] * len(images) if labels is None else labels
    cells = [_captioned([image], name) for image, name in zip(images, names, strict=True)]
    return arranged(cells, columns)


def sheet(
    prompts: Sequence[str],
    columns: Sequence[tuple[str, Sequence[Image]]],
    *,
    pairs_in_row: int | None = None,
) -> Image:
    """The same prompts under several models, side by side, each prompt below its images.

    Args:
        prompts: One a row of images.
        columns: Name of a model and its images, one a prompt, e.g. ("reference", [...]).
        pairs_in_row: Prompts beside each other; by default as many as fit into about 1100 pixels.

    Raises:
        ValueError: Columns of other lengths than the prompts.
    """
    if not prompts or any(len(images) != len(prompts) for _, images in columns):
        raise ValueError("a sheet needs one image of each model for each prompt")
    names = [name for name, _ in columns]
    cells = [
        _captioned([images[i] for _, images in columns], prompt, names)
        for i, prompt in enumerate(prompts)
    ]
    widest = max(cell.width for cell in cells) + 2 * _GAP
    return arranged(cells, pairs_in_row or max(1, _PAGE // widest))


def write_image(image: Image, path: Path) -> Path:
    """Write a PNG file, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")
    return path


def fitted(image: Image, small: int = _SMALL, large: int = _LARGE) -> Image:
    """The image as RGB at a size that can be looked at.

    Args:
        image: Of any size and mode.
        small: Images below it become larger by a whole factor, pixel by pixel.
        large: Images above it become smaller. Both are pixels of the longer side.
    """
    from PIL.Image import Resampling

    fit = image.convert("RGB")
    longest = max(fit.size)
    if longest < small:
        factor = -(-small // longest)
        return fit.resize((fit.width * factor, fit.height * factor), Resampling.NEAREST)
    if longest > large:
        fit.thumbnail((large, large), Resampling.LANCZOS)
    return fit


def _captioned(images: Sequence[Image], caption: str, names: Sequence[str] = ()) -> Image:
    """Images beside each other, their names above and the caption below."""
    from PIL import Image as pil
    from PIL import ImageDraw

    pictures = [fitted(image) for image in images]
    width = sum(p.width + _GAP for p in pictures) - _GAP
    width = max(width, 2 * _SMALL if names else 0)
    small, normal = _font(11), _font(12)
    lines = _wrapped(caption, normal, width)
    head, line = (15 if names else 0), 16
    height = head + max(p.height for p in pictures) + (4 + line * len(lines) if lines else 0)
    cell = pil.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(cell)
    left = 0
    for index, picture in enumerate(pictures):
        if names:
            draw.text((left, 0), names[index], font=small, fill=_SOFT)
        cell.paste(picture, (left, head))
        left += picture.width + _GAP
    for index, text in enumerate(lines):
        top = height - line * (len(lines) - index)
        draw.text((0, top), text, font=normal, fill=_INK)
    return cell


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """A font that every installation has; matplotlib brings it, with Greek and Cyrillic."""
    import matplotlib as mpl
    from PIL import ImageFont

    return ImageFont.truetype(Path(mpl.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", size)


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines of at most `width` pixels, at most three; what does not fit ends in an ellipsis."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > _MAX_LINES:
        lines = [*lines[: _MAX_LINES - 1], f"{lines[_MAX_LINES - 1]} ..."]
    return [_cut(line, font, width) for line in lines]


def _cut(line: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(line) <= width:
        return line
    stem = line.removesuffix(" ...")
    while stem and font.getlength(f"{stem}...") > width:
        stem = stem[:-1]
    return f"{stem}..."


def arranged(
    cells: Sequence[Image],
    columns: int,
    *,
    gap: int = 2 * _GAP,
    margin: int = 2 * _GAP,
    paper: str = _PAPER,
) -> Image:
    """Cells in rows; a column is as wide as its widest cell, a row as high as its highest.

    Args:
        cells: Of any sizes.
        columns: Cells in a row.
        gap: Pixels between cells.
        margin: Pixels around all of them.
        paper: Colour behind them.
    """
    from PIL import Image as pil

    columns = min(columns, len(cells))
    widths = [max(cell.width for cell in cells[j::columns]) for j in range(columns)]
    starts = range(0, len(cells), columns)
    heights = [max(cell.height for cell in cells[i : i + columns]) for i in starts]
    lefts = list(accumulate((width + gap for width in widths), initial=margin))
    tops = list(accumulate((height + gap for height in heights), initial=margin))
    page = pil.new("RGB", (lefts[-1] - gap + margin, tops[-1] - gap + margin), paper)
    for i, cell in enumerate(cells):
        page.paste(cell, (lefts[i % columns], tops[i // columns]))
    return page
