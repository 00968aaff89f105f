"""Sound in step with the images, of the right length, at the right rate."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest
from media_files import cut, onsets, write_numbered

from mmalign.config import VideoConfig
from mmalign.data.example import Clip, Sound
from mmalign.errors import DataError
from mmalign.video import sound
from mmalign.video.media import read_frames
from mmalign.video.sizes import SOUND_RATE
from mmalign.video.sound import has_sound, read_sound, sound_of

TIMES = [100 * i for i in range(40)]
SETTINGS = VideoConfig(num_frames=4)
MILLISECOND = 1e-3


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four seconds of mpeg4 and AAC at 44.1 kHz, with beeps at 0.5 and 2.25 seconds."""
    path = tmp_path_factory.mktemp("sounds") / "beeps.mp4"
    return write_numbered(path, TIMES, beeps=[0.5, 2.25])


@pytest.mark.parametrize(
    ("name", "codec", "sound_codec", "rate"),
    [
        ("a.mp4", "mpeg4", "aac", 44_100),
        ("b.mp4", "mpeg4", "aac", 16_000),
        ("c.mkv", "mpeg4", "aac", 48_000),
        ("d.webm", "libvpx", "libopus", 48_000),
        ("e.ts", "libx264", "aac", 44_100),
        ("f.mov", "mpeg4", "pcm_s16le", 8_000),
        ("g.avi", "mpeg4", "pcm_s16le", 44_100),  # of mp3 it does not store the encoder's delay
    ],
)
def test_beeps_are_heard_when_they_were_made(
    tmp_path: Path, name: str, codec: str, sound_codec: str, rate: int
) -> None:
    path = write_numbered(
        tmp_path / name, TIMES, codec=codec, sound_codec=sound_codec, sound_rate=rate,
        beeps=[0.5, 2.25],
    )  # fmt: skip
    heard = sound_of(Clip(path), SETTINGS)
    assert heard.samples.dtype == np.float32
    assert onsets(heard.samples) == pytest.approx([0.5, 2.25], abs=2 * MILLISECOND)
    assert 0.4 < np.abs(heard.samples).max() <= 1.0
    assert heard.seconds == pytest.approx(read_frames(Clip(path), SETTINGS).duration, abs=1e-4)


@pytest.mark.parametrize("name", ["late.mp4", "late.mkv"])
def test_a_track_that_begins_late_stays_late(tmp_path: Path, name: str) -> None:
    path = write_numbered(tmp_path / name, TIMES, beeps=[0.5], sound_start=0.8)
    heard = sound_of(Clip(path), SETTINGS)
    assert onsets(heard.samples) == pytest.approx([1.3], abs=2 * MILLISECOND)
    assert not np.abs(heard.samples[: int(0.7 * SOUND_RATE)]).max()


def test_a_span_is_cut_out_of_the_track(clip: Path) -> None:
    whole = read_sound(Sound(clip), SETTINGS)
    part = read_sound(Sound(clip, 2.0, 3.0), SETTINGS)
    assert len(part.samples) == SOUND_RATE
    assert onsets(part.samples) == pytest.approx([0.25], abs=MILLISECOND)
    assert len(sound_of(Clip(clip, 2.0, 3.0), SETTINGS).samples) == SOUND_RATE
    # Decoding began in the middle: up to a part of a sample, it is the same sound.
    window = whole.samples[2 * SOUND_RATE : 3 * SOUND_RATE]
    shifts = np.correlate(window, part.samples[8:-8], "valid")
    assert abs(int(np.argmax(shifts)) - 8) <= 1
    again = read_sound(Sound(clip, 2.0, 3.0), SETTINGS)
    assert np.array_equal(part.samples, again.samples)


def test_a_track_shorter_than_the_pictures_ends_in_silence(tmp_path: Path) -> None:
    path = write_numbered(tmp_path / "short.mp4", TIMES, beeps=[0.5], seconds=1.0)
    heard = sound_of(Clip(path), SETTINGS)
    assert heard.seconds == pytest.approx(4.0)
    assert not heard.samples[int(1.2 * SOUND_RATE) :].any()
    assert not sound_of(Clip(path, 3.0, 4.0), SETTINGS).samples.any()
    assert read_sound(Sound(path), SETTINGS).seconds == pytest.approx(1.0, abs=0.05)
    with pytest.raises(DataError, match=r"short.mp4: has no sound after 3 seconds"):
        read_sound(Sound(path, 3.0), SETTINGS)


