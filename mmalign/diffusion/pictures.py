"""Images of a row to arrays of one shape, and what an earlier look at their files has shown."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.Image import Image as PilImage

from mmalign.config import DiffusionConfig, RunConfig
from mmalign.data.cache import TensorCache
from mmalign.data.example import Example, Picture, as_text
from mmalign.data.jobs import first_few
from mmalign.data.pictures import (
    LARGEST_CUT,
    LARGEST_FACTOR,
    WIDEST,
    decode_all,
    decoded,
    is_odd,
    same_bytes,
)
from mmalign.diffusion.pipeline import component, component_fingerprint
from mmalign.errors import ConfigError, DataError

log = logging.getLogger("mmalign.diffusion")

Size = tuple[int, int]  # height, width, in pixels
Look = Callable[[Iterable[Picture]], Mapping[Picture, "Size | DataError"]]


_MOST_HELD = 2**25  # pixels of a row's images that are decoded at the same time


@dataclass(frozen=True, slots=True)
class Frame:
    """Where a prepared image comes from: all that SDXL's time ids tell the network."""

    size: Size  # of the image as it was, upright
    crop: tuple[int, int]  # top, left, in the resized image, mirrored where it was
    target: Size  # of the prepared image


def target_size(size: Size, diffusion: DiffusionConfig) -> Size:
    """The shape that an image of `size` (height, width) is brought to.

    A square of `resolution`, or with buckets the sides, multiples of `bucket_multiple`, of nearly
    the same area whose aspect ratio is nearest, in the logarithm, and at most 2 to 1.
    """
    if not diffusion.buckets:
        return (diffusion.resolution, diffusion.resolution)
    wanted = math.log(size[0] / size[1])
    choices = _buckets(diffusion.resolution, diffusion.bucket_multiple)
    return min(choices, key=lambda b: (abs(math.log(b[0] / b[1]) - wanted), -b[0] * b[1]))


