"""Pictures: where a record may point, what is read of them, and how they are decoded, safely."""

from __future__ import annotations

import io
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from mmalign.data.cells import cell_bytes
from mmalign.data.example import Picture
from mmalign.data.fields import Problem, show
from mmalign.data.guard import Fence
from mmalign.data.room import MOST, Room, bytes_a_pixel
from mmalign.errors import DataError
from mmalign.safe import open_file

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Sequence

    from PIL.Image import Image

Result = TypeVar("Result")

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")
"""Raster formats that are decoded, told by their content and never by their name; AVIF where
Pillow has it, as from 11.3 on."""

_ADDRESSES = ("http://", "https://", "s3://", "gs://", "hf://", "data:")

MOST_BYTES = 64 * 2**20
MOST_PIXELS = 100_000_000
WIDEST = 2.0
"""Largest ratio between the aspect ratios of a row's pictures; wider rows are not trained on."""

LARGEST_FACTOR = 2.0
"""Pictures that are enlarged by more are blurred; they are named."""
LARGEST_CUT = 0.5
"""Pictures that lose a larger share of their area to the crop may lose their motif; named too."""

_PART = 32  # pictures that a thread takes at a time
_STRIP = 2**20  # pixels that are converted at a time


class PictureRoot:
    """The folder that picture paths of a data file start from, and that none may leave.

    Data files come from strangers: a path in one must not reach other files of this machine.
    """

    def __init__(self, folder: Path | None) -> None:
        """Paths start from `folder`; None where there is none, as for a hub dataset."""
        self._fence = None if folder is None else Fence(folder)
        self.folder = None if self._fence is None else self._fence.folder
        self._real_parents: dict[str, str] = {}

    def find(
        self, text: str, *, what: str = "picture file", absent: bool = False
    ) -> Picture | Problem:
        """The file that `text` names, or what it must be and is not.

        A path costs two looks at the file system; links are followed only where there are any.

        Args:
            text: The path.
            what: The file in words.
            absent: Whether a file that is not there is taken; who reads it says so.
        """
        found = f"the path is {show(text, 200)}"
        if text.startswith(_ADDRESSES):
            return Problem("must be a file here: download the pictures first", found)
        if self.folder is None:
            return Problem("must start from a folder: set `pictures` of the source", found)
        path = os.path.join(self.folder, text)
        parent, name = os.path.split(path)
        try:
            if parent not in self._real_parents:
                self._real_parents[parent] = os.path.realpath(parent)
            path = os.path.join(self._real_parents[parent], name)
            if name in ("", ".", "..") or (self._holds(path) and os.path.islink(path)):
                path = os.path.realpath(path)
            # A path that leaves the folder is refused as such, whether or not it leads somewhere.
            if not self._holds(path):
                return Problem(f"must stay inside {self.folder}", found)
            if stat.S_ISREG(os.stat(path).st_mode):
                return Picture(Path(path))
        except (FileNotFoundError, NotADirectoryError):
            if absent:
                return Picture(Path(path))
        except (OSError, ValueError) as error:
            return Problem("must be a path that can be looked at", f"{found} ({error})")
        return Problem(f"must name a {what} that is there", found)

    def _holds(self, path: str) -> bool:
        return self._fence is not None and self._fence.holds(path)


def picture_bytes(picture: Picture) -> bytes:
    """The encoded bytes of a picture, of at most `MOST_BYTES`.

    Raises:
        DataError: They cannot be read or are too many.
    """
    if picture.row >= 0:
        data = cell_bytes(picture)
    else:
        try:
            with open_file(picture.path) as stream:
                data = stream.read(MOST_BYTES + 1)
        except OSError as error:
            raise DataError(f"{picture}: cannot be read: {error}") from error
    if len(data) > MOST_BYTES:
        raise DataError(f"{picture}: has more than {MOST_BYTES // 2**20} MiB")
    if not data:
        raise DataError(f"{picture}: the file is empty")
    return data


def open_picture(picture: Picture | Path) -> Image:
    """A picture as 8-bit RGB, upright, on white where it is transparent; the first of several.

    Args:
        picture: A reference, or a file.

    Raises:
        DataError: It cannot be read, is of no known format, is cut off, or is too large.
    """
    with decoded(picture if isinstance(picture, Picture) else Picture(picture)) as image:
        return image