def test_pictures_without_sound_say_so(tmp_path: Path) -> None:
    path = write_numbered(tmp_path / "mute.mp4", TIMES[:5])
    assert not has_sound(path)
    for read in (lambda: sound_of(Clip(path), SETTINGS), lambda: read_sound(Sound(path), SETTINGS)):
        with pytest.raises(DataError, match=r"mute.mp4: has no audio track"):
            read()


def test_a_cut_track_is_an_error_only_where_it_is_missed(clip: Path, tmp_path: Path) -> None:
    path = cut(clip, tmp_path / "cut.mp4", 0.6)
    with pytest.raises(DataError, match=r"cut.mp4: is cut off: its header claims 4.0\d seconds"):
        read_sound(Sound(path), SETTINGS)
    with pytest.raises(DataError, match=r"cut.mp4: is cut off after"):
        sound_of(Clip(path), SETTINGS)
    assert onsets(read_sound(Sound(path, 0.0, 0.8), SETTINGS).samples) == pytest.approx(
        [0.5], abs=MILLISECOND
    )


def test_length_is_bounded(clip: Path) -> None:
    short = VideoConfig(max_seconds=1.5)
    with pytest.raises(DataError, match=r"beeps.mp4: the sound lasts more than 1.5 seconds"):
        read_sound(Sound(clip), short)
    assert read_sound(Sound(clip, 2.0, 3.5), short).seconds == 1.5


def test_what_is_longer_than_a_window_is_refused_by_its_header(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_sound(Sound(clip), SETTINGS, 30.0).seconds == pytest.approx(4.0, abs=0.05)
    assert read_sound(Sound(clip, 1.0, 3.0), SETTINGS, 2.0).seconds == 2.0
    stream = write_numbered(tmp_path / "a.ts", TIMES, codec="libx264", beeps=[0.5])
    with pytest.raises(DataError, match=r"a.ts: a sound of more than 2 s, but .* keeps 2 s"):
        read_sound(Sound(stream), SETTINGS, 2.0)  # its header knows no length
    monkeypatch.setattr(sound, "_blocks", lambda *_: pytest.fail("decoded"))
    for read in (
        lambda: read_sound(Sound(clip), SETTINGS, 2.0),
        lambda: sound_of(Clip(clip), SETTINGS, 2.0),
    ):
        with pytest.raises(DataError, match=r"beeps.mp4: a sound of 4\.\d s, but .* keeps 2 s"):
            read()
    with pytest.raises(DataError, match=r"lasts more than 1.5 seconds, which is video.max_seconds"):
        read_sound(Sound(clip), VideoConfig(max_seconds=1.5), 30.0)


@pytest.mark.parametrize("rate", [1, 100, 4_000_000])
def test_rates_that_are_in_no_use_are_refused(rate: int, tmp_path: Path) -> None:
    path = tmp_path / "odd.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(bytes(2000))
    with pytest.raises(DataError, match=rf"odd.wav: its sound has {rate:,} samples a second"):
        read_sound(Sound(path), SETTINGS)


def test_real_tracks(shared_data: Path) -> None:
    folder = shared_data / "video"
    roar = read_sound(Sound(folder / "roar.mp3"), SETTINGS)
    assert has_sound(folder / "roar.mp3")
    assert roar.seconds == pytest.approx(2.074, abs=0.001)
    assert 0.05 < roar.samples.std() < 0.5
    for name, seconds in (("stream.mp4", 3.0017), ("big_buck_bunny_0_30.webm", 29.999)):
        heard = sound_of(Clip(folder / name), SETTINGS)
        assert heard.seconds == pytest.approx(seconds, abs=1e-3)
        assert np.abs(heard.samples).max() <= 1.0
        assert heard.samples.std() > 0.005
