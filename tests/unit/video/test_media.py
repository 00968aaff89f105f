"""Frames by number: which are chosen, that they are the right images, and what is refused."""

from __future__ import annotations

import gc
import os
import shutil
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from media_files import cut, damaged, numbers, write_numbered, write_pictures

from mmalign.config import VideoConfig
from mmalign.data.example import Clip
from mmalign.errors import DataError
from mmalign.video import media
from mmalign.video.media import choose, read_frames
from mmalign.video.sizes import shown_size
from mmalign.video.timeline import timeline

CONSTANT = [100 * i for i in range(60)]
VARIABLE = [0, 40, 90, 400, 410, 420, 1500, 1600, 1633, 2000, 3500, 3510]
B_FRAMES = {"bf": "3", "x264-params": "keyint=10:open-gop=1"}
KINDS = {
    "plain.mp4": {"codec": "mpeg4"},
    "open_gop.mp4": {"codec": "libx264", "options": B_FRAMES},
    "open_gop.mkv": {"codec": "libx264", "options": B_FRAMES},
    "hidden.webm": {"codec": "libvpx", "options": {"auto-alt-ref": "1", "lag-in-frames": "16"}},
    "late.ts": {"codec": "libx264", "options": {"bf": "3", "g": "10"}, "beeps": [1.0]},
    "no_times.avi": {"codec": "libx264", "options": {"bf": "2"}},
    "no_times.h264": {"codec": "libx264", "options": {"bf": "2"}, "rate": 10},
    "moves.gif": {"codec": "gif", "pix_fmt": "gray"},
    "pictures.mov": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "old.flv": {"codec": "flv"},
}


def every(count: int) -> VideoConfig:
    return VideoConfig(num_frames=count)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clips")


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """Sixty frames in six seconds, a key frame each second, header first."""
    options = {"bf": "2", "g": "10"}
    return write_numbered(folder / "whole.mp4", CONSTANT, codec="libx264", options=options)


@pytest.mark.runs
@pytest.mark.parametrize("name", KINDS)
def test_a_number_means_the_same_picture_whatever_else_is_decoded(folder: Path, name: str) -> None:
    path = write_numbered(folder / name, CONSTANT, **KINDS[name])
    frames = read_frames(Clip(path), every(60))
    assert frames.indices == tuple(range(60))
    assert numbers(frames.pixels) == list(range(60))
    assert frames.num_source == 60
    for some in ((13,), (0, 59), (7, 3, 3, 9), (19, 20, 21), (48, 35)):
        found = read_frames(Clip(path, frames=some), every(60))
        assert found.indices == some
        assert np.array_equal(found.pixels, frames.pixels[list(some)])
        assert found.times == tuple(frames.times[number] for number in some)
    if name != "no_times.h264":  # which knows no times, and is shown at its decoder's rate
        assert frames.times == pytest.approx([i / 10 for i in range(60)], abs=0.001)
        assert frames.duration == pytest.approx(6.0, abs=0.001)
        assert frames.source_fps == pytest.approx(10.0)


@pytest.mark.parametrize("name", ["variable.mp4", "variable.mkv"])
def test_variable_rates_are_read_through_the_times(folder: Path, name: str) -> None:
    path = write_numbered(folder / name, VARIABLE, codec="libx264", options={"bf": "2"})
    frames = read_frames(Clip(path, frames=tuple(range(12))), every(4))
    assert numbers(frames.pixels) == list(range(12))
    assert frames.times == pytest.approx([t / 1000 for t in VARIABLE], abs=0.001)
    # 0, 1.17, 2.34 and 3.51 seconds; at equal numbers the pause before the sixth would be missed.
    assert choose(Clip(path), every(4)) == (0, 6, 9, 11)
    by_rate = VideoConfig(num_frames=None, fps=1.0)
    assert choose(Clip(path), by_rate) == (0, 6, 9, 10)  # at 3 s, that of 3.5 is nearer than of 2