@cache
def _buckets(resolution: int, multiple: int) -> tuple[Size, ...]:
    """For every side, the longest other one that keeps to `resolution` squared pixels."""
    if resolution < multiple:
        raise ConfigError(
            f"diffusion.bucket_multiple is {multiple}, above diffusion.resolution {resolution}; "
            "no bucket is that small"
        )
    area = resolution**2
    sides = range(multiple, int(WIDEST * resolution) + 1, multiple)
    pairs = [(side, area // side // multiple * multiple) for side in sides]
    both = {*pairs, *((b, a) for a, b in pairs)}
    return tuple(sorted((h, w) for h, w in both if w and h and 1 / WIDEST <= h / w <= WIDEST))


def row_size(sizes: Sequence[Size], diffusion: DiffusionConfig) -> Size:
    """The one shape of all images of a row: that of their mean log aspect ratio."""
    mean = sum(math.log(height / width) for height, width in sizes) / len(sizes)
    # In units that keep the ratio exact where all sizes are equal, as mostly they are.
    size = sizes[0] if len(set(sizes)) == 1 else (round(2**20 * math.exp(mean)), 2**20)
    return target_size(size, diffusion)


def prepare(
    pictures: Sequence[Picture | PilImage], diffusion: DiffusionConfig, draws_seed: int | None
) -> list[tuple[NDArray[np.float32], Frame]]:
    """Resize, crop and flip the images of a row; a pure function of its arguments.

    An image is resized, with its aspect ratio kept, to the smallest size that covers the row's
    shape (antialiased and bilinear, as torchvision resizes; one of that size stays as it is), cut
    to that shape, and mirrored or not, like all of the row. Random places are drawn as shares of
    the free range, so that a shared one means the same place in images of different sizes.

    Files are decoded one after another and let go. Where the shape depends on the sizes of all,
    those that are too large to be held until then are decoded twice.

    Args:
        pictures: All candidates of the row: where they are, or in RGB.
        diffusion: Its `resolution`, `buckets`, `crop`, `shared_crop` and `flip`.
        draws_seed: Of what is random; None: the centre, and no flip.

    Returns:
        For each image its pixels [3, H, W], float32 in [-1, 1], and its Frame.

    Raises:
        DataError: A file cannot be decoded.
    """
    held: Sequence[Picture | PilImage] = pictures
    target = (diffusion.resolution, diffusion.resolution)
    if diffusion.buckets:
        sizes, held = _sizes(pictures)
        target = row_size(sizes, diffusion)
    flip = is_flipped(diffusion, draws_seed)
    # Always drawn in the same order and number: switching one thing on changes no other.
    rng = None if draws_seed is None else np.random.default_rng([draws_seed, 1])
    places = np.full((len(pictures), 2), 0.5) if rng is None else rng.random((len(pictures), 2))
    if diffusion.crop == "center":
        places[:] = 0.5
    elif diffusion.shared_crop:
        places[:] = places[0]
    return [
        _prepare(picture, target, tuple(place), flip)
        for picture, place in zip(held, places.tolist(), strict=True)
    ]


def _sizes(
    pictures: Sequence[Picture | PilImage],
) -> tuple[list[Size], list[Picture | PilImage]]:
    """The size of each, and each once more, decoded where that takes little memory."""
    sizes: list[Size] = []
    held: list[Picture | PilImage] = []
    free = _MOST_HELD
    for picture in pictures:
        with _opened(picture) as image:
            pixels = image.height * image.width
            sizes.append(_size(image))
            held.append(image if pixels <= free else picture)
        free -= 0 if isinstance(held[-1], Picture) else pixels
    return sizes, held


def _opened(picture: Picture | PilImage) -> AbstractContextManager[PilImage]:
    return decoded(picture) if isinstance(picture, Picture) else nullcontext(picture)


def is_flipped(diffusion: DiffusionConfig, draws_seed: int | None) -> bool:
    """Whether the images of a row are mirrored this time."""
    if not diffusion.flip or draws_seed is None:
        return False
    return bool(np.random.default_rng(draws_seed).random() < 0.5)


def _prepare(
    source: Picture | PilImage, target: Size, place: tuple[float, ...], flip: bool
) -> tuple[NDArray[np.float32], Frame]:
    with _opened(source) as picture:
        size = _size(picture)
        scaled = _covering(size, target)
        if scaled != size:
            picture = picture.resize((scaled[1], scaled[0]), Image.Resampling.BILINEAR)
    free = [scaled[axis] - target[axis] for axis in (0, 1)]
    # Half of an odd range is rounded as torchvision's centre crop does; a share is in [0, 1).
    top, left = (
        round(free[axis] / 2) if place[axis] == 0.5 else int(place[axis] * (free[axis] + 1))
        for axis in (0, 1)
    )
    picture = picture.crop((left, top, left + target[1], top + target[0]))
    if flip:
        picture, left = ImageOps.mirror(picture), free[1] - left
    pixels = np.asarray(picture, dtype=np.float32).transpose(2, 0, 1) / np.float32(127.5) - 1
    return np.ascontiguousarray(pixels), Frame(size, (top, left), target)


def _size(picture: PilImage) -> Size:
    return (picture.height, picture.width)


def _covering(size: Size, target: Size) -> Size:
    """The smallest size of the same aspect ratio that covers `target`."""
    (height, width), (rows, columns) = size, target
    if rows * width >= columns * height:  # the height decides
        return (rows, max(columns, rows * width // height))
    return (max(rows, columns * height // width), columns)


def usable(
    examples: Sequence[Example], diffusion: DiffusionConfig, look: Look | None = None
) -> tuple[list[Example], list[str]]:
    """The rows whose images can all be decoded and brought to one shape.

    Every image is decoded once, in threads, and let go. A row goes as a whole: with an image
    that cannot be decoded, or with two whose aspect ratios differ by more than 2 to 1. Rows of a
    prompt alone stay. What is left out is logged as one warning.

    Args:
        examples: Rows of one run.
        diffusion: For the size that small images are enlarged to.
        look: Gives the size of every image, or why it cannot be decoded; None: by decoding them.

    Returns:
        The rows that are left, and what was found, as sentences; the warning is made of them.

    Raises:
        DataError: A response is text, or no row is left.
    """
    pictures = (picture for row in examples for picture in row_pictures(row))
    found = look(pictures) if look else decode_all(pictures, _size)
    kept: list[Example] = []
    rows: dict[str, list[str]] = {what: [] for what in _FOUND}
    for row in examples:
        own = row_pictures(row)
        results = [found[picture] for picture in own]
        errors = [result for result in results if isinstance(result, DataError)]
        sizes = [result for result in results if not isinstance(result, DataError)]
        if errors:
            rows[_BROKEN].append(f"{row.id}: {errors[0]}")
        elif is_odd(sizes):
            rows[_ODD].append(f"{row.id} ({' and '.join(map(_shown, sizes))})")
        else:
            kept.append(row)
            if sizes:
                for what, who in _doubts(row, own, sizes, row_size(sizes, diffusion)):
                    rows[what].append(who)
    notes = [_sentence(what, who) for what, who in rows.items() if who]
    if examples and not kept:
        raise DataError(f"none of {len(examples)} rows can be used. {' '.join(notes)}")
    if notes:
        log.warning("of %d rows: %s", len(examples), " ".join(notes))
    return kept, notes


_BROKEN = "with an image that cannot be decoded are left out"
_ODD = "with aspect ratios more than 2 to 1 apart are left out"
_SMALL = "have images smaller than they are trained at"
_BLURRED = f"are enlarged more than {LARGEST_FACTOR:g} times"
_CUT = "lose more than half of an image to the crop"
_SAME = "show one same image twice, so prefer nothing"
_FOUND = (_BROKEN, _ODD, _SMALL, _BLURRED, _CUT, _SAME)
"""What rows may be, in the order in which it is told."""


def _doubts(
    row: Example, pictures: Sequence[Picture], sizes: Sequence[Size], target: Size
) -> Iterator[tuple[str, str]]:
    """Why a row that can be trained on perhaps should not be, and what to call it."""
    factor, size = max((_enlarged(size, target), size) for size in sizes)
    if factor > 1:
        yield _SMALL, row.id
    if factor > LARGEST_FACTOR:
        yield _BLURRED, f"{row.id} ({_shown(size)} to {_shown(target)})"
    share, size = max((_cut_off(size, target), size) for size in sizes)
    if share > LARGEST_CUT:
        yield _CUT, f"{row.id} ({_shown(size)} to {_shown(target)})"
    own_captions = any(candidate.prompt is not None for candidate in row.candidates)
    if not own_captions and any(map(same_bytes, pictures, pictures[1:])):
        yield _SAME, row.id


def _sentence(what: str, who: Sequence[str]) -> str:
    between = "; " if what == _BROKEN else ", "
    named = "enlarged" if what == _SMALL else between.join(first_few(who))
    return f"{len(who)} rows {what}: {named}."


def _enlarged(size: Size, target: Size) -> float:
    """By how much an image is enlarged."""
    return max(target[0] / size[0], target[1] / size[1])


def _cut_off(size: Size, target: Size) -> float:
    """The share of an image's area that is cut off."""
    factor = _enlarged(size, target)
    return 1 - target[0] * target[1] / (size[0] * size[1] * factor**2)


def _shown(size: Size) -> str:
    return f"{size[1]} x {size[0]}"


def row_pictures(row: Example) -> list[Picture]:
    """The images of a row's candidates; none for a row of a prompt alone.

    Raises:
        DataError: A response is text.
    """
    pictures = [c.response for c in row.candidates if isinstance(c.response, Picture)]
    if len(pictures) != len(row.candidates) and any(c.response for c in row.candidates):
        raise DataError(
            f"row {row.id!r}: the responses are text, and diffusion needs images: image_chosen "
            "and image_rejected, images, or image. Where chosen and rejected are paths of "
            "images, set `layout: pictures`; a model of text is trained with modality: text"
        )
    return pictures


def describe_row(row: Example, diffusion: DiffusionConfig) -> str:
    """A row for a terminal: its captions, and each image with its label, size and crop."""
    pictures = row_pictures(row)
    frames = [frame for _, frame in prepare(pictures, diffusion, None)] if pictures else []
    lines = [f"row {row.id}, weight {row.weight:g}: {as_text(row.prompt) or '(own captions)'}"]
    if not frames:
        lines.append("  a prompt alone: its image is generated in training")
    for i, (candidate, frame) in enumerate(zip(row.candidates, frames, strict=False)):
        (height, width), (top, left), target = frame.size, frame.crop, frame.target
        place = "placed at random" if diffusion.crop == "random" else f"cut at {left}, {top}"
        lines.append(f"  {i}  label {row.labels[i]:g}  {candidate.response}")
        lines.append(f"     {width} x {height} to {target[1]} x {target[0]}, {place}")
        if candidate.prompt is not None:
            lines.append(f"     caption: {as_text(candidate.prompt)}")
    return "\n".join(lines)


FLUSH_SECONDS = 30.0
"""Longest that finished work waits in memory: what an interruption may lose."""


_PART = 1024  # images between two looks at the clock


def cache_folder(config: RunConfig) -> Path:
    """Where the caches lie: `diffusion.cache_folder`, or cache/ beside the run folder."""
    return config.diffusion.cache_folder or config.output.parent / "cache"


def open_store(folder: Path, settings: Mapping[str, str]) -> TensorCache:
    """A cache whose finished work is on disk within `FLUSH_SECONDS`."""
    return TensorCache(folder, settings, seconds=FLUSH_SECONDS)


class FileStat:
    """What identifies an image: its file with size and time of change, and its cell.

    A file is looked at once in the life of the object.
    """

    def __init__(self) -> None:
        self._files: dict[Path, tuple[str, int, int]] = {}

    def __call__(self, picture: Picture) -> list[Any]:
        """Path, size in bytes, time of change, row and column.

        Raises:
            DataError: There is no such file.
        """
        path = picture.path
        if path not in self._files:
            try:
                info = path.stat()
            except OSError as error:
                raise DataError(f"{picture}: cannot be read: {error}") from error
            self._files[path] = (str(path), info.st_size, info.st_mtime_ns)
        return [*self._files[path], picture.row, picture.column]


class ImageSizeCache:
    """What decoding an image once has shown: its size, or why it cannot be decoded."""

    def __init__(self, config: RunConfig, contents: FileStat | None = None) -> None:
        self._contents = contents or FileStat()
        self._known: dict[Picture, Size | DataError] = {}
        self.store = open_store(cache_folder(config) / "pictures", {"holds": "sizes"})

    def get(self, picture: Picture) -> Size | DataError | None:
        """Height and width in pixels, the error that decoding gave, or None: not known."""
        found = self._known.get(picture)
        if found is not None:
            return found
        key = self.key(picture)
        if not self.store.missing([key]) and (entry := self.store.get(key)) is not None:
            if "bad" in entry:
                found = DataError(entry["bad"].tobytes().decode("utf-8"))
            else:
                height, width = entry["size"].tolist()
                found = (height, width)
            self._known[picture] = found
        return found

    def put(self, picture: Picture, found: Size | DataError) -> None:
        """Remember what decoding gave; a file that could not be read may be readable again."""
        self._known[picture] = found
        if isinstance(found, DataError):
            if "cannot be read" in str(found):
                return
            entry = {"bad": np.frombuffer(str(found).encode("utf-8"), np.uint8)}
        else:
            entry = {"size": np.array(found, np.int32)}
        self.store.put(self.key(picture), entry)

    def key(self, picture: Picture) -> str:
        """The image's entry."""
        return self.store.key(self._contents(picture))


def look(
    config: RunConfig,
    pictures: Iterable[Picture],
    *,
    notes: ImageSizeCache | None = None,
    seen: Callable[[int], None] | None = None,
) -> dict[Picture, Size | DataError]:
    """The sizes of images, or why one cannot be decoded; only those not known are decoded.

    Args:
        config: The run; says where notes lie.
        pictures: May repeat.
        notes: To add to; without them nothing is written.
        seen: Called with the number of images decoded since the last call.
    """
    known = notes or ImageSizeCache(config)
    found: dict[Picture, Size | DataError] = {}
    unknown: list[Picture] = []
    for picture in dict.fromkeys(pictures):
        try:
            size = known.get(picture)
        except DataError as error:  # the file is gone
            size = error
        if size is None:
            unknown.append(picture)
        else:
            found[picture] = size
    unknown.sort(key=lambda p: (p.path, p.row, p.column))
    for start in range(0, len(unknown), _PART):
        decoded = decode_all(unknown[start : start + _PART], _size)
        found |= decoded
        if notes is not None:
            for picture, size in decoded.items():
                notes.put(picture, size)
        if seen is not None:
            seen(len(decoded))
    return found


def fingerprint_of(config: RunConfig, name: str) -> str:
    """Hash of the files of a part of the run's model: "vae", "text_encoder", "unet", ...

    Reading gigabytes at every start of a run takes longer than loading them would; so hashes are
    kept in the cache folder, by the place, sizes and times of change of the files.
    """
    model = config.model
    folder = component(model.path, name, model.revision).resolve()
    files = [(item.name, item.stat()) for item in sorted(folder.iterdir()) if item.is_file()]
    state = [str(folder), [[item, info.st_size, info.st_mtime_ns] for item, info in files]]
    key = hashlib.sha256(json.dumps(state).encode()).hexdigest()
    file = cache_folder(config) / "fingerprints.json"
    if key not in _FINGERPRINTS:
        with suppress(OSError, ValueError, TypeError):
            _FINGERPRINTS.update(json.loads(file.read_text(encoding="utf-8")))
    if key not in _FINGERPRINTS:
        _FINGERPRINTS[key] = component_fingerprint(model.path, name, model.revision)
        partial = file.with_name(f".{file.name}.{os.getpid()}.part")
        with suppress(OSError):  # no caches yet, or others' that may only be read
            partial.write_text(json.dumps(_FINGERPRINTS, indent=1), encoding="utf-8")
            partial.replace(file)
    return _FINGERPRINTS[key]


_FINGERPRINTS: dict[str, str] = {}  # by the state of the files: true for as long as they stay


def caption_of(example: Example, candidate: int) -> str:
    """The caption of a candidate: its own, or the row's."""
    own = example.candidates[candidate].prompt
    return as_text(example.prompt if own is None else own)


def captions_of(example: Example) -> list[str]:
    """The captions of a row's candidates."""
    return [caption_of(example, k) for k in range(len(example.candidates))]
