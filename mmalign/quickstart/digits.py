"""Real handwritten digits, a judge of legibility, and the small diffusion model that draws them.

The real ones: 1,797 images of 8 x 8 pixels by many hands, as scikit-learn ships them.

Source: UCI "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as pil

from mmalign.config import RunConfig
from mmalign.data.jobs import write_lines
from mmalign.data.sheet import sheet, write_image

if TYPE_CHECKING:
    from torch import nn

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDE = 8  # pixels
BASE = Path(__file__).parent / "digits_model"
"""The model's pipeline folder; its README says how it was made."""

SAMPLING: dict[str, Any] = {
    "guidance": 2.0,  # 3 and more ruin the base by themselves
    "sampler": "ddim",
    "clip_sample": True,
}
"""How every image is drawn, but for the number of steps."""

PAIRS = "pairs.jsonl"
AT_ONCE = 100  # images
_NUM_TEST = 360


@dataclass(frozen=True, slots=True)
class Digits:
    """The real images and what they show."""

    pixels: NDArray[np.float32]  # [N, 8, 8] in [0, 1]; 1 is ink
    digits: NDArray[np.int64]  # [N], 0 to 9


@cache
def load() -> Digits:
    """The real images."""
    from sklearn.datasets import load_digits

    given: Any = load_digits()
    return Digits((given.images / 16).astype(np.float32), given.target.astype(np.int64))


class Oracle:
    """Says which digit an image shows; a digit is legible when the oracle names it.

    A support vector machine on the raw pixels, trained on 1,437 real images.
    """

    def __init__(self, digits: Digits) -> None:
        from sklearn.svm import SVC

        order = np.random.default_rng(0).permutation(len(digits.digits))
        test, train = order[:_NUM_TEST], order[_NUM_TEST:]
        flat = digits.pixels.reshape(len(order), -1)
        self._model: Any = SVC(C=10)  # a larger gamma than the default finds good samples illegible
        self._model.fit(flat[train], digits.digits[train])
        self.accuracy = float(self._model.score(flat[test], digits.digits[test]))

    def legible(self, pixels: NDArray[np.float32], digits: Sequence[int]) -> NDArray[np.bool_]:
        """Whether each image [N, 8, 8] shows its digit, [N]."""
        named = self._model.predict(pixels.reshape(len(pixels), -1))
        return np.asarray(named == np.asarray(digits))

    def look(self, digits: Sequence[int], pixels: NDArray[np.float32]) -> Shown:
        """Images [N, 8, 8] with what each should show and whether it does."""
        return Shown(tuple(digits), pixels, self.legible(pixels, digits))


