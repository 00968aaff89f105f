"""Decoded media, and how large frames and images become on a screen and for a processor."""

from __future__ import annotations

import json
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmalign.config import VideoConfig
from mmalign.errors import ConfigError, DataError

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

Array = np.ndarray[Any, np.dtype[Any]]
SOUND_RATE = 16_000  # Hz


@dataclass(frozen=True, slots=True)
class Frames:
    """Chosen frames of a clip.

    Attributes:
        pixels: [T, H, W, 3] uint8, RGB.
        indices: Number of each frame in the file, in display order, from 0.
        times: Seconds from the start of the file at which each is shown.
        source_fps: Average frames a second of the file.
        num_source: Frames of the file (by its header or its end).
        duration: Seconds of the file.
        span: Number of the first frame of the clip's part of the file, and how many that has;
            None: the whole file.
        area: Most pixels a frame, of this clip alone; None: as the config says.
        size: Height and width of the file's frames, before they were made smaller; None: as here.
        rate: Frames a second by the file's header; None: `source_fps`.
        drawn: Whether the time of each is drawn on it, as the model's processor does it.
    """

    pixels: Array
    indices: tuple[int, ...]
    times: tuple[float, ...]
    source_fps: float
    num_source: int
    duration: float
    span: tuple[int, int] | None = None
    area: int | None = None
    size: tuple[int, int] | None = None
    rate: float | None = None
    drawn: bool = False

    @property
    def fps(self) -> float:
        """Average rate of the chosen frames, a second; the file's where there is only one."""
        span = self.times[-1] - self.times[0] if len(self.times) > 1 else 0.0
        return (len(self.times) - 1) / span if span > 0 else self.source_fps


@dataclass(frozen=True, slots=True)
class Wave:
    """Mono sound in [-1, 1] at `SOUND_RATE`."""

    samples: Array  # [S] float32

    @property
    def seconds(self) -> float:
        """Length."""
        return len(self.samples) / SOUND_RATE


_SQUARE = Fraction(1)


@dataclass(frozen=True, slots=True)
class Turn:
    """One of the eight ways to lay an image: exchanged axes first, then mirrored ones."""

    axes: bool = False  # rows become columns
    down: bool = False  # the last row comes first
    across: bool = False  # the last column comes first

    def __call__(self, image: Array) -> Array:  # [H, W, 3] -> [H, W, 3] or [W, H, 3]
        """The image as it is shown, a view."""
        image = image.transpose(1, 0, 2) if self.axes else image
        return image[:: -1 if self.down else 1, :: -1 if self.across else 1]


def turn_of(frame: VideoFrame) -> Turn:
    """The turn that the frame's display matrix asks for, to the nearest right angle.

    Its first entries say where a place (x, y) of the image is shown: x' = a x + c y and
    y' = b x + d y (ISO/IEC 14496-12, matrix of a track's header).
    """
    from av.sidedata.sidedata import SideDataContainer, Type

    # Made here: the frame's own would refer to the frame, and keep its pixels until a collection.
    data = SideDataContainer(frame)  # pyright: ignore[reportCallIssue]
    found = [bytes(item) for item in data if item.type == Type.DISPLAYMATRIX]
    if not found or len(found[0]) < 20:
        return Turn()
    a, b, _, c, d = np.frombuffer(found[0][:20], np.int32).tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        return Turn(axes=True, down=b < 0, across=c < 0)
    return Turn(down=d < 0, across=a < 0)


def shown_size(
    height: int, width: int, ratio: Fraction | None, most: int
) -> tuple[int, int]:  # height, width
    """The size at which an image has the proportions in which it was filmed.

    Args:
        height: Rows of stored pixels.
        width: Pixels a row.
        ratio: Width of a pixel to its height; None or 0: not known, square.
        most: Longest side, which a header that is wrong does not exceed.
    """
    ratio = ratio or _SQUARE
    if ratio == 1:
        return height, width
    wide = Fraction(width) * ratio
    share = min(Fraction(1), Fraction(most) / max(wide, height))
    return max(1, round(height * share)), max(1, round(wide * share))


# Some processors count the area of one frame, some that of all frames of a clip together, some
# allow a budget of tokens besides. None of that is repeated here: the processor is run on pixels
# without memory (torch's meta device), and the size to which it brings them is noted.

