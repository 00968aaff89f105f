"""Opening one image: every format, every way to be broken, and where a path may point."""

from __future__ import annotations

import os
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from picture_files import encoded, pickapic, picture, save
from PIL import Image

from mmalign.data import pictures
from mmalign.data.example import Picture
from mmalign.data.fields import Problem
from mmalign.data.pictures import MOST_KEPT, PictureRoot, decode_all, open_picture
from mmalign.errors import DataError


def opened(path: Path, data: bytes) -> np.ndarray:
    path.write_bytes(data)
    image = open_picture(path)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


# What is read


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF", "JPEG", "WEBP"])
def test_every_format_is_told_by_its_content(tmp_path: Path, kind: str) -> None:
    source = picture(1, 16, 20)
    found = opened(tmp_path / "picture.png", encoded(source, kind))
    assert found.shape == (16, 20, 3)
    lossless = kind in ("PNG", "BMP", "TIFF")
    assert np.abs(found - np.asarray(source).astype(int)).max() <= (0 if lossless else 40)


def test_other_formats_are_refused(tmp_path: Path) -> None:
    for kind in ("PPM", "ICO", "TGA", "PDF"):
        with pytest.raises(DataError, match="is not an image of JPEG, PNG, WEBP, BMP, TIFF, GIF"):
            opened(tmp_path / "a.jpg", encoded(picture(0), kind))


