"""Pairs of generated digits, more ink against less, and what generated pictures look like."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mmalign.quickstart.digits import NAMES, ink, prompt, to_pixels

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import nn

    from mmalign.config import RunConfig
    from mmalign.diffusion.inputs import Inputs
    from mmalign.quickstart.digits import Oracle

SAMPLING: dict[str, Any] = {
    "guidance": 2.0,  # 3 and more ruin the base by themselves
    "sampler": "ddim",
    "clip_sample": True,
}
"""How every picture of the demonstration is made, but for the number of steps."""

PAIRS = "pairs.jsonl"
_AT_ONCE = 100


@dataclass(frozen=True, slots=True)
class Shown:
    """Pictures of one model for the same prompts and start noise as those of any other."""

    digits: tuple[int, ...]  # what each should show
    pixels: NDArray[np.float32]  # [N, 8, 8] in [0, 1]
    legible: NDArray[np.bool_]  # [N]

    @property
    def ink(self) -> float:
        """Mean over all pictures."""
        return float(ink(self.pixels).mean())

    @property
    def legibility(self) -> float:
        """Share of the pictures in which the oracle sees the digit."""
        return float(self.legible.mean())

    def first(self, count: int) -> Shown:
        """The first of the pictures."""
        return Shown(self.digits[:count], self.pixels[:count], self.legible[:count])

    def numbers(self) -> dict[str, float]:
        """Both, rounded, for summaries."""
        return {"ink": round(self.ink, 4), "legibility": round(self.legibility, 4)}


class Painter:
    """Draws digits with the base's text encoder and any U-Net of its shape."""

    def __init__(self, config: RunConfig, oracle: Oracle) -> None:
        """Load the base.

        Args:
            config: Of any run on it; how pictures are made stands in `diffusion.sampling`.
            oracle: Judges the pictures.
        """
        from mmalign.core import Needs
        from mmalign.diffusion.inputs import Inputs
        from mmalign.diffusion.models import load_components
        from mmalign.diffusion.process import process_from

        self._oracle = oracle
        components = load_components(config.model, config.diffusion)
        process = process_from(components.scheduler_config)
        self.inputs: Inputs = Inputs(config, Needs(), components, process)
        self.base: nn.Module = components.denoiser

    def paint(
        self,
        model: nn.Module,
        digits: Sequence[int],
        first_seed: int,
        *,
        style: str = "",
        negative_model: nn.Module | None = None,
    ) -> Shown:
        """One picture a digit; picture i has the start noise of seed `first_seed` + i."""
        from mmalign.diffusion.showing import paint

        pictures = paint(
            self.inputs,
            model,
            [prompt(digit, style) for digit in digits],
            seeds=range(first_seed, first_seed + len(digits)),
            negative_model=negative_model,
            batch_size=_AT_ONCE,
        )
        pixels = to_pixels(pictures)
        return Shown(tuple(digits), pixels, self._oracle.legible(pixels, digits))


def each_digit(count: int) -> list[int]:
    """`count` digits, as many of each as can be."""
    return [index % len(NAMES) for index in range(count)]


def write_pairs(
    folder: Path, painter: Painter, first_seed: int, per_digit: int, kept: int
) -> dict[str, float]:
    """Draw digits with neutral prompts; of each, the inkiest against the least inky.

    Args:
        folder: For the pictures, and their records in `pairs.jsonl`.
        painter: Whose base draws.
        first_seed: Of the start noise, and of the pairing.
        per_digit: Pictures of each digit.
        kept: How many of each end become pairs.

    Returns:
        Number of pairs, and the mean and the smallest difference of ink inside them.
    """
    from PIL import Image

    shown = painter.paint(painter.base, each_digit(per_digit * len(NAMES)), first_seed)
    amount, digits = ink(shown.pixels), np.asarray(shown.digits)
    random = np.random.default_rng(first_seed)
    rows: list[dict[str, Any]] = []
    gaps: list[float] = []
    folder.mkdir(parents=True)
    for digit, name in enumerate(NAMES):
        own = np.flatnonzero(digits == digit)
        ranked = own[amount[own].argsort(kind="stable")]
        for number, (more, less) in enumerate(
            zip(ranked[-kept:], random.permutation(ranked[:kept]), strict=True)
        ):
            measured: dict[str, float] = {}
            row: dict[str, Any] = {"id": f"{name}-{number}", "prompt": prompt(digit)}
            for side, index in (("chosen", more), ("rejected", less)):
                levels = np.rint(shown.pixels[index] * 255).astype(np.uint8)
                file = f"{name}-{number}-{side}.png"
                Image.fromarray(levels).save(folder / file)
                row[f"image_{side}"] = file
                measured[f"ink_{side}"] = round(float(amount[index]), 4)
            rows.append(row | {"meta": measured})
            gaps.append(float(amount[more] - amount[less]))
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / PAIRS).write_text(text, encoding="utf-8")
    return {
        "pairs": len(rows),
        "mean_gap": round(float(np.mean(gaps)), 4),
        "smallest_gap": round(min(gaps), 4),
    }
