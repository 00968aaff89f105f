"""Rules for the judges of these configs: functions of a response or an image."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any


def sentiment(response: str) -> float:
    """How happy a text is by VADER's lexicon, from -1 to 1; pip install vaderSentiment."""
    return _vader().polarity_scores(response)["compound"]


def ink(image: Path) -> float:
    """Share of an image that is ink, from 0 to 1."""
    return float(_pixels(image).mean())


def legible(image: Path, prompt: str) -> float:
    """1 where a classifier of real digits sees the one that the prompt asks for, else 0."""
    from mmalign.quickstart.digits import NAMES

    digit = NAMES.index(prompt.split()[-1])
    return float(_oracle().legible(_pixels(image)[None], [digit])[0])


def first_word(response: str, id: str) -> float:
    """1 where an answer begins with the yes or no that the row's id ends in, else 0."""
    return float(response.split()[:1] == [id.rpartition("-")[2]])


def _pixels(image: Path) -> Any:
    import numpy as np
    from PIL import Image

    with Image.open(image) as opened:
        return np.asarray(opened.convert("L"), np.float32) / np.float32(255)


@cache
def _oracle() -> Any:
    from mmalign.quickstart.digits import Oracle, load

    return Oracle(load())


@cache
def _vader() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()
