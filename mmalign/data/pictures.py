"""Pictures: where a record may point, what is read of them, and how they are decoded, safely."""

from __future__ import annotations

import io
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from mmalign.data.cells import cell_bytes
from mmalign.data.example import Picture
from mmalign.data.fields import Problem, show
from mmalign.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from PIL.Image import Image

Result = TypeVar("Result")

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
"""Raster formats that are decoded, told by their content and never by their name."""

_ADDRESSES = ("http://", "https://", "s3://", "gs://", "hf://", "data:")

MOST_BYTES = 64 * 2**20
MOST_PIXELS = 100_000_000
WIDEST = 2.0
"""Largest ratio between the aspect ratios of a row's pictures; wider rows are not trained on."""

_PART = 32  # pictures that a thread takes at a time


class PictureRoot:
    """The folder that picture paths of a data file start from, and that none may leave.

    Data files come from strangers: a path in one must not reach other files of this machine.
    """

    def __init__(self, folder: Path | None) -> None:
        """Paths start from `folder`; None where there is none, as for a hub dataset."""
        self.folder = None if folder is None else os.path.realpath(folder)
        self._real_parents: dict[str, str] = {}

    def find(self, text: str, *, what: str = "picture file") -> Picture | Problem:
        """The file that `text` names, or what it must be and is not.

        A path costs two looks at the file system; links are followed only where there are any.
        """
        found = f"the path is {show(text, 200)}"
        if text.startswith(_ADDRESSES):
            return Problem("must be a file here: download the pictures first", found)
        if self.folder is None:
            return Problem("must start from a folder: set `pictures` of the source", found)
        parent, name = os.path.split(os.path.join(self.folder, text))
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
            pass
        except (OSError, ValueError) as error:
            return Problem("must be a path that can be looked at", f"{found} ({error})")
        return Problem(f"must name a {what} that is there", found)

    def _holds(self, path: str) -> bool:
        return path.startswith((self.folder or "").rstrip(os.sep) + os.sep)


def picture_bytes(picture: Picture) -> bytes:
    """The encoded bytes of a picture, of at most `MOST_BYTES`.

    Raises:
        DataError: They cannot be read or are too many.
    """
    if picture.row >= 0:
        data = cell_bytes(picture)
    else:
        try:
            with picture.path.open("rb") as stream:
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
    picture = picture if isinstance(picture, Picture) else Picture(picture)
    data = picture_bytes(picture)
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MOST_PIXELS:
                limit = f"{MOST_PIXELS // 10**6} million"
                raise DataError(
                    f"{picture}: is {width} x {height}; at most {limit} pixels are read"
                )
            image.load()
            return _rgb(_upright(image))
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"{picture}: is not a picture of {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"{picture}: is too large: {error}") from error
    except Exception as error:  # decoders raise nearly anything on broken bytes
        raise DataError(f"{picture}: cannot be decoded: {error}") from error


def _upright(image: Image) -> Image:
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken metadata beside good pixels, which are common, turn nothing
        return image


def _rgb(image: Image) -> Image:
    import numpy as np
    from PIL import Image

    if image.mode == "I" or image.mode.startswith("I;16"):  # 16 bits a sample; convert() would clip
        samples = np.asarray(image).astype(np.int64)
        if samples.min() < 0 or samples.max() > 65535:
            raise ValueError("it has 32-bit samples, whose range is unknown")
        return Image.fromarray((samples // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("it has floating-point samples, whose range is unknown")
    if image.has_transparency_data:
        seen = image.convert("RGBA")
        white = Image.new("RGBA", seen.size, "white")
        return Image.alpha_composite(white, seen).convert("RGB")
    return image.convert("RGB")


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
        return use(open_picture(picture))
    except DataError as error:
        return error


def is_odd(sizes: Sequence[tuple[int, int]]) -> bool:
    """Whether pictures of one row differ too much in shape to be brought to one.

    Args:
        sizes: (height, width) of each, or (width, height).
    """
    aspects = [one / other for one, other in sizes]
    return bool(aspects) and max(aspects) > WIDEST * min(aspects)
