"""Tiny data sets of images of every kind that a method reads, written on the spot."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WORDS = ("cat", "dog", "red")  # one token each of the tiny pipelines' tokenizer


def picture(folder: Path, name: str, *, size: tuple[int, int] = (32, 32), seed: int = 0) -> str:
    """A smooth, coloured png of height and width `size`; returns its name."""
    height, width = size
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width] / max(height, width)
    waves = [np.sin(2 * np.pi * (a * rows + b * columns + c)) for a, b, c in 3 * rng.random((3, 3))]
    pixels = (127.5 + 127.5 * np.stack(waves, axis=-1)).round().astype(np.uint8)
    Image.fromarray(pixels).save(folder / name)
    return name


def caption(number: int) -> str:
    """Another one for each of the first few numbers."""
    return f"a {WORDS[number % 3]} and {number // 3} more"


def pairs(folder: Path, num: int, **of_pictures: Any) -> Path:
    """prompt, image_chosen, image_rejected."""
    return _jsonl(folder, num, lambda i: {"prompt": caption(i), **_two(folder, i, of_pictures)})


def scored_pairs(folder: Path, num: int, **of_pictures: Any) -> Path:
    """The same with p_chosen, a share between 0.5 and 1."""

    def row(i: int) -> dict[str, Any]:
        share = 0.55 + 0.4 * i / num
        return {"prompt": caption(i), **_two(folder, i, of_pictures), "p_chosen": share}

    return _jsonl(folder, num, row)


def captioned_pairs(folder: Path, num: int, **of_pictures: Any) -> Path:
    """Two images, each with a caption of its own."""

    def row(i: int) -> dict[str, Any]:
        captions = {"prompt_chosen": caption(i), "prompt_rejected": f"no {caption(i)}"}
        return {**captions, **_two(folder, i, of_pictures)}

    return _jsonl(folder, num, row)


def rated(folder: Path, num: int, **of_pictures: Any) -> Path:
    """prompt, image, desirable."""

    def row(i: int) -> dict[str, Any]:
        return {**_one(folder, i, of_pictures), "desirable": i % 2 == 0}

    return _jsonl(folder, num, row)


def captioned(folder: Path, num: int, **of_pictures: Any) -> Path:
    """prompt, image."""
    return _jsonl(folder, num, lambda i: _one(folder, i, of_pictures))


def ranked(folder: Path, num: int, **of_pictures: Any) -> Path:
    """prompt, three images, scores."""

    def row(i: int) -> dict[str, Any]:
        names = [picture(folder, f"{i}-{k}.png", seed=3 * i + k, **of_pictures) for k in range(3)]
        return {"prompt": caption(i), "images": names, "scores": [0.2, 0.9, 0.4]}

    return _jsonl(folder, num, row)


def prompts(folder: Path, num: int, **_: Any) -> Path:
    """Prompts, one a line."""
    file = folder / "prompts.txt"
    file.write_text("".join(f"{caption(i)}\n" for i in range(num)), encoding="utf-8")
    return file


def _one(folder: Path, i: int, of_pictures: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": caption(i), "image": picture(folder, f"{i}.png", seed=i, **of_pictures)}


def _two(folder: Path, i: int, of_pictures: dict[str, Any]) -> dict[str, str]:
    return {
        f"image_{side}": picture(folder, f"{i}-{side}.png", seed=2 * i + k, **of_pictures)
        for k, side in enumerate(("chosen", "rejected"))
    }


def _jsonl(folder: Path, num: int, row: Callable[[int], dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "data.jsonl"
    rows = [{"id": f"row-{i}", **row(i)} for i in range(num)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file
