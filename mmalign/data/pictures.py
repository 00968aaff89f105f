"""Images: where a record may point, what is read of them, and how they are decoded, safely."""

from __future__ import annotations

import io
import os
import stat
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mmalign.data.example import Picture
from mmalign.data.fields import Problem, as_object, show
from mmalign.data.opening import Fence
from mmalign.data.pages import Pages
from mmalign.errors import DataError
from mmalign.safe import open_file

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_KEPT = 256 * 2**20
"""Bytes of decoded column pieces kept for the next cells; the newest piece is always kept."""

LIMITS = {"thrift_string_size_limit": 2**26, "thrift_container_size_limit": 2**20}
"""Of what describes a parquet file, which a damaged one says is endless."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """A row group (or all) of one column: rows `start` to `stop` of the file."""

    start: int
    stop: int
    cells: Any  # a pyarrow chunked array
    size: int  # bytes of memory


class _Pieces:
    """The last pieces read. Images are mostly read in file order, many from one piece.

    By file, since a row must find its piece: an LRUCache would have to be looked through whole.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all; also what a forked process does, whose parent may have held the lock."""
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, int, str], list[_Piece]] = OrderedDict()
        self._size = 0

    def cell(self, picture: Picture) -> Any:
        """The value of a cell; one thread reads at a time, so that none reads a piece twice."""
        key = (str(picture.path), os.stat(picture.path).st_mtime_ns, picture.column)
        with self._lock:
            kept = self._kept.get(key, ())
            piece = next((p for p in kept if p.start <= picture.row < p.stop), None)
            if piece is None:
                piece = _read(picture)
                self._kept.setdefault(key, []).append(piece)
                self._size += piece.size
            self._kept.move_to_end(key)
            while self._size > MOST_KEPT:
                key, pieces = next(iter(self._kept.items()))
                if pieces[0] is piece:
                    break
                self._size -= pieces.pop(0).size
                if not pieces:
                    del self._kept[key]
        return piece.cells[picture.row - piece.start].as_py()


def damage() -> tuple[type[Exception], ...]:
    """What reading a damaged table raises: anything but a failure of our own."""
    arrow: Any = import_module("pyarrow")
    values = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
    return (arrow.ArrowException, OSError, MemoryError, NotImplementedError, *values)


def _read(picture: Picture) -> _Piece:
    if picture.path.suffix != ".parquet":
        return _from_arrow(picture)
    parquet: Any = import_module("pyarrow.parquet")
    with parquet.ParquetFile(picture.path, **LIMITS) as file:
        groups = range(file.metadata.num_row_groups)
        ends = list(accumulate(file.metadata.row_group(i).num_rows for i in groups))
        group = bisect_right(ends, picture.row)
        if group == len(ends):
            raise DataError(f"{picture}: the file has {file.metadata.num_rows} rows only")
        Pages(picture.path, file.metadata).require_whole(group, picture.column)
        table = file.read_row_group(group, columns=[picture.column], use_threads=False)
    start = ends[group] - table.num_rows
    return _Piece(start, ends[group], table.column(picture.column), table.nbytes)


def _from_arrow(picture: Picture) -> _Piece:
    """The whole column, memory-mapped: costs no memory until a cell of it is read."""
    arrow: Any = import_module("pyarrow")
    with arrow.memory_map(str(picture.path)) as source:
        table = arrow.ipc.open_stream(source).read_all()
    if picture.row >= table.num_rows:
        raise DataError(f"{picture}: the file has {table.num_rows} rows only")
    return _Piece(0, table.num_rows, table.column(picture.column), 0)


_PIECES = _Pieces()
os.register_at_fork(after_in_child=_PIECES.reset)


def cell_bytes(picture: Picture) -> bytes:
    """The bytes in a table's cell: binary, or the `bytes` of a {bytes, path} object.

    Raises:
        DataError: The table cannot be read, or the cell holds no bytes.
    """
    try:
        value = _PIECES.cell(picture)
    except damage() as error:
        raise DataError(f"{picture}: cannot be read: {error}") from error
    parts = as_object(value)
    data = value if parts is None else parts.get("bytes")
    if not isinstance(data, bytes) or not data:
        raise DataError(f"{picture}: the cell is empty")
    return data


def picture_columns(schema: Any) -> tuple[list[str], list[str]]:
    """The columns of an arrow schema whose cells are images, and those that hold lists of them.

    An image is a binary cell, or the {bytes, path} object that `datasets` makes of an image.
    """
    types: Any = import_module("pyarrow").types

    def is_picture(kind: Any) -> bool:
        if types.is_struct(kind):
            names = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
            return set(names) == {"bytes", "path"} and is_picture(names["bytes"])
        return types.is_binary(kind) or types.is_large_binary(kind)

    single = [field.name for field in schema if is_picture(field.type)]
    lists = [
        field.name
        for field in schema
        if (types.is_list(field.type) or types.is_large_list(field.type))
        and is_picture(field.type.value_type)
    ]
    return single, lists


def row_places(paths: Sequence[Path], num_rows: int) -> Iterator[tuple[Path, int]]:
    """The file of each row of a dataset and its row there, in order.

    Args:
        paths: The arrow files of the dataset.
        num_rows: Rows of the dataset.

    Raises:
        DataError: The files hold other rows than the dataset, which then is a selection of them.
    """
    arrow: Any = import_module("pyarrow")
    sizes: list[int] = []
    for path in paths:
        try:
            with arrow.memory_map(str(path)) as source:
                sizes.append(arrow.ipc.open_stream(source).read_all().num_rows)
        except damage() as error:
            raise DataError(f"{path}: cannot be read: {error}") from error
    if sum(sizes) != num_rows:
        raise DataError(
            "its images cannot be read in place, as it is a selection of the rows that its files "
            "hold; write it whole with save_to_disk, and use that folder"
        )
    for path, size in zip(paths, sizes, strict=True):
        yield from ((path, row) for row in range(size))


MOST = 480 * 2**20
"""Bytes that images take while they are decoded, of all threads of a process together. One that
would take more is refused; several wait for each other."""

_WORKING = {"WEBP": 8, "AVIF": 8}  # bytes a pixel that decoders take besides
_PROGRESSIVE = 6  # of a JPEG: the coefficients of all its passes
_DEEP = {"1": 1, "L": 1, "P": 1, "LA": 4, "PA": 4, "I;16": 2, "I;16B": 2, "I;16L": 2}
_RGB = 4  # bytes a pixel as the library keeps it


def bytes_a_pixel(image: Image, *, turned: bool) -> int:
    """What it takes to decode an opened image and make upright RGB of it.

    Args:
        image: Opened, not yet decoded.
        turned: Whether its metadata say that it lies on a side.
    """
    own = _DEEP.get(image.mode, 4)
    is_progressive = image.format == "JPEG" and "progressive" in image.info
    decoding = own + (_PROGRESSIVE if is_progressive else _WORKING.get(image.format or "", 0))
    is_rgb = image.mode == "RGB" and not image.has_transparency_data
    return max(decoding, 2 * own if turned else own, own if is_rgb else own + _RGB)


class Room:
    """How much is taken now; who finds too little waits."""

    def __init__(self) -> None:
        self.reset()
        os.register_at_fork(after_in_child=self.reset)

    def reset(self) -> None:
        """Nothing is taken; also what a forked process begins with, which has one thread."""
        self._taken = 0
        self._change = threading.Condition()

    @contextmanager
    def take(self, size: int) -> Generator[None]:
        """Take so many bytes for a while; who is alone need not wait."""
        change = self._change
        with change:
            change.wait_for(lambda: not self._taken or self._taken + size <= MOST)
            self._taken += size
        try:
            yield
        finally:
            with change:
                self._taken -= size
                change.notify_all()


Result = TypeVar("Result")

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")
"""Raster formats that are decoded, told by their content and never by their name; AVIF where
Pillow has it, as from 11.3 on."""

_ADDRESSES = ("http://", "https://", "s3://", "gs://", "hf://", "data:")

MOST_BYTES = 64 * 2**20
MOST_PIXELS = 100_000_000
WIDEST = 2.0
"""Largest ratio between the aspect ratios of a row's images; wider rows are not trained on."""