@pytest.mark.parametrize(
    ("start", "end", "settings", "expected"),
    [
        (0.0, None, every(4), (0, 20, 39, 59)),
        (0.0, None, every(1), (29,)),
        (0.0, None, every(2), (0, 59)),
        (1.0, 2.0, every(10), tuple(range(10, 20))),  # the end is not in the span
        (1.0, 1.3, every(6), (10, 10, 11, 11, 12, 12)),  # three frames stand for six
        (1.04, 1.06, every(3), (10, 10, 10)),  # what is shown between two frames
        (5.5, 99.0, every(2), (55, 59)),
        (0.0, None, VideoConfig(num_frames=None, fps=2.0), tuple(range(0, 60, 5))),
        (2.0, 4.0, VideoConfig(num_frames=None, fps=1.0), (20, 30)),
        (0.0, 0.5, VideoConfig(num_frames=None, fps=40.0), (0, 1, 2, 3, 4)),  # no more than are
        (0.0, None, VideoConfig(num_frames=None, fps=10.0, max_frames=3), (0, 29, 59)),
        (0.0, None, VideoConfig(num_frames=None, fps=0.1, min_frames=4), (0, 20, 39, 59)),
        (1.0, 1.2, VideoConfig(num_frames=None, fps=1.0, min_frames=4), (10, 11)),  # no more are
    ],
)  # fmt: skip
def test_the_choice(
    whole: Path, start: float, end: float | None, settings: VideoConfig, expected: tuple[int, ...]
) -> None:
    clip = Clip(whole, start, end)
    assert choose(clip, settings) == expected
    frames = read_frames(clip, settings)
    assert frames.indices == expected
    assert numbers(frames.pixels) == list(expected)


def test_stored_numbers_give_the_same_pixels(whole: Path) -> None:
    clip = Clip(whole, 0.7, 4.2)
    first = read_frames(clip, every(5))
    stored = Clip(whole, 0.7, 4.2, frames=choose(clip, every(5)))
    again = read_frames(stored, every(16))  # another config does not choose again
    assert again.indices == first.indices
    assert np.array_equal(again.pixels, first.pixels)


def test_pictures_are_laid_as_players_lay_them(folder: Path) -> None:
    """All eight displays: where a corner (x, y) of the stored image is shown, by its matrix."""
    height, width = 32, 48
    corner = {(-1, -1): 40, (1, -1): 100, (-1, 1): 160, (1, 1): 230}
    image = np.zeros((height, width, 3), np.uint8)
    for (x, y), grey in corner.items():
        image[slice(None, 16) if y < 0 else slice(16, None),
              slice(None, 24) if x < 0 else slice(24, None)] = grey  # fmt: skip
    for a, b, c, d in [(s, 0, 0, t) for s in (1, -1) for t in (1, -1)] + [
        (0, s, t, 0) for s in (1, -1) for t in (1, -1)
    ]:
        matrix = [a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30]
        path = write_pictures(folder / f"laid{a}{b}{c}{d}.mp4", [image] * 3, matrix=matrix)
        seen = read_frames(Clip(path), every(2)).pixels[-1].astype(int)
        high, wide = seen.shape[:2]
        assert (high, wide) == ((height, width) if a else (width, height))
        for (x, y), grey in corner.items():
            right, down = a * x + c * y, b * x + d * y
            place = (3 if down > 0 else 1) * high // 4, (3 if right > 0 else 1) * wide // 4
            assert abs(seen[place].mean() - grey) < 12, (a, b, c, d)


@pytest.mark.parametrize(
    ("ratio", "size"),
    [(Fraction(2), (48, 192)), (Fraction(8, 9), (48, 85)), (Fraction(64, 45), (48, 137)),
     (Fraction(1), (48, 96))],
)  # fmt: skip
def test_pixels_that_are_not_square_are_widened(
    folder: Path, ratio: Fraction, size: tuple[int, int]
) -> None:
    images = [np.full((48, 96, 3), 90, np.uint8)] * 3
    path = write_pictures(folder / f"wide{ratio.numerator}.mp4", images, ratio=ratio)
    frames = read_frames(Clip(path), every(2))
    assert frames.pixels.shape[1:3] == frames.size == size
    # A header that claims a thin strip makes no image larger than is allowed.
    assert max(shown_size(48, 96, Fraction(9999), 512)) == 512
    assert shown_size(48, 96, Fraction(1, 9999), 512) == (48, 1)


def test_a_frame_is_let_go_with_its_display_matrix(folder: Path) -> None:
    path = write_numbered(folder / "let_go.mp4", CONSTANT[:3], rotation=90)
    gc.collect()
    gc.disable()
    try:
        before = sum(type(item) is av.VideoFrame for item in gc.get_objects())
        read_frames(Clip(path), every(3))
        after = sum(type(item) is av.VideoFrame for item in gc.get_objects())
    finally:
        gc.enable()
    assert after <= before


