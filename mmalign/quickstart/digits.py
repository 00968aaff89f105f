"""Real handwritten digits: pictures, prompts, ink, and a judge of legibility.

1,797 pictures of 8 x 8 pixels by many hands, as scikit-learn ships them.

Source: UCI "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from mmalign.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from PIL.Image import Image

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
STYLES = ("light", "medium", "bold")
SIDE = 8  # pixels
_LEVELS = 16.0  # a pixel is between 0 and this
_NUM_TEST = 360


@dataclass(frozen=True, slots=True)
class Digits:
    """All pictures, what they show, and how much ink each has among its own kind."""

    pixels: NDArray[np.float32]  # [N, 8, 8] in [0, 1]; 1 is ink
    digits: NDArray[np.int64]  # [N], 0 to 9
    styles: NDArray[np.int64]  # [N], third of the ink among the pictures of the same digit


class Oracle:
    """Says which digit a picture shows; a digit is legible when the oracle names it.

    A support vector machine on the raw pixels, trained on 1,437 pictures.
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
        """Whether each picture [N, 8, 8] shows its digit, [N]."""
        named = self._model.predict(pixels.reshape(len(pixels), -1))
        return np.asarray(named == np.asarray(digits))


@cache
def load() -> Digits:
    """The pictures.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError(
            "the digits of `mmalign quickstart diffusion` come with scikit-learn, which is not "
            "installed. Run: pip install 'mmalign[quickstart]'"
        ) from error
    given: Any = load_digits()
    pixels = (given.images / _LEVELS).astype(np.float32)
    digits = given.target.astype(np.int64)
    styles = np.zeros(len(digits), np.int64)
    amount = ink(pixels)
    for digit in range(len(NAMES)):
        own = np.flatnonzero(digits == digit)
        rank = amount[own].argsort(kind="stable").argsort(kind="stable")
        styles[own] = rank * len(STYLES) // len(own)
    return Digits(pixels, digits, styles)


def ink(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mean of the pixels of each picture [N, 8, 8], [N]; 0 is empty and 1 is full."""
    return pixels.reshape(len(pixels), -1).mean(1).astype(np.float32)


def ink_of_styles(digits: Digits) -> dict[str, float]:
    """Mean ink of the real pictures of each style."""
    amount = ink(digits.pixels)
    means = [float(amount[digits.styles == index].mean()) for index in range(len(STYLES))]
    return {style: round(mean, 4) for style, mean in zip(STYLES, means, strict=True)}


def prompt(digit: int, style: str = "") -> str:
    """What a picture is called, e.g. `a bold handwritten seven`; neutral without a style."""
    return " ".join(["a", *([style] if style else []), "handwritten", NAMES[digit]])


def to_pixels(pictures: Sequence[Image]) -> NDArray[np.float32]:
    """Generated pictures as [N, 8, 8] in [0, 1]."""
    shades = np.stack([np.asarray(picture.convert("L")) for picture in pictures])
    return shades.astype(np.float32) / np.float32(255)
