"""Sheets: images side by side, small ones enlarged pixel by pixel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmalign.data.sheet import fitted, grid, sheet, write_image


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """A grey image of random levels; size is width and height."""
    levels = np.random.default_rng(seed).integers(0, 256, size[::-1])
    return Image.fromarray(levels.astype(np.uint8))


def find(page: Image.Image, part: Image.Image) -> list[tuple[int, int]]:
    """Places (left, top) where `part` stands in `page`, pixel by pixel."""
    big, small = np.asarray(page.convert("L")), np.asarray(part.convert("L"))
    height, width = small.shape
    rows = np.lib.stride_tricks.sliding_window_view(big, width, axis=1)
    tops, lefts = np.nonzero((rows == small[0]).all(axis=-1))
    places = [(int(left), int(top)) for left, top in zip(lefts, tops, strict=True)]
    return [
        (left, top)
        for left, top in places
        if np.array_equal(big[top : top + height, left : left + width], small)
    ]


def test_small_pictures_are_enlarged_without_smoothing() -> None:
    picture = noise((8, 8))
    large = np.asarray(fitted(picture))
    assert large.shape == (96, 96, 3)
    expected = np.asarray(picture).repeat(12, axis=0).repeat(12, axis=1)
    assert (large == expected[..., None]).all()


def test_other_sizes_are_kept_or_made_smaller() -> None:
    assert fitted(noise((100, 200))).size == (100, 200)
    assert fitted(noise((1024, 512))).size == (256, 128)


def test_the_models_stand_side_by_side_in_the_order_given() -> None:
    first, second = [noise((8, 8), i) for i in (1, 2)], [noise((8, 8), i) for i in (3, 4)]
    page = sheet(["a cat", "a dog"], [("reference", first), ("policy", second)])
    places = [find(page, fitted(picture)) for picture in (first[0], second[0], first[1], second[1])]
    assert all(len(place) == 1 for place in places)
    lefts, tops = zip(*(place[0] for place in places), strict=True)
    assert list(lefts) == sorted(lefts)
    assert len(set(tops)) == 1


def test_a_sheet_is_as_wide_as_a_page() -> None:
    """Five pairs of small images stand beside each other, two of large ones."""
    for size, beside in (((8, 8), 5), ((512, 512), 2)):
        prompts = ["a cat"] * 6
        one = sheet(prompts[:1], [("a", [noise(size)]), ("b", [noise(size)])])
        page = sheet(prompts, [("a", [noise(size)] * 6), ("b", [noise(size)] * 6)])
        assert page.width == pytest.approx(beside * one.width, rel=0.08)


def test_rows_of_a_grid() -> None:
    pictures = [noise((8, 8), i) for i in range(5)]
    page = grid(pictures, 3, labels=[f"picture {i}" for i in range(5)])
    places = [find(page, fitted(picture))[0] for picture in pictures]
    lefts, tops = zip(*places, strict=True)
    assert tops[0] == tops[1] == tops[2] < tops[3] == tops[4]
    assert lefts[:2] == lefts[3:]


def test_long_captions_are_wrapped_and_cut_within_their_width() -> None:
    """The page does not grow wider, and at most three lines are added."""
    short = sheet(["x"], [("a", [noise((8, 8))]), ("b", [noise((8, 8))])])
    long = sheet(["word " * 200], [("a", [noise((8, 8))]), ("b", [noise((8, 8))])])
    endless = sheet(["x" * 500], [("a", [noise((8, 8))]), ("b", [noise((8, 8))])])
    assert short.width == long.width == endless.width
    assert short.height == endless.height < long.height <= short.height + 2 * 16
    margin = np.asarray(endless.convert("L"))[:, -8:]
    assert (margin == 255).all()


def test_files_are_complete_or_absent(tmp_path: Path) -> None:
    file = write_image(sheet(["x"], [("a", [noise((8, 8))])]), tmp_path / "step-3" / "sheet.png")
    with Image.open(file) as image:
        image.load()
    assert [item.name for item in file.parent.iterdir()] == ["sheet.png"]


def test_nothing_to_show_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        grid([], 3)
    with pytest.raises(ValueError, match="one image of each model for each prompt"):
        sheet(["a", "b"], [("policy", [noise((8, 8))])])