def test_turned_pictures_are_put_upright(tmp_path: Path) -> None:
    source = picture(2, 8, 16)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to see it upright
    found = opened(tmp_path / "a.png", encoded(source, "PNG", exif=exif))
    assert (found == np.rot90(np.asarray(source), -1)).all()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_metadata_do_not_cost_the_picture(tmp_path: Path) -> None:
    data = encoded(picture(2), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    assert opened(tmp_path / "a.jpg", data).shape == (24, 24, 3)


def test_what_is_transparent_is_white(tmp_path: Path) -> None:
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = (10, 20, 30, 255)
    rgba[0, 1] = (0, 0, 0, 128)
    found = opened(tmp_path / "a.png", encoded(Image.fromarray(rgba)))
    assert found[0, 0].tolist() == [10, 20, 30]
    assert found[0, 1].tolist() == [127] * 3
    assert (found[1] == 255).all()
    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    palette.putpixel((0, 0), 0)
    found = opened(tmp_path / "p.png", encoded(palette, "PNG", transparency=0))
    assert found.tolist() == [[[255, 255, 255], [200, 100, 50]]]


def test_grey_one_bit_and_sixteen_bit_samples_keep_their_range(tmp_path: Path) -> None:
    grey = np.array([[0, 100, 255]], np.uint8)
    for image in (
        Image.fromarray(grey),
        Image.fromarray(grey.astype(np.uint16) * 257),
        Image.fromarray(grey).convert("LA"),
    ):
        assert opened(tmp_path / "a.png", encoded(image))[0, :, 0].tolist() == [0, 100, 255]
    one = Image.fromarray(grey > 50).convert("1")
    assert opened(tmp_path / "a.png", encoded(one))[0, :, 2].tolist() == [0, 255, 255]
    with pytest.raises(DataError, match="floating-point samples, whose range is unknown"):
        opened(tmp_path / "a.tif", encoded(Image.new("F", (2, 2), 0.5), "TIFF"))
    with pytest.raises(DataError, match="32-bit samples, whose range is unknown"):
        opened(tmp_path / "a.tif", encoded(Image.new("I", (2, 2), 70000), "TIFF"))


def test_print_colours_become_screen_colours(tmp_path: Path) -> None:
    found = opened(tmp_path / "a.jpg", encoded(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG"))
    assert np.abs(found - [0, 255, 255]).max() < 5


def test_the_first_frame_of_a_moving_picture(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "PNG", "WEBP"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert np.abs(opened(tmp_path / "a.gif", data)[0, 0] - [255, 0, 0]).max() < 10


def test_real_pictures(shared_data: Path) -> None:
    sheet = open_picture(shared_data / "images" / "noto_emoji_64.webp")
    assert sheet.size[0] == 32 * 64
    assert sheet.size[1] % 64 == 0


# What is broken


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header promises a size, and whose body holds next to nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"\0" * 10))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore:Image size")
def test_broken_files_are_refused(tmp_path: Path) -> None:
    jpeg, png = (encoded(picture(3, 64, 64), kind) for kind in ("JPEG", "PNG"))
    for data, reason in (
        (b"", "the file is empty"),
        (b"I am a text.", "is not an image"),
        (jpeg[: len(jpeg) // 2], "cannot be decoded"),
        (png[: len(png) // 2], "cannot be decoded"),
        (png[:40], "cannot be decoded|is not an image"),
        (png_of(64, 64), "cannot be decoded"),
        (png_of(60_000, 60_000), "is too large"),
        (png_of(11_000, 10_000), "is 11000 x 10000; at most 100 million pixels are read"),
        (png_of(0, 5), "cannot be decoded|is not an image"),
    ):
        with pytest.raises(DataError, match=reason):
            opened(tmp_path / "a.png", data)
    with pytest.raises(DataError, match=r"b\.png: cannot be read: .*No such file"):
        open_picture(tmp_path / "b.png")


def test_too_many_bytes_are_not_even_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(encoded(picture(0)) + b"\0" * 3 * 2**20)
    assert open_picture(file).size == (24, 24)
    monkeypatch.setattr(pictures, "MOST_BYTES", 2**20)
    with pytest.raises(DataError, match="has more than 1 MiB"):
        open_picture(file)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_every_damaged_byte_is_a_clear_error_or_a_picture(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"):
        whole = encoded(picture(4), kind)
        for at in rng.integers(0, min(len(whole), 200), 25):
            data = bytearray(whole)
            data[at] ^= 0xFF
            with suppress(DataError):
                assert opened(tmp_path / "a", bytes(data)).ndim == 3


# Where a path may point


def test_paths_start_from_the_folder_and_stay_inside(tmp_path: Path) -> None:
    save(tmp_path / "data" / "pics" / "a.png")
    secret = save(tmp_path / "secret.png")
    folder = tmp_path / "data"
    (folder / "inside.png").symlink_to(folder / "pics" / "a.png")
    (folder / "outside.png").symlink_to(secret)
    (folder / "up").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe.png")
    root = PictureRoot(folder)
    inside = Picture(folder / "pics" / "a.png")
    absolute = str(inside.path)
    for text in ("pics/a.png", "./pics/../pics/a.png", absolute, "inside.png"):
        assert root.find(text) == inside
    for text, what in (
        ("../secret.png", f"must stay inside {folder}"),
        ("pics/../../secret.png", f"must stay inside {folder}"),
        (str(secret), f"must stay inside {folder}"),
        ("/etc/there-is-no-such-file", f"must stay inside {folder}"),
        ("outside.png", f"must stay inside {folder}"),
        ("up/secret.png", f"must stay inside {folder}"),
        ("..", f"must stay inside {folder}"),
        ("", f"must stay inside {folder}"),
        ("pics", "must name an image file that is there"),
        ("pics/", "must name an image file that is there"),
        ("pics/b.png", "must name an image file that is there"),
        ("pics/a.png/x.png", "must name an image file that is there"),
        ("pipe.png", "must name an image file that is there"),
        ("a\0b.png", "must be a path that can be looked at"),
        ("x" * 5000, "must be a path that can be looked at"),
        ("https://somewhere/a.png", "must be a file here: download the images first"),
    ):
        found = root.find(text)
        assert isinstance(found, Problem)
        assert (text, found.what) == (text, what)
    # A folder whose name begins like ours is another one.
    save(tmp_path / "data2" / "a.png")
    assert isinstance(root.find("../data2/a.png"), Problem)
    nowhere = PictureRoot(None).find("a.png")
    assert isinstance(nowhere, Problem)
    assert "set `pictures`" in nowhere.what


# Images inside tables


def test_cells_are_read_where_they_are(tmp_path: Path) -> None:
    file = pickapic(tmp_path / "a.parquet", [1.0] * 7)
    for row in (6, 0, 3, 3, 5):
        for i in "01":
            image = open_picture(Picture(file, row, f"jpg_{i}"))
            expected = np.asarray(picture(2 * row + int(i))).astype(int)
            assert np.abs(np.asarray(image).astype(int) - expected).mean() < 8
    with pytest.raises(DataError, match=r"a\.parquet:8 jpg_0: the file has 7 rows only"):
        open_picture(Picture(file, 7, "jpg_0"))
    with pytest.raises(DataError, match="the cell is empty"):
        open_picture(Picture(file, 1, "caption"))
    with pytest.raises(DataError, match="jpg_9"):
        open_picture(Picture(file, 1, "jpg_9"))
    file.write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match="cannot be read"):
        open_picture(Picture(file, 6, "jpg_0"))
    file.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        open_picture(Picture(file, 6, "jpg_0"))


def test_many_threads_read_every_piece_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmalign.data import pictures

    file = pickapic(tmp_path / "a.parquet", [1.0] * 24, group=6)
    read, count = pictures._read, []
    monkeypatch.setattr(
        pictures, "_read", lambda p: (count.append(threading.get_ident()), read(p))[1]
    )
    wanted = [Picture(file, i % 24, f"jpg_{i % 2}") for i in range(240)]
    with ThreadPoolExecutor(8) as pool:
        sizes = {image.size for image in pool.map(open_picture, wanted)}
    assert sizes == {(24, 24)}
    assert len(count) == 8  # four row groups of two columns


def test_only_so_much_of_a_table_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmalign.data import pictures

    assert MOST_KEPT == 256 * 2**20
    monkeypatch.setattr(pictures, "MOST_KEPT", 3000)
    pictures._PIECES.reset()
    file = pickapic(tmp_path / "a.parquet", [1.0] * 8, group=1)
    for row in (*range(8), *range(8)):
        assert open_picture(Picture(file, row, "jpg_0")).size == (24, 24)
        kept = [piece for pieces in pictures._PIECES._kept.values() for piece in pieces]
        assert sum(piece.size for piece in kept) == pictures._PIECES._size
        assert pictures._PIECES._size <= 3000 or len(kept) == 1
    pictures._PIECES.reset()


def test_a_forked_process_reads_on(tmp_path: Path) -> None:
    from mmalign.data import pictures

    file = pickapic(tmp_path / "a.parquet", [1.0] * 2)
    open_picture(Picture(file, 0, "jpg_0"))
    with pictures._PIECES._lock:  # as another thread would hold it
        pid = os.fork()
        if pid == 0:
            try:
                os._exit(open_picture(Picture(file, 1, "jpg_0")).size != (24, 24))
            finally:
                os._exit(2)
        assert os.waitpid(pid, 0)[1] == 0


def test_all_are_decoded_once(tmp_path: Path) -> None:
    good, bad = Picture(save(tmp_path / "a.png")), Picture(tmp_path / "b.png")
    seen: list[int] = []

    def use(image: Image.Image) -> int:
        seen.append(image.width)
        return image.width

    found = decode_all([good, bad, good, bad], use)
    assert (found[good], seen) == (24, [24])
    assert isinstance(found[bad], DataError)


# What it takes


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I;16"])
def test_strips_make_the_same_picture(
    tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(3)
    source = Image.fromarray(rng.integers(0, 255, (13, 9, 4), dtype=np.uint8))
    if mode == "I;16":
        source = Image.fromarray(rng.integers(0, 65535, (13, 9), dtype=np.uint16))
    options = {"transparency": 3} if mode == "P" else {}
    data = encoded(source.convert(mode) if mode != "I;16" else source, "PNG", **options)
    whole = opened(tmp_path / "a.png", data)
    monkeypatch.setattr(pictures, "_STRIP", 20)
    assert (opened(tmp_path / "a.png", data) == whole).all()


def test_a_picture_that_takes_too_much_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transparency and a turn need a second copy; so fewer pixels are read of such."""
    monkeypatch.setattr(pictures, "MOST", 24 * 24 * 5)
    plain = picture(0, 24, 24)
    turned = Image.Exif()
    turned[0x0112] = 6
    opened(tmp_path / "a.png", encoded(plain, "PNG"))
    for data in (
        encoded(plain.convert("RGBA"), "PNG"),
        encoded(plain, "JPEG", exif=turned),
        encoded(plain, "JPEG", progressive=True),
    ):
        with pytest.raises(DataError, match="is 24 x 24; at most 0 million pixels are read of a"):
            opened(tmp_path / "a.png", data)


def test_pictures_in_flight_share_their_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "MOST", 2 * 24 * 24 * 4)
    files = [Picture(save(tmp_path / f"{i}.png", i)) for i in range(200)]
    lock, now, most = threading.Lock(), 0, 0

    def use(image: Image.Image) -> int:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        image.resize((12, 12))
        with lock:
            now -= 1
        return image.width

    assert set(decode_all(files, use).values()) == {24}
    assert most <= 2
    large = pictures.Room()
    with large.take(10 * pictures.MOST):  # alone, even what is larger than all need not wait
        pass


def test_pixels_are_told_without_decoding(tmp_path: Path) -> None:
    assert pictures.num_pixels(Picture(save(tmp_path / "a.png"))) == 24 * 24
    (tmp_path / "b.png").write_bytes(png_of(9_000, 9_000))
    assert pictures.num_pixels(Picture(tmp_path / "b.png")) == 81_000_000
    assert pictures.num_pixels(Picture(tmp_path / "none.png")) == 0