Size = tuple[int, int]  # height, width
# Areas, in the processors that resize freely; the second alone is a side.
_EDGES: tuple[str, str] = "shortest_edge", "longest_edge"
_SIDE = "longest_edge"
_FLOOR = 1.05  # a capped processor lets a frame have so much more than its least area
_TRIED = ((96, 128), (240, 320), (720, 1280), (900, 1600), (1440, 2560), (2160, 3840))
_TYPICAL = (720, 1280)  # to see beforehand whether a setting can be kept to


class _Way(NamedTuple):
    """How a processor resizes frames of whole numbers, which it rounds afterwards."""

    in_fractions: bool = False
    antialias: bool = True


_WAYS = (_Way(), _Way(in_fractions=True, antialias=False), _Way(antialias=False),
         _Way(in_fractions=True))  # fmt: skip
"""Those that are tried; the first is what the library does, the second Molmo2's."""


class Sizes:
    """What a model's processor does to the size of a clip's frames, or of an image.

    An image counts as one frame. `area` is the most pixels a frame; None: as the config says, or
    the processor itself.
    """

    def __init__(
        self, own: Any, settings: VideoConfig, kind: Literal["videos", "images"] = "videos"
    ) -> None:
        """Look at the settings.

        Args:
            own: The processor's part for this kind; None where it has none.
            settings: The `video` section.
            kind: What it is given.

        Raises:
            ConfigError: A setting is of no use to this processor.
        """
        self._own, self._kind = own, kind
        self._name = "frame_pixels" if kind == "videos" else "image_pixels"
        self._area: int | None = getattr(settings, self._name)
        self._patch: int = getattr(own, "temporal_patch_size", None) or 1
        self._cap = self._capped(settings) if kind == "videos" else {}
        # Ernie's processor draws times on whole frames, in letters as large as these let them be.
        can_draw = hasattr(own, "_render_image_with_timestamp")
        self.draws = can_draw and bool(getattr(own, "draw_on_frames", False))
        self._asked = lru_cache(maxsize=4096)(self._ask)
        self._chosen = lru_cache(maxsize=4096)(self._choose)
        if self._area is not None and own is None:
            shown = "clips" if kind == "videos" else "images"
            raise ConfigError(
                f"video.{self._name} is set, but the model's processor takes no {shown}; remove it"
            )
        if self._area is not None:
            frames = settings.num_frames or settings.max_frames
            self._check(self._area, max(frames, self._patch) if kind == "videos" else 1)

    def options(self, count: int, height: int, width: int, area: int | None) -> dict[str, Any]:
        """Keywords of the processor for `count` frames of a height and width.

        Raises:
            DataError: It takes no such clip, or cannot keep to the area.
        """
        if self._own is None:
            return {}  # nothing is resized; the processor refuses such media by their kind
        area = self._area if area is None else area
        if area is not None:
            return {"size": dict(self._chosen(count, height, width, area)), **self._cap}
        size = dict(self._own.size or {})
        # A processor may have other defaults than its parts.
        return {"size": size, **self._cap} if set(_EDGES) <= set(size) else dict(self._cap)

    def size(self, count: int, height: int, width: int, area: int | None = None) -> Size | None:
        """Height and width to which the processor brings frames; None: it cannot be asked."""
        found = self._found(count, height, width, self.options(count, height, width, area))
        return None if found is None else [(height, width), *found][-1]

    def of(self, frames: Frames) -> Size | None:
        """The same of decoded frames."""
        count, height, width = frames.pixels.shape[:3]
        return self.size(count, height, width, frames.area)

    def only(self, count: int, height: int, width: int) -> Size | None:
        """The size of what is brought to one size; None where it becomes several, or parts."""
        found = self._found(count, height, width, self.options(count, height, width, None))
        if found is None or len(found) > 1:
            return None
        return found[0] if found else (height, width)

    def decoded(self, count: int, height: int, width: int, area: int | None = None) -> Size:
        """The size at which frames are kept: the processor's, where that is smaller and stays.

        They stay as they are where its tensors would be others by a bit.
        """
        size = self._smaller(count, height, width, area)
        return size if size is not None and self._way is not None else (height, width)

    def _smaller(self, count: int, height: int, width: int, area: int | None) -> Size | None:
        from transformers.image_processing_backends import TorchvisionBackend

        found = self._found(count, height, width, self.options(count, height, width, area))
        if not found or not isinstance(self._own, TorchvisionBackend):
            return None
        size = found[0]  # the first of several, where each is made of the one before
        if size[0] * size[1] >= height * width:
            return None
        try:
            again = self._found(count, *size, self.options(count, *size, area))
        except DataError:  # of frames that it need not resize VideoLlama3's tells nothing
            return None
        return size if again in (found, found[1:]) else None

    @cached_property
    def _way(self) -> _Way | None:
        """How frames are resized beforehand so that they come out the same, tried once on noise.

        None where none does that: the processor does more to whole frames than to draw times on
        them, or keeps fractions, which frames of 8 bits have lost.
        """
        for height, width in _TRIED:
            size = self._smaller(2, height, width, None)
            if size is None:
                continue
            noise = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), np.uint8)
            whole = self._made(noise)
            for way in _WAYS:
                parts = [self.shrink(image, size, i, way) for i, image in enumerate(noise)]
                scaled = self._made(np.stack(parts), drawn=self.draws)
                if all(torch.equal(whole[name], scaled[name]) for name in whole):
                    return way
            break
        return None

    def _made(self, pixels: Array, *, drawn: bool = False) -> dict[str, torch.Tensor]:
        """The tensors of the processor's part alone, of frames a second apart."""
        count, height, width = pixels.shape[:3]
        given = self._pixels(count, height, width)
        if self.draws:
            given["draw_on_frames"] = not drawn
        given["videos"] = [torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()]
        made = self._own(**given, **self.options(count, height, width, None), return_tensors="pt")
        return {name: value for name, value in made.items() if isinstance(value, torch.Tensor)}

    def shrink(
        self, image: Array, size: Size, second: float = 0.0, way: _Way | None = None
    ) -> Array:  # [H, W, 3] uint8 -> [h, w, 3] uint8
        """A frame as the processor itself resizes it; brought there once, it leaves it as it is.

        Args:
            image: As large as in the file.
            size: From `decoded`.
            second: Its time, which is drawn on it first where the processor draws times.
            way: How; None: the one that was found, or else the library's.
        """
        from transformers.image_processing_backends import TorchvisionBackend
        from transformers.image_utils import SizeDict

        way = way or self._way or _WAYS[0]
        frame = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
        if self.draws:
            time = self._own._convert_timestamp(second)
            frame = self._own._render_image_with_timestamp(frame[0], time)[None]
        frame = frame.float() if way.in_fractions else frame
        small = TorchvisionBackend.resize(
            self._own,
            frame,
            SizeDict(height=size[0], width=size[1]),
            resample=self._own.resample,
            antialias=way.antialias,
        )
        small = small.round().clamp(0, 255).byte() if way.in_fractions else small
        return small[0].permute(1, 2, 0).numpy()

    def _capped(self, settings: VideoConfig) -> dict[str, bool]:
        """The setting of processors that can cap a clip, said: left open, they warn."""
        knows = getattr(getattr(self._own, "valid_kwargs", None), "__annotations__", {})
        wanted = settings.cap_pixels_per_frame
        if "cap_pixels_per_frame" in knows:
            cap = self._own.cap_pixels_per_frame if wanted is None else wanted
            return {"cap_pixels_per_frame": bool(cap)}
        if wanted is not None:
            name = "the model has none" if self._own is None else type(self._own).__name__
            raise ConfigError(
                "video.cap_pixels_per_frame is set, but the model's video processor "
                f"({name}) knows no such cap; remove it"
            )
        return {}

    def _check(self, area: int, count: int) -> None:
        """Refuse an area that nothing can be brought to."""
        size = dict(self._own.size or {})
        if not set(_EDGES) <= set(size) and set(size) != {_SIDE}:
            kind, one = ("video", "frame") if self._kind == "videos" else ("image", "image")
            raise ConfigError(
                f"video.{self._name} is set, but the model's {kind} processor brings every {one} "
                f"to one size ({size}); remove it"
            )
        try:
            self._chosen(count, *_TYPICAL, area)
        except DataError as error:
            raise ConfigError(f"video.{self._name} is {area}: {error}") from error

    def _choose(self, count: int, height: int, width: int, area: int) -> dict[str, int]:
        """The processor's own size under which a frame is largest within the area."""
        own = dict(self._own.size or {})
        if set(own) == {_SIDE}:
            return {_SIDE: self._side(count, height, width, area, int(own[_SIDE]))}
        if not set(_EDGES) <= set(own):
            raise DataError(
                f"{type(self._own).__name__} brings every frame to one size ({own}) and to no "
                "max_pixels; leave it out"
            )
        padded = -(-count // self._patch) * self._patch
        best, kept, least_seen = 0, None, (height, width)
        frames = sorted({1, count, padded, max(padded - self._patch, 1)})
        for most in (area * number for number in frames):
            least = min(int(own["shortest_edge"]), most)
            if self._cap.get("cap_pixels_per_frame"):
                least = min(least, int(area / _FLOOR))
            for edge in dict.fromkeys((least, least // 4, 1)):  # a frame is made larger, too
                edges = dict(zip(_EDGES, (max(edge, 1), most), strict=True))
                seen = self._steps(count, height, width, {"size": edges, **self._cap})[-1]
                least_seen = min(least_seen, seen, key=lambda size: size[0] * size[1])
                if seen[0] * seen[1] <= area:
                    if seen[0] * seen[1] > best:
                        best, kept = seen[0] * seen[1], edges
                    break
        if kept is None:
            raise self._too_large(count, height, width, area, least_seen)
        return kept

    def _side(self, count: int, height: int, width: int, area: int, most: int) -> int:
        """The longest side, of at most the processor's own, that keeps a frame within the area."""

        def seen(side: int) -> Size:
            sizes = self._steps(count, height, width, {"size": {_SIDE: side}})
            # The first of several is a step on the way; of an image, the second is cut into tiles.
            return max(sizes[1:] or sizes, key=lambda size: size[0] * size[1])

        side, size = most, seen(most)
        while size[0] * size[1] > area:
            before = size
            side = max(min(side - 1, int(side * (area / (size[0] * size[1])) ** 0.5)), 1)
            size = seen(side)
            if side == 1 or size == before == seen(max(side // 2, 1)):  # it follows no side
                raise self._too_large(count, height, width, area, size)
        return side

    def _steps(
        self, count: int, height: int, width: int, options: dict[str, Any]
    ) -> tuple[Size, ...]:
        """As `_found`, at least one: a frame that is not resized is brought to its own size."""
        found = self._found(count, height, width, options)
        if found is None:
            raise DataError(
                f"{type(self._own).__name__} does not say to which size it brings "
                f"{self._described(count, height, width)}; leave the area to it"
            )
        return found or ((height, width),)

    def _too_large(self, count: int, height: int, width: int, area: int, least: Size) -> DataError:
        return DataError(
            f"{type(self._own).__name__} brings {self._described(count, height, width)} to no "
            f"size of at most {area:,} pixels; the least is {least[1]} x {least[0]}"
        )

    def _described(self, count: int, height: int, width: int) -> str:
        if self._kind == "images":
            return f"an image of {width} x {height}"
        return f"a clip of {count} frame{'s' * (count != 1)} of {width} x {height}"

    def _found(
        self, count: int, height: int, width: int, options: dict[str, Any]
    ) -> tuple[Size, ...] | None:
        found = self._asked(count, height, width, json.dumps(options))
        if isinstance(found, str):
            raise DataError(found)
        return found

    def _ask(
        self, count: int, height: int, width: int, options: str
    ) -> tuple[Size, ...] | str | None:
        """The sizes to which frames are brought one after another; a text: why they are refused.

        None where that cannot be seen without pixels.
        """
        with _Resizing() as seen:
            try:
                self._own(**self._pixels(count, height, width), **json.loads(options))
            except ValueError as error:
                described = self._described(count, height, width)
                return f"{type(self._own).__name__} does not take {described} ({error})"
            except (RuntimeError, TypeError, AttributeError):
                # A copy or a value of what is not there, or code for PIL's images alone. If it
                # comes after the resizing, the size is known.
                if not seen.sizes:
                    return None
        return tuple(seen.sizes)

    def _pixels(self, count: int, height: int, width: int) -> dict[str, Any]:
        shape = (count, 3, height, width) if self._kind == "videos" else (3, height, width)
        empty = torch.empty(shape, dtype=torch.uint8, device="meta")
        if self._kind == "images":
            return {"images": [empty]}
        about = {"fps": 1.0, "total_num_frames": count, "duration": float(count)}
        about["frames_indices"] = list(range(count))
        given = {"videos": [empty], "do_sample_frames": False, "video_metadata": [about]}
        return {**given, "draw_on_frames": False} if self.draws else given  # it takes pixels


class _Resizing(TorchDispatchMode):
    """Notes to which sizes images are resized."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation as it is."""
        result = func(*args, **(kwargs or {}))
        if "upsample" in str(func):
            height, width = result.shape[-2:]
            self.sizes.append((height, width))
        return result
