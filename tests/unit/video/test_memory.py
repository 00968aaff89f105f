"""Two thousand decodes of whole and broken files: each broken one is an error, nothing is kept."""

from __future__ import annotations

import gc
import random
from pathlib import Path

import psutil
import pytest
from media_files import cut, damaged, numbers, write_numbered

from mmalign.config import VideoConfig
from mmalign.data.example import Clip
from mmalign.errors import DataError
from mmalign.video.media import FrameCache
from mmalign.video.sound import has_sound, sound_of

DECODES = 2000
WARM_UP = 300
TIMES = [100 * i for i in range(30)]
MIB = 2**20


def media(folder: Path, shared_data: Path) -> tuple[list[Path], list[Path]]:
    """Files that are whole, and files that are broken, each in another way."""
    whole = [
        write_numbered(folder / "a.mp4", TIMES, codec="libx264", beeps=[1.0], size=(384, 240)),
        write_numbered(folder / "b.webm", TIMES, codec="libvpx", size=(384, 240)),
        write_numbered(folder / "c.mkv", [0, 7, 400, 2000, 2100], codec="mpeg4", beeps=[0.5]),
        write_numbered(folder / "d.gif", TIMES, codec="gif", pix_fmt="gray"),
        write_numbered(folder / "e.avi", TIMES, codec="libx264"),
        write_numbered(folder / "f.ts", TIMES, codec="libx264", options={"g": "10"}, beeps=[1.0]),
        write_numbered(folder / "g.mp4", TIMES, rotation=90),
        *(shared_data / "video" / name for name in ("stream.mp4", "friday_office_1940.mp4")),
    ]
    still = write_numbered(folder / "stills.mov", TIMES, codec="mjpeg", pix_fmt="yuvj420p")
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("no video" * 99)
    (folder / "list.m3u8").write_text(f"#EXTM3U\n#EXTINF:3,\n{whole[0]}\n#EXT-X-ENDLIST\n")
    broken = [
        cut(whole[0], folder / "cut.mp4", 0.6),
        cut(whole[2], folder / "cut.mkv", 0.5),
        damaged(still, folder / "noise.mov", range(8, 25)),
        *(folder / name for name in ("empty.mp4", "text.mp4", "list.m3u8", "gone.mp4")),
        shared_data / "video" / "roar.mp3",
    ]
    return whole, broken


@pytest.mark.slow
def test_memory_does_not_grow_over_two_thousand_decodes(tmp_path: Path, shared_data: Path) -> None:
    whole, broken = media(tmp_path, shared_data)
    settings = VideoConfig(num_frames=6, frame_cache=8)
    cache, rng, process = FrameCache(settings), random.Random(0), psutil.Process()
    heard = {path for path in whole if has_sound(path)}
    failed: dict[Path, int] = {}
    resident: list[float] = []
    unnamed = 0
    for count in range(1, DECODES + 1):
        path = rng.choice(broken if count % 20 == 0 else whole)
        clip = Clip(path, start=rng.choice((0.0, 0.1, 0.2)))
        try:
            frames = cache.get(clip)
            assert len(frames.indices) == 6
            if path.suffix in (".webm", ".avi", ".gif"):
                assert numbers(frames.pixels) == list(frames.indices)
            if path in heard:
                assert sound_of(clip, settings).seconds > 1.5
        except DataError as error:
            unnamed += str(path) not in str(error)
            failed[path] = failed.get(path, 0) + 1
        if count == WARM_UP or count % 500 == 0:
            gc.collect()
            resident.append(process.memory_info().rss / MIB)
    print(f"resident MiB at {WARM_UP} and each 500: {[round(value, 1) for value in resident]}")
    assert not unnamed
    assert set(failed) == set(broken)
    assert sum(failed.values()) == DECODES // 20
    assert cache.misses > DECODES / 2
    assert max(resident) - resident[0] < 24
    assert len(process.open_files()) < 10
