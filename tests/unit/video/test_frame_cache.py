"""Decoded clips kept in memory: found again, within a budget, from several threads."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from media_files import numbers, write_numbered

from mmalign.config import VideoConfig
from mmalign.data.example import Clip
from mmalign.errors import DataError
from mmalign.video.media import FrameCache

TIMES = [100 * i for i in range(8)]
LARGE = {"size": (480, 360)}  # of which two frames take 1 MiB


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("clips")
    return [write_numbered(folder / f"{i}.mp4", TIMES, **LARGE) for i in range(3)]


def test_a_clip_is_decoded_once_and_its_parts_apart(clips: list[Path]) -> None:
    cache = FrameCache(VideoConfig(num_frames=2, frame_cache=64))
    first = cache.get(Clip(clips[0]))
    assert cache.get(Clip(clips[0])) is first
    assert numbers(cache.get(Clip(clips[0], frames=(3, 4))).pixels) == [3, 4]
    assert numbers(cache.get(Clip(clips[0], 0.2, 0.5)).pixels) == [2, 4]
    assert (cache.hits, cache.misses, len(cache)) == (1, 3, 3)
    assert cache.num_bytes == 3 * 2 * 480 * 360 * 3
    with pytest.raises(ValueError, match="read-only"):
        first.pixels[0] = 0


def test_the_one_used_longest_ago_goes_first(clips: list[Path]) -> None:
    cache = FrameCache(VideoConfig(num_frames=2, frame_cache=2))  # room for two
    one, two, three = (Clip(path) for path in clips)
    kept = cache.get(one)
    cache.get(two)
    assert cache.get(one) is kept
    cache.get(three)
    assert (len(cache), cache.misses) == (2, 3)
    assert cache.num_bytes <= cache.budget
    assert cache.get(one) is kept
    cache.get(two)
    assert cache.misses == 4


def test_what_is_larger_than_the_budget_is_not_kept(clips: list[Path]) -> None:
    for budget, count in ((0, 1), (1, 8)):
        cache = FrameCache(VideoConfig(num_frames=count, frame_cache=budget))
        for _ in range(2):
            assert len(cache.get(Clip(clips[0])).indices) == count
        assert (len(cache), cache.num_bytes, cache.misses) == (0, 0, 2)


def test_a_changed_file_is_decoded_anew(tmp_path: Path) -> None:
    path = write_numbered(tmp_path / "a.mp4", TIMES)
    cache = FrameCache(VideoConfig(num_frames=2))
    assert numbers(cache.get(Clip(path)).pixels) == [0, 7]
    write_numbered(path, TIMES[:5])
    os.utime(path, ns=(1, 1))
    assert numbers(cache.get(Clip(path)).pixels) == [0, 4]
    path.unlink()
    with pytest.raises(DataError, match=r"a.mp4: cannot be read: No such file"):
        cache.get(Clip(path))


def test_threads_may_share_it(clips: list[Path]) -> None:
    cache = FrameCache(VideoConfig(num_frames=2, frame_cache=2))
    asked = [Clip(clips[i % 3], frames=(i % 2, 5)) for i in range(60)]
    with ThreadPoolExecutor(8) as pool:
        for clip, frames in zip(asked, pool.map(cache.get, asked), strict=True):
            assert numbers(frames.pixels) == list(clip.frames)
    assert cache.hits + cache.misses == 60
    held = sum(cache.get(clip).pixels.nbytes for clip in (asked[0],))
    assert held <= cache.num_bytes <= cache.budget
    assert np.array_equal(cache.get(asked[0]).pixels, cache.get(asked[0]).pixels)
