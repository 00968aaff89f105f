"""Pictures of a row to arrays of one shape, and rows that cannot be trained on."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from picture_files import encoded, picture, save
from PIL import Image

from mmalign.config import DiffusionConfig
from mmalign.data.example import Candidate, Example, Picture
from mmalign.data.pictures import open_picture
from mmalign.diffusion import pictures as prepared
from mmalign.diffusion.pictures import (
    Frame,
    describe_row,
    is_flipped,
    prepare,
    row_size,
    target_size,
    usable,
)
from mmalign.errors import ConfigError, DataError


def settings(resolution: int = 16, **options: Any) -> DiffusionConfig:
    return DiffusionConfig(resolution=resolution, **options)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.float32).transpose(2, 0, 1) / np.float32(127.5) - 1


# Shapes


def test_without_buckets_every_picture_becomes_a_square() -> None:
    for size in ((512, 512), (100, 900), (3, 2)):
        assert target_size(size, settings(64)) == (64, 64)


def test_buckets_keep_area_and_aspect_ratio() -> None:
    buckets = settings(1024, buckets=True)
    for size, expected in (
        ((1024, 1024), (1024, 1024)),
        ((512, 512), (1024, 1024)),
        ((1000, 1010), (1024, 1024)),
        ((768, 1344), (768, 1344)),
        ((1344, 768), (1344, 768)),
        ((832, 1216), (832, 1216)),
        ((100, 1000), (704, 1408)),  # wider than 2 to 1: as wide as there is
    ):
        assert target_size(size, buckets) == expected
    rng = np.random.default_rng(0)
    for _ in range(200):
        height, width = (int(n) for n in rng.integers(300, 3000, 2))
        h, w = target_size((height, width), buckets)
        assert target_size((width, height), buckets) == (w, h)
        assert h % 64 == w % 64 == 0
        assert 0.85 * 1024**2 <= h * w <= 1024**2
        assert max(h / w, w / h) <= 2
        wanted = min(max(height / width, 0.5), 2)
        assert abs(math.log(h / w / wanted)) < 0.09
    assert target_size((500, 500), settings(500, buckets=True)) in ((448, 512), (512, 448))
    assert target_size((30, 60), settings(32, buckets=True, bucket_multiple=8)) == (24, 40)
    with pytest.raises(ConfigError, match=r"bucket_multiple is 64, above diffusion\.resolution 32"):
        target_size((30, 30), settings(32, buckets=True))


def test_both_pictures_of_a_pair_get_one_bucket() -> None:
    buckets = settings(512, buckets=True)
    assert row_size([(512, 512), (512, 512)], buckets) == (512, 512)
    assert row_size([(640, 384), (384, 640)], buckets) == (512, 512)  # the logarithm: in between
    assert row_size([(640, 384), (600, 390)], buckets) == (640, 384)
    done = prepare([picture(0, 60, 40), picture(1, 40, 40)], buckets, None)
    assert {array.shape for array, _ in done} == {(3, 576, 448)}


# Pixels


def test_a_picture_that_fits_is_left_as_it_is() -> None:
    digit = picture(0, 8, 8)
    ((array, frame),) = prepare([digit], settings(8), 5)
    assert (array == pixels(digit)).all()
    assert (array.dtype, array.flags.c_contiguous) == (np.float32, True)
    assert frame == Frame((8, 8), (0, 0), (8, 8))
    black, white = (Image.new("RGB", (8, 8), colour) for colour in ("black", "white"))
    assert [array.mean() for array, _ in prepare([black, white], settings(8), None)] == [-1, 1]


@pytest.mark.parametrize("size", [(37, 90), (90, 37), (64, 64), (16, 51), (9, 14), (33, 32)])
def test_resize_and_centre_crop_equal_torchvision(size: tuple[int, int]) -> None:
    from torchvision.transforms import v2

    source = picture(3, *size)
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    theirs = v2.Compose(
        [v2.Resize(16, v2.InterpolationMode.BILINEAR, antialias=True), v2.CenterCrop(16)]
    )
    for image in (source, Image.fromarray(noise)):
        ((ours, frame),) = prepare([image], settings(16), None)
        assert (ours == pixels(theirs(image))).all()
        assert frame.size == size


def test_a_bucket_is_covered_and_no_more() -> None:
    buckets = settings(64, buckets=True, bucket_multiple=16)
    for size in ((64, 64), (100, 61), (61, 100), (20, 39), (300, 100)):
        ((array, frame),) = prepare([picture(0, *size)], buckets, None)
        assert array.shape == (3, *frame.target)
        assert frame.target == target_size(size, buckets)
        # Centred: what is cut off at one side is cut off at the other.
        scale = max(frame.target[axis] / size[axis] for axis in (0, 1))
        for axis in (0, 1):
            free = scale * size[axis] - frame.target[axis]
            assert abs(frame.crop[axis] - free / 2) <= 1.5


def test_random_crops_are_where_the_frame_says() -> None:
    image = picture(7, 16, 40)
    places = set()
    for seed in range(200):
        ((array, frame),) = prepare([image], settings(16, crop="random"), seed)
        top, left = frame.crop
        cut = image.crop((left, top, left + 16, top + 16))
        assert (array == pixels(cut)).all()
        places.add(left)
    assert (min(places), max(places)) == (0, 24)


def test_crops_are_shared_or_not() -> None:
    pair = [picture(7, 16, 40), picture(8, 16, 40)]
    wide = [picture(7, 16, 40), picture(8, 32, 80)]
    apart = 0
    for seed in range(20):
        first, second = (frame for _, frame in prepare(pair, settings(crop="random"), seed))
        assert first == second
        first, second = (frame for _, frame in prepare(wide, settings(crop="random"), seed))
        assert first.crop == second.crop
        own = prepare(pair, settings(crop="random", shared_crop=False), seed)
        apart += own[0][1].crop != own[1][1].crop
    assert apart > 10


def test_flips_are_of_the_row_and_change_nothing_else() -> None:
    pair = [picture(7, 16, 40), picture(8, 16, 40)]
    count = 0
    for seed in range(60):
        straight = prepare(pair, settings(crop="random"), seed)
        maybe = prepare(pair, settings(crop="random", flip=True), seed)
        flipped = is_flipped(settings(flip=True), seed)
        count += flipped
        for (a, frame_a), (b, frame_b) in zip(straight, maybe, strict=True):
            left = 24 - frame_a.crop[1] if flipped else frame_a.crop[1]  # 24 of 40 are free
            assert frame_b == replace(frame_a, crop=(0, left))
            assert (b == (a[:, :, ::-1] if flipped else a)).all()
    assert 18 <= count <= 42
    assert not is_flipped(settings(flip=True), None)
    assert not any(is_flipped(settings(), seed) for seed in range(20))


def test_what_is_drawn_follows_from_the_seed_alone() -> None:
    def drawn(seed: int | None) -> list[Any]:
        options = settings(crop="random", shared_crop=False, flip=True)
        done = prepare([picture(7, 16, 40), picture(8, 90, 17)], options, seed)
        return [(array.tobytes(), frame) for array, frame in done]

    first = drawn(2**62 + 1)
    np.random.default_rng(0).random()
    assert drawn(2**62 + 1) == first
    assert drawn(2**62) != first
    assert drawn(None) == drawn(None)


# Rows


def row(identity: str, *pictures: Path | Picture, labels: tuple[float, ...] = (1, 0)) -> Example:
    found = [p if isinstance(p, Picture) else Picture(p) for p in pictures]
    return Example(identity, f"caption {identity}", tuple(map(Candidate, found)), labels)


def test_rows_that_cannot_be_used_go_as_rows_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = [save(tmp_path / f"{i}.png", i) for i in range(2)]
    wide = save(tmp_path / "wide.png", 2, height=20, width=50)
    small = save(tmp_path / "small.png", 3, height=8, width=20)
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(encoded(picture(0, 64, 64), "JPEG")[:200])
    rows = [row("fine", *good), row("odd", good[0], wide), row("small", good[0], small)]
    rows += [row("fine small", wide, small)]
    rows += [row(f"cut{i}", good[0], cut) for i in range(11)]
    rows.append(row("gone", tmp_path / "gone.png", good[1]))
    rows.append(Example("prompt", "a cat", (Candidate(""),), (1.0,), "plain"))
    kept, notes = usable(rows, settings(16))
    assert [r.id for r in kept] == ["fine", "fine small", "prompt"]
    (record,) = caplog.records
    message = record.getMessage()
    assert message.startswith("of 17 rows: 12 rows with an image that cannot be decoded are left")
    assert f"cut0: {cut}: cannot be decoded: " in message
    assert "cut7: " in message
    assert "cut8: " not in message
    assert "; and 4 more." in message
    assert (
        "2 rows with aspect ratios more than 2 to 1 apart are left out: odd (24 x 24 and 50 x 20), "
        "small (24 x 24 and 20 x 8)." in message
    )
    assert "1 rows have images smaller than they are trained at: enlarged." in message
    assert message == f"of 17 rows: {' '.join(notes)}"


def test_good_rows_are_not_talked_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [row("a", save(tmp_path / "a.png"), save(tmp_path / "b.png", 1))]
    assert usable(rows, settings(16)) == (rows, [])
    assert usable([], settings(16)) == ([], [])
    assert caplog.text == ""


def test_doubtful_pictures_are_kept_and_named(tmp_path: Path) -> None:
    good = [save(tmp_path / f"{i}.png", i) for i in range(2)]
    tiny = save(tmp_path / "tiny.png", 2, height=7, width=8)
    long = save(tmp_path / "long.png", 3, height=20, width=80)
    copy = tmp_path / "copy.png"
    copy.write_bytes(good[0].read_bytes())
    rows = [row("fine", *good), row("tiny", tiny, tiny), row("long", long), row("same", copy)]
    rows[1] = row("tiny", tiny, good[0])
    rows[3] = row("same", good[0], copy)
    kept, notes = usable(rows, settings(16))
    assert kept == rows
    assert notes == [
        "1 rows have images smaller than they are trained at: enlarged.",
        "1 rows are enlarged more than 2 times: tiny (8 x 7 to 16 x 16).",
        "1 rows lose more than half of an image to the crop: long (80 x 20 to 16 x 16).",
        "1 rows show one same image twice, so prefer nothing: same.",
    ]
    wide = settings(16, buckets=True, bucket_multiple=8)
    assert not any("to the crop" in note for note in usable(rows[:2], wide)[1])


def test_nothing_left_and_texts_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of 1 rows can be used\. 1 rows with an image"):
        usable([row("a", tmp_path / "a.png", tmp_path / "b.png")], settings())
    text = Example("t", "Why?", (Candidate("Yes."), Candidate("No.")), (1.0, 0.0))
    with pytest.raises(DataError, match="row 't': the responses are text, and diffusion needs"):
        usable([text], settings())


def test_what_is_known_is_not_decoded_again(tmp_path: Path) -> None:
    gone = [Picture(tmp_path / "a.png"), Picture(tmp_path / "b.png")]
    rows = [row("a", *gone)]
    assert usable(rows, settings(16), lambda found: dict.fromkeys(found, (20, 20)))[0] == rows


def test_a_row_is_described(tmp_path: Path) -> None:
    a, b = save(tmp_path / "a.png", height=32, width=40), save(tmp_path / "b.png")
    text = describe_row(row("r1", a, b, labels=(0.75, 0.25)), settings(16))
    assert text.splitlines() == [
        "row r1, weight 1: caption r1",
        f"  0  label 0.75  {a}",
        "     40 x 32 to 16 x 16, cut at 2, 0",
        f"  1  label 0.25  {b}",
        "     24 x 24 to 16 x 16, cut at 0, 0",
    ]
    own = Example(
        "r2",
        "",
        (Candidate(Picture(a), prompt="x"), Candidate(Picture(a), prompt="y")),
        (1.0, 0.0),
        weight=0.5,
    )
    lines = describe_row(own, settings(16, crop="random")).splitlines()
    assert lines[0] == "row r2, weight 0.5: (own captions)"
    assert lines[2:4] == ["     40 x 32 to 16 x 16, placed at random", "     caption: x"]
    alone = Example("p", "a cat", (Candidate(""),), (1.0,), "plain")
    assert describe_row(alone, settings()).endswith("its image is generated in training")


@pytest.mark.parametrize("buckets", [False, True])
def test_files_of_a_row_are_prepared_as_their_pictures_are(tmp_path: Path, buckets: bool) -> None:
    paths = [save(tmp_path / f"{i}.png", i, height=60 + i, width=40 + 30 * i) for i in range(3)]
    shape = {"buckets": True, "bucket_multiple": 8} if buckets else {}
    options = settings(16, crop="random", **shape)
    for most in (0, 3000, 2**25):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prepared, "_MOST_HELD", most)
            done = prepare([Picture(path) for path in paths], options, 3)
        whole = prepare([open_picture(path) for path in paths], options, 3)
        for (array, frame), (theirs, its_frame) in zip(done, whole, strict=True):
            assert (array == theirs).all()
            assert frame == its_frame
    (tmp_path / "1.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"1\.png: is not an image"):
        prepare([Picture(path) for path in paths], options, 3)


PEAK = """
import resource, sys
from pathlib import Path
from mmalign.config import DiffusionConfig
from mmalign.data.example import Picture
from mmalign.diffusion.pictures import prepare

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