def num_pixels(picture: Picture) -> int:
    """Pixels of a picture, from how it begins; 0 of one that cannot be read, as decoding tells."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(picture_bytes(picture)), formats=_formats()) as image:
            return image.width * image.height
    except Exception:  # as above, decoders raise nearly anything
        return 0


@contextmanager
def decoded(picture: Picture) -> Generator[Image]:
    """As `open_picture`, while the memory is counted with what other threads decode."""
    data = picture_bytes(picture)
    with ExitStack() as stack:
        try:
            image = _decode(picture, data, stack)
        except DataError:
            raise
        except Exception as error:  # decoders raise nearly anything on broken bytes
            raise DataError(f"{picture}: cannot be decoded: {error}") from error
        yield image


def _decode(picture: Picture, data: bytes, stack: ExitStack) -> Image:
    from PIL import Image, UnidentifiedImageError

    try:
        image = stack.enter_context(Image.open(io.BytesIO(data), formats=_formats()))
        width, height = image.size
        # A PNG may bring its orientation after its pixels, which must not be decoded yet.
        known = image.format != "PNG" or "exif" in image.info
        each = bytes_a_pixel(image, turned=known and _is_turned(image))
        most = min(MOST_PIXELS, MOST // each)
        if width * height > most:
            raise DataError(
                f"{picture}: is {width} x {height}; at most {most / 1e6:.0f} million pixels are "
                "read of a picture of this kind"
            )
        stack.enter_context(_ROOM.take(width * height * each))
        image.load()
    except UnidentifiedImageError as error:
        raise DataError(f"{picture}: is not a picture of {', '.join(_formats())}") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"{picture}: is too large: {error}") from error
    return _rgb(_upright(image) if _is_turned(image) else image)


_ROOM = Room()


@cache
def _formats() -> tuple[str, ...]:
    """The formats that the Pillow at hand decodes."""
    from PIL import Image

    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _is_turned(image: Image) -> bool:
    try:
        return image.getexif().get(0x0112, 1) != 1  # orientation
    except Exception:  # broken metadata beside good pixels, which are common, turn nothing
        return False


def _upright(image: Image) -> Image:
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


def _rgb(image: Image) -> Image:
    from PIL import Image

    if image.mode == "F":
        raise ValueError("it has floating-point samples, whose range is unknown")
    is_deep = image.mode == "I" or image.mode.startswith("I;16")  # convert() would clip
    if not is_deep and not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    width, height = image.size
    whole = Image.new("RGB", image.size)
    rows = max(1, _STRIP // width)
    for top in range(0, height, rows):  # strip by strip, as each step makes a copy
        strip = image.crop((0, top, width, min(top + rows, height)))
        whole.paste(_from_16_bits(strip) if is_deep else _on_white(strip), (0, top))
    return whole


def _from_16_bits(image: Image) -> Image:
    import numpy as np
    from PIL import Image

    samples = np.asarray(image).astype(np.int64)
    if samples.min() < 0 or samples.max() > 65535:
        raise ValueError("it has 32-bit samples, whose range is unknown")
    return Image.fromarray((samples // 257).astype(np.uint8)).convert("RGB")


def _on_white(image: Image) -> Image:
    from PIL import Image

    seen = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")


def decode_all(
    pictures: Iterable[Picture], use: Callable[[Image], Result]
) -> dict[Picture, Result | DataError]:
    """Decode every picture once, in threads, and keep what `use` makes of it, or the error.

    Args:
        pictures: May repeat.
        use: Called with the decoded picture, which is then let go.
    """

    def decode(part: Sequence[Picture]) -> list[Result | DataError]:
        return [_attempt(picture, use) for picture in part]

    # In file order, so that cells of one piece of a table are read together.
    order = sorted(set(pictures), key=lambda p: (p.path, p.row, p.column))
    parts = [order[i : i + _PART] for i in range(0, len(order), _PART)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = [result for part in pool.map(decode, parts) for result in part]
    return dict(zip(order, results, strict=True))


def _attempt(picture: Picture, use: Callable[[Image], Result]) -> Result | DataError:
    try:
        with decoded(picture) as image:
            return use(image)
    except DataError as error:
        return error


def same_bytes(one: Picture, other: Picture) -> bool:
    """Whether two references lead to the same bytes; those in tables are not compared."""
    if one == other:
        return True
    if one.row >= 0 or other.row >= 0:
        return False
    try:
        if one.path.stat().st_size != other.path.stat().st_size:
            return False
        return picture_bytes(one) == picture_bytes(other)
    except (OSError, DataError):  # told where it is decoded
        return False


def is_odd(sizes: Sequence[tuple[int, int]]) -> bool:
    """Whether pictures of one row differ too much in shape to be brought to one.

    Args:
        sizes: (height, width) of each, or (width, height).
    """
    aspects = [one / other for one, other in sizes]
    return bool(aspects) and max(aspects) > WIDEST * min(aspects)