def ink(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mean of the pixels of each image [N, 8, 8], [N]; 0 is empty and 1 is full."""
    return pixels.reshape(len(pixels), -1).mean(1).astype(np.float32)


def prompt(digit: int, style: str = "") -> str:
    """What an image is called, e.g. `a bold handwritten seven`; neutral without a style."""
    return " ".join(["a", *([style] if style else []), "handwritten", NAMES[digit]])


def each_digit(count: int) -> list[int]:
    """`count` digits, as many of each as can be."""
    return [index % len(NAMES) for index in range(count)]


@dataclass(frozen=True, slots=True)
class Shown:
    """Images of one model for the same prompts and start noise as those of any other."""

    digits: tuple[int, ...]  # what each should show
    pixels: NDArray[np.float32]  # [N, 8, 8] in [0, 1]
    legible: NDArray[np.bool_]  # [N]

    @property
    def ink(self) -> NDArray[np.float32]:
        """Of each image, [N]."""
        return ink(self.pixels)


class Painter:
    """Draws digits with the base's text encoder and any U-Net of its shape."""

    def __init__(self, config: RunConfig) -> None:
        """Load the base.

        Args:
            config: Of any run on it; how images are made stands in `diffusion.sampling`.
        """
        from mmalign.core import Needs
        from mmalign.diffusion.components import load_components
        from mmalign.diffusion.inputs import Inputs

        components = load_components(config.model, config.diffusion)
        process = components.process(config.diffusion)
        self._inputs = Inputs(config, Needs(), components, process)
        self.base: nn.Module = components.denoiser.eval()

    def paint(
        self,
        model: nn.Module,
        digits: Sequence[int],
        seeds: Sequence[int],
        *,
        negative_model: nn.Module | None = None,
    ) -> NDArray[np.float32]:
        """One image a digit, [N, 8, 8] in [0, 1]; no image depends on the others.

        Args:
            model: The U-Net, in evaluation mode.
            digits: What to draw.
            seeds: Of the start noise of each.
            negative_model: A second U-Net for the empty prompt.
        """
        import torch

        from mmalign.diffusion.sample import generate

        inputs, cpu = self._inputs, torch.device("cpu")
        images = generate(
            model,
            inputs.components,
            inputs.vae,
            inputs.config.diffusion,
            inputs.embed([prompt(digit) for digit in digits], cpu),
            inputs.empty(cpu),
            seeds=seeds,
            negative_model=negative_model,
            batch_size=AT_ONCE,
        )
        return np.stack([np.asarray(i.convert("L"), np.float32) / np.float32(255) for i in images])


@dataclass(frozen=True, slots=True)
class Painting:
    """What a process is asked to draw.

    Attributes:
        config: Of any run on the base.
        model: Folder of a trained U-Net; None is the base.
        digits: What to draw.
        seeds: Of the start noise of each.
    """

    config: RunConfig
    model: Path | None
    digits: Sequence[int]
    seeds: Sequence[int]


_painters: dict[str, Painter] = {}


def paint(asked: Painting) -> NDArray[np.float32]:
    """The images [N, 8, 8]; a process loads the base once."""
    from mmalign.diffusion.components import load_denoiser

    config = asked.config
    painter = _painters.get(config.model_dump_json())
    if painter is None:
        painter = _painters[config.model_dump_json()] = Painter(config)
    model = load_denoiser(str(asked.model), config.model) if asked.model else painter.base
    return painter.paint(model, asked.digits, asked.seeds)


def write_pairs(folder: Path, shown: Shown, pairs: Iterable[tuple[int, int, str]]) -> Path:
    """Write images, and the file of records that prefers some to others.

    Args:
        folder: A new one.
        shown: The images.
        pairs: Index of the preferred image, of the other, and the pair's split or "" for none.
    """
    folder.mkdir(parents=True)
    amount = shown.ink
    rows: list[dict[str, Any]] = []
    for number, (chosen, rejected, split) in enumerate(pairs):
        row: dict[str, Any] = {
            "id": f"{number:03d}-{NAMES[shown.digits[chosen]]}",
            "prompt": prompt(shown.digits[chosen]),
            "meta": {},
        } | ({"split": split} if split else {})
        for side, index in (("chosen", chosen), ("rejected", rejected)):
            row[f"image_{side}"] = f"{row['id']}-{side}.png"
            row["meta"][f"ink_{side}"] = round(float(amount[index]), 4)
            levels = np.rint(shown.pixels[index] * 255).astype(np.uint8)
            pil.fromarray(levels).save(folder / row[f"image_{side}"])
        rows.append(row)
    write_lines(folder / PAIRS, rows)
    return folder / PAIRS


# Sheets of digits, enlarged pixel by pixel, black on white as on paper.


def write_same_noise(file: Path, count: int, in_row: int, columns: Mapping[str, Shown]) -> None:
    """The first `count` images of each model beside each other, with their ink."""
    digits = next(iter(columns.values())).digits[:count]
    labels = [
        f"{NAMES[digit]}: " + " → ".join(f"{s.ink[i]:.2f}".lstrip("0") for s in columns.values())
        for i, digit in enumerate(digits)
    ]
    images = [
        (name, [_on_paper(p) for p in s.pixels[: len(digits)]]) for name, s in columns.items()
    ]
    write_image(sheet(labels, images, pairs_in_row=in_row), file)


def write_changes(file: Path, in_row: int, base: Shown, arms: Mapping[str, Shown]) -> None:
    """The mean image of each digit, and where each model gained (red) or lost (blue) ink."""
    digits = np.asarray(base.digits)
    known = sorted(set(base.digits))

    def means(shown: Shown) -> list[NDArray[np.float32]]:
        return [shown.pixels[digits == digit].mean(0) for digit in known]

    start = means(base)
    columns = [("base", [_on_paper(mean) for mean in start])]
    for name, shown in arms.items():
        changes = [new - old for new, old in zip(means(shown), start, strict=True)]
        columns.append((f"change, {name}", [_in_colours(change) for change in changes]))
    write_image(sheet([NAMES[digit] for digit in known], columns, pairs_in_row=in_row), file)


def _on_paper(pixels: NDArray[np.float32]) -> pil.Image:
    """Ink as black on white; the network paints it white on black."""
    return pil.fromarray(np.rint(255 - pixels * 255).astype(np.uint8))


def _in_colours(change: NDArray[np.float32]) -> pil.Image:
    """Gains of ink as red, losses as blue; a change of a quarter has the full colour."""
    share = np.clip(4 * change, -1, 1)[..., None]
    red, blue = np.array([176, 32, 40]), np.array([30, 80, 170])
    colours = np.where(share > 0, red, blue) * abs(share) + 255 * (1 - abs(share))
    return pil.fromarray(np.rint(colours).astype(np.uint8))