def test_pictures_are_turned_upright(folder: Path) -> None:
    plain = write_numbered(folder / "lying.mp4", CONSTANT[:3])
    for degrees in (90, -90, 180):
        turned = write_numbered(folder / f"turned{degrees}.mp4", CONSTANT[:3], rotation=degrees)
        seen = read_frames(Clip(turned), every(3)).pixels
        upright = read_frames(Clip(plain), every(3)).pixels
        assert np.array_equal(seen, np.rot90(upright, degrees // 90, axes=(1, 2)))


def test_a_cut_file_is_read_as_far_as_its_frames_are_there(whole: Path, folder: Path) -> None:
    for source in (whole, write_numbered(folder / "b.mkv", CONSTANT, codec="libx264")):
        path = cut(source, folder / f"cut{source.suffix}", 0.8)
        with pytest.raises(DataError, match=rf"{path}: is cut off after \d+ frames .*claims 6\.\d"):
            read_frames(Clip(path), every(4))
        assert 8 < len(timeline(path, every(4))) < 59
        early = read_frames(Clip(path, 0.0, 0.7), every(5))
        assert np.array_equal(early.pixels, read_frames(Clip(source, 0.0, 0.7), every(5)).pixels)
        last = len(timeline(path, every(4))) - 1  # none is missing among those that are there
        assert numbers(read_frames(Clip(path, frames=(last,)), every(4)).pixels) == [last]
        with pytest.raises(DataError, match=r"frames 0 to 59 are asked for; it has \d+ frames"):
            read_frames(Clip(path, frames=(0, 59)), every(2))


def test_damage_is_bridged_over_three_frames_and_no_more(folder: Path) -> None:
    kind = {"codec": "mjpeg", "pix_fmt": "yuvj420p"}  # each image stands for itself
    source = write_numbered(folder / "stills.mov", CONSTANT, **kind)
    path = damaged(source, folder / "few.mov", [23, 24])
    seen = numbers(read_frames(Clip(path), every(60)).pixels)
    assert seen == [*range(23), 22, 22, *range(25, 60)]
    path = damaged(source, folder / "many.mov", range(20, 30))
    assert numbers(read_frames(Clip(path, frames=(22,)), every(1)).pixels) == [19]
    with pytest.raises(DataError, match=rf"{path}: frame 23 of 60 cannot be decoded, nor the 3"):
        read_frames(Clip(path), every(60))


def test_what_is_no_video_is_refused_by_name(folder: Path, whole: Path) -> None:
    broken = {
        "empty.mp4": (b"", "the file is empty"),
        "text.mp4": (b"not a video\n" * 200, "of no format that is read"),
        "noise.mp4": (np.random.default_rng(0).bytes(20_000), "of no format that is read"),
        "head.mp4": (whole.read_bytes()[:40], "no video stream"),
        "zeros.mp4": (bytes(10_000), "of no format that is read"),
    }
    for name, (data, reason) in broken.items():
        (folder / name).write_bytes(data)
        with pytest.raises(DataError, match=f"{name}: .*{reason}"):
            read_frames(Clip(folder / name), every(2))
    with pytest.raises(DataError, match=r"nowhere.mp4: cannot be read: No such file"):
        read_frames(Clip(folder / "nowhere.mp4"), every(2))
    with pytest.raises(DataError, match="is not a file"):
        read_frames(Clip(folder), every(2))


def test_a_sound_file_has_no_pictures(folder: Path, shared_data: Path) -> None:
    with pytest.raises(DataError, match=r"roar.mp3: has no video stream"):
        read_frames(Clip(shared_data / "video" / "roar.mp3"), every(2))


def test_spans_outside_of_the_file_are_refused(whole: Path) -> None:
    with pytest.raises(DataError, match=r"the clip is from 6.5 seconds to the end; the file has 6"):
        choose(Clip(whole, 6.5), every(2))
    with pytest.raises(DataError, match="the clip is from 3 seconds to 2;"):
        choose(Clip(whole, 3.0, 2.0), every(2))


def test_limits(whole: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = VideoConfig(num_frames=2, max_seconds=2.0)
    with pytest.raises(DataError, match=r"lasts 6 seconds; video.max_seconds is 2"):
        read_frames(Clip(whole), short)
    assert read_frames(Clip(whole, 3.0, 5.0), short).indices == (30, 49)
    with pytest.raises(DataError, match=r"its frames are 96 x 48; video.max_side is 64"):
        read_frames(Clip(whole), VideoConfig(num_frames=2, max_side=64))
    monkeypatch.setattr(media, "MOST_HELD", 2**30)
    wide = write_numbered(folder / "wide.mp4", CONSTANT[:2], size=(1920, 1080))
    with pytest.raises(DataError, match="200 frames of 1920 x 1080 are more than 1 GiB"):
        read_frames(Clip(wide), every(200))


def test_a_header_that_lies_about_the_size_allocates_nothing(folder: Path) -> None:
    """The stream says 96 x 48 in its own bytes; the container's header and those are made large."""
    path = write_numbered(folder / "claims.mkv", CONSTANT[:10], codec="mjpeg", pix_fmt="yuvj420p")
    data = path.read_bytes()
    size = (48).to_bytes(2, "big") + (96).to_bytes(2, "big")  # of each picture's start of frame
    assert data.count(b"\xff\xc0\x00\x11\x08" + size) == 10
    path.write_bytes(data.replace(size, (60_000).to_bytes(2, "big") * 2))
    with pytest.raises(DataError, match=r"claims.mkv: (its frames are 60000|.*cannot be decoded)"):
        read_frames(Clip(path), every(2))


def test_the_clock_is_watched(whole: Path) -> None:
    start = time.monotonic()
    with pytest.raises(DataError, match=r"whole.mp4: is not decoded after 1e-05 seconds; raise"):
        read_frames(Clip(whole), VideoConfig(num_frames=2, decode_timeout=1e-5))
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:6\n#EXTINF:6,\n{path}\n#EXT-X-ENDLIST\n"),
        ("list.mp4", "#EXTM3U\n#EXT-X-TARGETDURATION:6\n#EXTINF:6,\n{path}\n#EXT-X-ENDLIST\n"),
        ("list.ffconcat", "ffconcat version 1.0\nfile {path}\n"),
        ("list.mp4", "ffconcat version 1.0\nfile whole.mp4\n"),
        ("list.sdp", "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
                     "m=video 9 RTP/AVP 96\na=rtpmap:96 H264/90000\n"),
    ],
)  # fmt: skip
def test_a_list_of_other_files_is_not_followed(
    whole: Path, tmp_path: Path, name: str, text: str
) -> None:
    shutil.copy(whole, tmp_path / "whole.mp4")
    path = tmp_path / name
    path.write_text(text.format(path=tmp_path / "whole.mp4"))
    with pytest.raises(DataError, match=r"list\.\w+: cannot be decoded"):
        read_frames(Clip(path), every(2))


def test_numbers_are_found_anew_when_a_file_changes(folder: Path) -> None:
    path = write_numbered(folder / "changes.mp4", CONSTANT[:5])
    assert len(timeline(path, every(2))) == 5
    write_numbered(path, CONSTANT[:9])
    os.utime(path, ns=(1, 1))
    assert len(timeline(path, every(2))) == 9


@pytest.mark.parametrize(
    ("name", "frames", "fps"),
    [("flower.mp4", 150, 29.97), ("friday_office_1940.mp4", 185, 30.0), ("stream.mp4", 90, 29.97),
     ("big_buck_bunny_0_30.webm", 720, 24.0)],
)  # fmt: skip
def test_real_files(shared_data: Path, name: str, frames: int, fps: float) -> None:
    import av

    path = shared_data / "video" / name
    found = read_frames(Clip(path, 0.0, 2.0), every(3))
    assert (found.num_source, found.source_fps) == (frames, pytest.approx(fps, abs=0.01))
    with av.open(str(path)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number in found.indices:
                pixels = found.pixels[found.indices.index(number)]
                assert np.array_equal(pixels, frame.to_ndarray(format="rgb24"))
            if number == found.indices[-1]:
                break


@pytest.mark.runs
def test_random_damage_gives_frames_or_an_error_that_names_the_file(folder: Path) -> None:
    sources = [
        write_numbered(folder / f"damage{suffix}", CONSTANT[:20], beeps=[1.0], codec="libx264")
        for suffix in (".mp4", ".mkv", ".ts")
    ]
    rng, outcomes = np.random.default_rng(0), set()
    for count in range(90):
        source = sources[count % 3]
        data = np.frombuffer(source.read_bytes(), np.uint8).copy()
        reach = len(data) if count % 2 else 800  # every other time, of the header only
        data[rng.integers(0, reach, rng.integers(1, 20))] = rng.integers(0, 256)
        path = folder / f"damage{count}{source.suffix}"
        path.write_bytes(data[: rng.integers(1, len(data)) if count % 5 == 0 else None].tobytes())
        try:
            assert len(read_frames(Clip(path), every(4)).indices) == 4
            outcomes.add("frames")
        except DataError as error:
            outcomes.add("error" if str(path) in str(error) else f"unnamed: {error}")
    assert outcomes == {"frames", "error"}
