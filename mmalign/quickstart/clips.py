"""Synthetic clips: one coloured shape to which one of eight things happens, and questions about it.

Every event has its reverse in time, so no single frame tells the two apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmalign.config import VideoConfig
from mmalign.data.example import Clip

Pixels = NDArray[np.uint8]

SIDE = 32  # pixels
NUM_FRAMES = 8
FPS = 8
SHAPES = ("disc", "cross", "bar")
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 230),
    "yellow": (230, 210, 40),
}
REVERSED = {
    "move left": "move right",
    "move right": "move left",
    "move up": "move down",
    "move down": "move up",
    "grow": "shrink",
    "shrink": "grow",
    "appear": "vanish",
    "vanish": "appear",
}
"""What each event is when the clip runs backwards."""

EVENTS = tuple(REVERSED)
_BITS_PER_SECOND = 400_000
_NOISE = 4.0  # standard deviation of the background's and the shape's grain, of 255


@dataclass(frozen=True, slots=True)
class Scene:
    """What a clip shows."""

    shape: str
    colour: str
    event: str


@dataclass(frozen=True)
class Clips:
    """Clips in files.

    Attributes:
        files: Where they lie.
        scenes: What each shows.
    """

    files: tuple[Path, ...]
    scenes: tuple[Scene, ...]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, part: slice) -> Clips:
        return Clips(self.files[part], self.scenes[part])

    @cached_property
    def pixels(self) -> Pixels:  # [N, 8, 32, 32, 3] uint8
        """The frames as they come out of the files."""
        return np.stack([read(file) for file in self.files])


def make(
    folder: Path, count: int, seed: int, track: Callable[[Sequence[Path]], Iterable[Path]] = iter
) -> Clips:
    """Draw clips and write them as `0000.mp4` and so on.

    Args:
        folder: To write into; made if missing.
        count: How many. The eight events take turns.
        seed: Decides shapes, colours, places, sizes and noise.
        track: Passes the files on, and may say how far it is.
    """
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    files = tuple(folder / f"{index:04d}.mp4" for index in range(count))
    scenes: list[Scene] = []
    for index, file in enumerate(track(files)):
        scene = Scene(
            shape=str(random.choice(SHAPES)),
            colour=str(random.choice(list(COLOURS))),
            event=EVENTS[index % len(EVENTS)],
        )
        scenes.append(scene)
        write(file, draw(scene, random))
    return Clips(files, tuple(scenes))


def draw(scene: Scene, random: np.random.Generator) -> Pixels:  # [8, 32, 32, 3]
    """A scene's frames; where, how large and on which grey is drawn again each time."""
    t = np.linspace(-1.0, 1.0, NUM_FRAMES)
    centre = random.uniform(11.0, 21.0, 2)  # x, y
    radius = np.full(NUM_FRAMES, random.uniform(5.5, 7.0))
    reach = random.uniform(5.0, 7.5)
    switch = random.integers(3, 6)  # the first frame in which an appearing shape is there
    grey = random.uniform(0.0, 60.0)
    places = np.tile(centre, (NUM_FRAMES, 1))  # [8, 2]
    is_there = np.ones(NUM_FRAMES, np.bool_)
    backwards = scene.event in ("move left", "move up", "shrink", "vanish")
    if backwards:
        t = -t
    if scene.event.startswith("move"):
        axis = 0 if scene.event in ("move left", "move right") else 1
        middle = SIDE / 2
        places[:, axis] = middle + 0.4 * (centre[axis] - middle) + reach * t
    elif scene.event in ("grow", "shrink"):
        radius = radius * (1.1 + 0.5 * t)
    else:
        is_there = (np.arange(NUM_FRAMES) >= switch) != backwards
    cover = np.stack([_cover(scene.shape, *spot) for spot in zip(places, radius, strict=True)])
    cover = (cover * is_there[:, None, None])[..., None]  # [8, 32, 32, 1]
    frames = cover * np.array(COLOURS[scene.colour]) + (1.0 - cover) * grey
    frames = frames + random.normal(0.0, _NOISE, frames.shape)
    return np.clip(np.rint(frames), 0, 255).astype(np.uint8)


def write(file: Path, pixels: Pixels) -> None:
    """Frames [T, H, W, 3] as an mp4 file."""
    import av

    with av.open(str(file), "w") as container:
        stream: Any = container.add_stream("mpeg4", rate=FPS)
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = _BITS_PER_SECOND
        stream.codec_context.thread_count = 1  # the file does not depend on the machine's cores
        for frame in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def read(file: Path) -> Pixels:
    """The frames of a clip as training will see them, [8, 32, 32, 3]."""
    from mmalign.video.media import read_frames

    return read_frames(Clip(file), VideoConfig(num_frames=NUM_FRAMES)).pixels


def _cover(shape: str, place: NDArray[np.float64], radius: float) -> NDArray[np.float64]:
    """Share of each pixel [32, 32] that a shape covers; the edge is one pixel soft."""
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    dx, dy = np.abs(x - place[0]), np.abs(y - place[1])
    if shape == "disc":
        outside = np.hypot(dx, dy) - radius
    elif shape == "bar":
        outside = np.maximum(dx - 1.3 * radius, dy - 0.4 * radius)
    else:
        thin, long = 0.25 * radius, 1.2 * radius
        lying, standing = (
            np.maximum(along - long, across - thin) for along, across in ((dx, dy), (dy, dx))
        )
        outside = np.minimum(lying, standing)
    return np.clip(0.5 - outside, 0.0, 1.0)


YES, NO = "yes", "no"


@dataclass(frozen=True, slots=True)
class Asked:
    """A question about a clip and its true answer: a sentence in words of a closed list."""

    question: str
    answer: str


def what_happens(scene: Scene) -> Asked:
    """The open question about the event."""
    return Asked("what happens in the video ?", sentence(scene))


def does(scene: Scene, event: str) -> Asked:
    """Whether an event happens. Either way the answer goes on to say what does."""
    word = YES if event == scene.event else NO
    return Asked(f"does the {scene.colour} {scene.shape} {event} ?", f"{word} , {sentence(scene)}")


def which_colour(scene: Scene) -> Asked:
    """The open question about the colour."""
    return Asked("what colour is the shape ?", f"the shape is {scene.colour} .")


def which_shape(scene: Scene) -> Asked:
    """The open question about the shape."""
    return Asked("what shape is it ?", f"it is a {scene.shape} .")


def is_it(scene: Scene, colour: str) -> Asked:
    """Whether the shape has a colour: yes or no where nothing has to be seen moving."""
    word = YES if colour == scene.colour else NO
    return Asked(f"is the shape {colour} ?", f"{word} , the shape is {scene.colour} .")


def sentence(scene: Scene) -> str:
    """What happens: `the red disc moves left .`."""
    verb, *rest = scene.event.split()
    verb += "es" if verb.endswith("sh") else "s"
    return " ".join(["the", scene.colour, scene.shape, verb, *rest, "."])
