"""Pictures, clips and sounds with changed bytes: decoded, or refused in one sentence."""

from __future__ import annotations

import io
import wave
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pytest
from harness import changed, numbers, outcome, stream
from PIL import Image

from mmalign.data.example import Clip, Sound
from mmalign.data.pictures import open_picture

if TYPE_CHECKING:
    from pathlib import Path


def pictures() -> list[bytes]:
    """Small images of every kind that is read: with alpha, a palette, a rotation, frames."""
    rng = np.random.default_rng(0)
    plain = Image.fromarray(rng.integers(0, 255, (24, 20, 3), dtype=np.uint8))
    clear = Image.fromarray(rng.integers(0, 255, (12, 12, 4), dtype=np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    frames = [plain.rotate(90 * i) for i in range(3)]
    made = [(plain, kind, {}) for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")]
    made += [(clear, kind, {}) for kind in ("PNG", "WEBP", "TIFF")]
    made += [
        (plain, "JPEG", {"exif": turned}),
        (plain, "JPEG", {"progressive": True}),
        (plain, "TIFF", {"compression": "tiff_lzw"}),
        (plain.convert("P"), "PNG", {"transparency": 0}),
        *((plain, kind, {"save_all": True, "append_images": frames}) for kind in ("GIF", "WEBP")),
    ]
    found: list[bytes] = []
    for image, kind, options in made:
        stream_ = io.BytesIO()
        image.save(stream_, kind, **options)
        found.append(stream_.getvalue())
    return found


def check_pictures(few: int, folder: Path) -> None:
    made = pictures()
    file = folder / "picture"
    for number in numbers(few):
        rng = stream("pictures", number)
        file.write_bytes(changed(rng.choice(made), rng))
        outcome(lambda: open_picture(file), number)


def check_clips(few: int, folder: Path) -> None:
    pytest.importorskip("av")
    from media_files import write_numbered

    from mmalign.config import VideoConfig
    from mmalign.video.media import read_frames
    from mmalign.video.sound import read_sound

    times = [100 * i for i in range(8)]
    kinds = {"mp4": [0.2], "mkv": [0.3], "avi": None, "mov": None}
    made = [write_numbered(folder / f"whole.{kind}", times, beeps=at) for kind, at in kinds.items()]
    with wave.open(str(folder / "whole.wav"), "wb") as tone:
        tone.setnchannels(1)
        tone.setsampwidth(2)
        tone.setframerate(16_000)
        tone.writeframes((np.sin(np.arange(4000) / 10) * 9000).astype("<i2").tobytes())
    made.append(folder / "whole.wav")
    for number in numbers(few):
        rng = stream("clips", number)
        whole = rng.choice(made)
        file = folder / f"changed{whole.suffix}"
        file.write_bytes(changed(whole.read_bytes(), rng))
        settings = VideoConfig(num_frames=4)
        if rng.random() < 0.5 and whole.suffix != ".wav":
            outcome(partial(read_frames, Clip(file), settings), number)
        else:
            outcome(partial(read_sound, Sound(file), settings), number)


def test_a_few_changed_pictures(tmp_path: Path) -> None:
    check_pictures(60, tmp_path)


def test_a_few_changed_clips(tmp_path: Path) -> None:
    check_clips(15, tmp_path)


@pytest.mark.slow
def test_many_changed_pictures(tmp_path: Path) -> None:
    check_pictures(10_000, tmp_path)


@pytest.mark.slow
def test_many_changed_clips(tmp_path: Path) -> None:
    check_clips(2000, tmp_path)
