"""Sheets of digits, enlarged pixel by pixel, black on white as on paper."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from mmalign.diffusion.sheets import sheet, write_picture
from mmalign.quickstart.digits import NAMES, ink

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from mmalign.quickstart.digits_pairs import Shown


def write_same_noise(file: Path, count: int, in_row: int, columns: Mapping[str, Shown]) -> None:
    """The first `count` pictures of each model beside each other, with their ink."""
    many = list(columns.values())
    count = min(count, len(many[0].digits))
    amounts = [ink(shown.pixels[:count]) for shown in many]
    labels = [
        f"{NAMES[digit]}: " + " → ".join(f"{amount[i]:.2f}".lstrip("0") for amount in amounts)
        for i, digit in enumerate(many[0].digits[:count])
    ]
    pictures = [(name, [_on_paper(p) for p in s.pixels[:count]]) for name, s in columns.items()]
    write_picture(sheet(labels, pictures, pairs_in_row=in_row), file)


def write_means(file: Path, before: Shown, after: Shown) -> None:
    """The mean picture of each digit, and where it gained (red) or lost (blue) ink."""
    digits = np.asarray(before.digits)
    known = sorted(set(before.digits))
    means = [
        np.stack([shown.pixels[digits == digit].mean(0) for digit in known])
        for shown in (before, after)
    ]
    columns = [
        ("before", [_on_paper(mean) for mean in means[0]]),
        ("after", [_on_paper(mean) for mean in means[1]]),
        ("change", [_in_colours(change) for change in means[1] - means[0]]),
    ]
    names = [
        f"{NAMES[digit]}: {old.mean():.3f} → {new.mean():.3f}"
        for digit, old, new in zip(known, *means, strict=True)
    ]
    write_picture(sheet(names, columns, pairs_in_row=5), file)


def _on_paper(pixels: NDArray[np.float32]) -> Image.Image:
    """Ink as black on white; the network paints it white on black."""
    return Image.fromarray(np.rint(255 - pixels * 255).astype(np.uint8))


def _in_colours(change: NDArray[np.float32]) -> Image.Image:
    """Gains of ink as red, losses as blue; a change of a quarter has the full colour."""
    share = np.clip(4 * change, -1, 1)[..., None]
    red, blue = np.array([176, 32, 40]), np.array([30, 80, 170])
    colours = np.where(share > 0, red, blue) * abs(share) + 255 * (1 - abs(share))
    return Image.fromarray(np.rint(colours).astype(np.uint8))