LARGEST_FACTOR = 2.0
"""Images that are enlarged by more are blurred; they are named."""
LARGEST_CUT = 0.5
"""Images that lose a larger share of their area to the crop may lose their motif; named too."""

_PART = 32  # images that a thread takes at a time
_STRIP = 2**20  # pixels that are converted at a time


class PictureRoot:
    """The folder that image paths of a data file start from, and that none may leave."""

    def __init__(self, folder: Path | None) -> None:
        """Paths start from `folder`; None where there is none, as for a hub dataset."""
        self._fence = None if folder is None else Fence(folder)
        self.folder = None if self._fence is None else self._fence.folder
        self._real_parents: dict[str, str] = {}

    def find(
        self, text: str, *, what: str = "an image file", absent: bool = False
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
            return Problem("must be a file here: download the images first", found)
        if self._fence is None:
            return Problem("must start from a folder: set `pictures` of the source", found)
        path = os.path.join(self._fence.folder, text)
        parent, name = os.path.split(path)
        try:
            if parent not in self._real_parents:
                self._real_parents[parent] = os.path.realpath(parent)
            path = os.path.join(self._real_parents[parent], name)
            if name in ("", ".", "..") or (self._fence.holds(path) and os.path.islink(path)):
                path = os.path.realpath(path)
            # A path that leaves the folder is refused as such, whether or not it leads somewhere.
            if not self._fence.holds(path):
                return Problem(f"must stay inside {self.folder}", found)
            if stat.S_ISREG(os.stat(path).st_mode):
                return Picture(Path(path))
        except (FileNotFoundError, NotADirectoryError):
            if absent:
                return Picture(Path(path))
        except (OSError, ValueError) as error:
            return Problem("must be a path that can be looked at", f"{found} ({error})")
        return Problem(f"must name {what} that is there", found)


def picture_bytes(picture: Picture) -> bytes:
    """The encoded bytes of an image, of at most `MOST_BYTES`.

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
    """An image as 8-bit RGB, upright, on white where it is transparent; the first of several.

    Args:
        picture: A reference, or a file.

    Raises:
        DataError: It cannot be read, is of no known format, is cut off, or is too large.
    """
    with decoded(picture if isinstance(picture, Picture) else Picture(picture)) as image:
        return image


def num_pixels(picture: Picture) -> int:
    """Pixels of an image, from how it begins; 0 of one that cannot be read, as decoding tells."""
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
                "read of an image of this kind"
            )
        stack.enter_context(_ROOM.take(width * height * each))
        image.load()
    except UnidentifiedImageError as error:
        raise DataError(f"{picture}: is not an image of {', '.join(_formats())}") from error
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
    """Decode every image once, in threads, and keep what `use` makes of it, or the error.

    Args:
        pictures: May repeat.
        use: Called with the decoded image, which is then let go.
    """

    def attempt(picture: Picture) -> Result | DataError:
        try:
            with decoded(picture) as image:
                return use(image)
        except DataError as error:
            return error

    def decode(part: Sequence[Picture]) -> list[Result | DataError]:
        return list(map(attempt, part))

    # In file order, so that cells of one piece of a table are read together.
    order = sorted(set(pictures), key=lambda p: (p.path, p.row, p.column))
    parts = [order[i : i + _PART] for i in range(0, len(order), _PART)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = [result for part in pool.map(decode, parts) for result in part]
    return dict(zip(order, results, strict=True))


def same_bytes(one: Picture, other: Picture) -> bool:
    """Whether two references lead to the same bytes; those in tables are not compared."""
    if one == other or max(one.row, other.row) >= 0:
        return one == other
    try:
        sizes = {picture.path.stat().st_size for picture in (one, other)}
        return len(sizes) == 1 and picture_bytes(one) == picture_bytes(other)
    except (OSError, DataError):  # told where it is decoded
        return False


def is_odd(sizes: Sequence[tuple[int, int]]) -> bool:
    """Whether images of one row differ too much in shape to be brought to one.

    Args:
        sizes: (height, width) of each, or (width, height).
    """
    aspects = [one / other for one, other in sizes]
    return bool(aspects) and max(aspects) > WIDEST * min(aspects)
