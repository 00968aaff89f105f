"""Pictures by reference through scorers, in batches, the next batch decoded meanwhile."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Generic, TypeVar

from mmalign.data.pictures import decode_all, num_pixels
from mmalign.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from mmalign.data.example import Picture

MOST_HELD = 40_000_000
"""Pixels of a batch; the next one is decoded meanwhile."""

Key = TypeVar("Key")
Scoring = Callable[..., "Tensor"]  # (pictures, prompts) -> [N]


@dataclass(frozen=True, slots=True)
class Item(Generic[Key]):
    """Pictures that belong together: a row's candidates, or two models' answers to a prompt."""

    key: Key
    pictures: tuple[Picture, ...]
    prompts: tuple[str, ...]  # one a picture


Scores = dict[str, list[float]]  # scorer to one score a picture


def score_items(
    items: Iterable[Item[Key]], scorers: Mapping[str, Scoring], batch_size: int
) -> Iterator[list[tuple[Item[Key], Scores | DataError]]]:
    """The scores of each item, batch by batch; a DataError where one of its pictures is broken.

    Args:
        items: Read as they are needed.
        scorers: Name to scorer.
        batch_size: Items at one time.

    Raises:
        DataError: A scorer gave what is not a finite number.
    """
    for part, images in _decoded(items, batch_size):
        broken = {
            id(item): error
            for item in part
            for error in [images[picture] for picture in item.pictures]
            if isinstance(error, DataError)
        }
        whole = [item for item in part if id(item) not in broken]
        pictures = [images[picture] for item in whole for picture in item.pictures]
        prompts = [prompt for item in whole for prompt in item.prompts]
        found: list[Scores] = [{} for _ in whole]
        for name, scorer in scorers.items() if whole else ():
            scores = iter(scorer(pictures, prompts).tolist())
            for item, own in zip(whole, found, strict=True):
                own[name] = list(islice(scores, len(item.pictures)))
                if not all(map(math.isfinite, own[name])):
                    raise DataError(
                        f"scorer {name} gave {own[name]} for {item.pictures[0]}; in half precision "
                        "a network can overflow: score in float32"
                    )
        results: dict[int, Scores | DataError] = {**broken}
        results |= {id(item): own for item, own in zip(whole, found, strict=True)}
        yield [(item, results[id(item)]) for item in part]


def _parts(items: Iterable[Item[Key]], batch_size: int) -> Iterator[list[Item[Key]]]:
    """Up to `batch_size` items, fewer where their pictures are large: all are held at once."""
    part: list[Item[Key]] = []
    held = 0
    for item in items:
        pixels = sum(map(num_pixels, item.pictures))
        if part and (len(part) == batch_size or held + pixels > MOST_HELD):
            yield part
            part, held = [], 0
        part.append(item)
        held += pixels
    if part:
        yield part


def _decoded(
    items: Iterable[Item[Key]], batch_size: int
) -> Iterator[tuple[Sequence[Item[Key]], Mapping[Picture, Image | DataError]]]:
    def decode(part: Sequence[Item[Key]]) -> Mapping[Picture, Image | DataError]:
        return decode_all((p for item in part for p in item.pictures), lambda image: image)

    parts = _parts(items, batch_size)
    with ThreadPoolExecutor(1) as pool:
        part = next(parts, [])
        images = pool.submit(decode, part)
        while part:
            following = next(parts, [])
            ahead = pool.submit(decode, following)
            yield part, images.result()
            part, images = following, ahead
