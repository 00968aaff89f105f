"""One preference record as the rest of mmalign sees it; `parse.py` makes it from a raw one."""

from __future__ import annotations

import json
import unicodedata
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

ExampleKind = Literal["pair", "unpaired", "list", "plain"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str
    # What else the turn says (reasoning_content, tool_calls, name), as the text of a JSON object,
    # so that a turn can be hashed; "": nothing.
    extra: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The turn as chat templates take it."""
        further: dict[str, Any] = json.loads(self.extra) if self.extra else {}
        return {"role": self.role, "content": self.content, **further}


@dataclass(frozen=True, slots=True)
class Template:
    """What a row hands its chat template beside the messages, as JSON texts; "": nothing."""

    tools: str = ""  # a list of tools
    options: str = ""  # an object of keywords (`chat_template_kwargs`)

    def __bool__(self) -> bool:
        """Whether there is anything."""
        return bool(self.tools or self.options)


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture by reference: a file, or one cell of a table; its bytes are read when needed."""

    path: Path  # the picture file, or the parquet or arrow file that holds it
    row: int = -1  # of the table, counted from 0; -1: `path` is the picture itself
    column: str = ""

    def __str__(self) -> str:
        """The place, as messages name it; rows count from 1."""
        return str(self.path) if self.row < 0 else f"{self.path}:{self.row + 1} {self.column}"


@dataclass(frozen=True, slots=True)
class Clip:
    """Moving pictures by reference, or a part of them; decoded when needed."""

    path: Path
    start: float = 0.0  # seconds
    end: float | None = None  # seconds; None: the file's end
    frames: tuple[int, ...] = ()  # frame numbers of the file, chosen before; (): by the config
    # Of this clip alone; None: as the config says. Seeds of answers follow from what is printed.
    fps: float | None = field(default=None, repr=False)  # frames a second
    max_pixels: int | None = field(default=None, repr=False)  # a frame


@dataclass(frozen=True, slots=True)
class Sound:
    """A track by reference: a sound file, or the sound of a video file."""

    path: Path
    start: float = 0.0  # seconds
    end: float | None = None  # seconds; None: the file's end


@dataclass(frozen=True, slots=True)
class Change:
    """How media are altered before they are shown: a corrupted or an augmented clip."""

    operation: str
    seed: int
    donor: Clip | None = None  # where the operation takes frames or sound from another clip


@dataclass(frozen=True, slots=True)
class Media:
    """What a prompt shows and plays, each kind in the order in which the prompt names it.

    `<video>`, `<image>` and `<audio>` in the prompt's text are their places; where a kind is not
    named, its members stand before the text of the first user turn: videos, images, sounds.
    """

    videos: tuple[Clip, ...] = ()
    images: tuple[Picture, ...] = ()
    sounds: tuple[Sound, ...] = ()
    change: Change | None = None  # of the first video, or of the first sound

    def __bool__(self) -> bool:
        """Whether there is anything to see or hear."""
        return bool(self.videos or self.images or self.sounds)

    def unchanged(self) -> Media:
        """The same media as they lie in their files."""
        return self if self.change is None else replace(self, change=None)

    def files(self) -> tuple[Path | Picture, ...]:
        """Where each medium lies, in order."""
        sounds = (sound.path for sound in self.sounds)
        return (*(clip.path for clip in self.videos), *self.images, *sounds)


Prompt = str | tuple[Message, ...]
Response = Prompt


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt with what its row hands the chat template beside it, where it hands anything."""

    prompt: Prompt
    template: Template
    place: str = field(default="", compare=False, repr=False)  # file and line, for messages


@dataclass(frozen=True, slots=True)
class Candidate:
    """One (context, response) pair of a row; what is None comes from the row."""

    response: str | Path | Picture | tuple[Message, ...]  # "": none, of a row of a prompt alone
    prompt: Prompt | None = None  # None: the row's prompt
    media: Media | None = None  # None: the row's media
    spans: tuple[tuple[int, int], ...] = ()  # character ranges [start, end) of the response
    steps: tuple[tuple[int, int], ...] = ()  # character ranges of its reasoning steps
    role: str = ""  # "" rated | "mismatched" | "calibration" | "rationale" | "online"
    complete: bool = True  # False: the text was cut, so no end token may be learned after it


@dataclass(frozen=True, slots=True)
class Example:
    """One row: a prompt and K candidates with labels. Rated candidates come first."""

    id: str
    prompt: Prompt
    candidates: tuple[Candidate, ...]  # K
    labels: tuple[float, ...]  # K
    kind: ExampleKind = "pair"
    weight: float = 1.0
    media: Media = Media()
    template: Template = Template()
    # A dict and not a mapping proxy: loader workers pickle examples.
    meta: Mapping[str, Any] = field(default_factory=dict[str, Any])
    place: str = field(default="", compare=False, repr=False)  # file and line, for messages

    @property
    def num_rated(self) -> int:
        """How many candidates carry a label of their own; extra roles come after them."""
        return sum(not candidate.role for candidate in self.candidates)

    @property
    def is_tie(self) -> bool:
        """Whether two or more rated candidates all have the same label."""
        rated = self.labels[: self.num_rated]
        return len(rated) > 1 and len(set(rated)) == 1

    def files(self) -> tuple[Path | Picture, ...]:
        """Where what the row and its rated candidates show and play lies."""
        own = (candidate.media for candidate in self.candidates[: self.num_rated])
        return tuple(file for media in (self.media, *own) if media for file in media.files())


def as_text(text: Prompt | Asked | Path | Picture) -> str:
    """A prompt or response as one string, with the roles of a conversation."""
    if isinstance(text, Asked):
        text = text.prompt
    if not isinstance(text, tuple):
        return str(text)
    return "\n".join(f"{turn.role}: {turn.content}{_further(turn)}" for turn in text)


def _further(turn: Message) -> str:
    return f" {turn.extra}" if turn.extra else ""


def normalised(text: Prompt | Asked | Path | Picture) -> str:
    """The text without what does not make it another one: case, spacing, forms of a character."""
    if isinstance(text, Picture):
        return str(text)
    return " ".join(unicodedata.normalize("NFKC", as_text(text)).casefold().split())