small, large = ([Picture(Path(name))] * 4 for name in sys.argv[1:3])
options = DiffusionConfig(resolution=64, buckets=sys.argv[3] == "True")
prepare(small, options, 1)
before = peak()
prepare(large, options, 1)
print(peak() - before)
"""


@pytest.mark.runs
@pytest.mark.parametrize("buckets", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_four_large_pictures_take_the_memory_of_one(tmp_path: Path, buckets: bool) -> None:
    size = 7000, 6000  # of which one takes 160 MiB
    Image.new("L", size).save(tmp_path / "large.png")
    save(tmp_path / "small.png")
    names = [str(tmp_path / name) for name in ("small.png", "large.png")]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *names, str(buckets)], capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert float(done.stdout) < 1.6 * 160, done.stdout


def test_real_pictures_reach_the_network_whole(shared_data: Path, tmp_path: Path) -> None:
    sheet = open_picture(shared_data / "images" / "noto_emoji_64.webp")
    cells = [sheet.crop((64 * i, 0, 64 * i + 64, 64)) for i in range(4)]
    for i, cell in enumerate(cells):
        cell.save(tmp_path / f"{i}.png")
    rows = [row("a", tmp_path / "0.png", tmp_path / "1.png")]
    kept, _ = usable(rows, settings(64))
    assert kept == rows
    done = prepare([open_picture(tmp_path / f"{i}.png") for i in range(4)], settings(64), 1)
    for (array, frame), cell in zip(done, cells, strict=True):
        assert (array == pixels(cell)).all()
        assert frame == Frame((64, 64), (0, 0), (64, 64))
