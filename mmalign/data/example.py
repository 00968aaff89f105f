"""One preference record as the rest of mmalign sees it, the row it comes from, and its labels."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mmalign.data.fields import Fields, number

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
    """An image by reference: a file, or one cell of a table; its bytes are read when needed."""

    path: Path  # the image file, or the parquet or arrow file that holds it
    row: int = -1  # of the table, counted from 0; -1: `path` is the image itself
    column: str = ""

    def __str__(self) -> str:
        """The place, as messages name it; rows count from 1."""
        return str(self.path) if self.row < 0 else f"{self.path}:{self.row + 1} {self.column}"


@dataclass(frozen=True, slots=True)
class Clip:
    """A video by reference, or a part of it; decoded when needed."""

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

    def by_kind(self) -> dict[str, tuple[Clip, ...] | tuple[Picture, ...] | tuple[Sound, ...]]:
        """Its members by the name of their mark."""
        return {"video": self.videos, "image": self.images, "audio": self.sounds}

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


HELD_OUT = ("eval", "validation", "test", "valid", "val", "dev")
"""Values of a `split` column, or names of hub splits, that are not trained on."""

Wanted = Callable[[str], bool]
"""Whether rows of a split are wanted; "" is that of rows that name none."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it was found."""

    place: str  # "file.jsonl:12": the line, or the row counted from 1 where there are no lines
    value: dict[str, Any] | None  # None: could not be read
    problem: str = ""


_OF_VOTES = ("votes_chosen", "votes_rejected", "votes_tie")
_PROBABILITIES = ("p_chosen", "agreement")
_GRADED = ("label_chosen", "label_rejected")
PREFERENCE = ("tie", *_PROBABILITIES, *_OF_VOTES, *_GRADED)
"""Keys of a pair that say which response is the better one, and by how much."""

_SIDES = (("chosen", "rejected"), ("image_chosen", "image_rejected"))
_SIDE = re.compile(r"(?:(?P<stem>.+[_-]))?(?P<side>chosen|rejected)(?P<rest>[_-].+)?", re.DOTALL)
_BEGIN_WITH_SIDE = ("_cut", "_masked")


def read_labels(fields: Fields, kind: ExampleKind, num_responses: int) -> tuple[float, ...]:
    """The labels of the rated responses, by the keys that a record of the kind has for them."""
    if kind == "pair":
        return _pair_labels(fields)
    if kind != "list":
        return (1.0 if kind == "plain" or fields.flag("desirable") else 0.0,)
    scores = fields.numbers("scores")
    if num_responses and scores and num_responses != len(scores):
        fields.fail("scores must have one number a response", f"{len(scores)} for {num_responses}")
    return scores


def _pair_labels(fields: Fields) -> tuple[float, float]:
    p = _p_chosen(fields)
    graded = [fields.number(f"label_{side}", -math.inf) for side in ("chosen", "rejected")]
    if graded == [None, None]:
        return (p, 1.0 - p)
    if None in graded:
        fields.fail("label_chosen and label_rejected must be given together")
    if p != 1.0:
        fields.fail("label_chosen is given beside a probability, votes or tie; give one of them")
    return (graded[0] or 0.0, graded[1] or 0.0)


def _p_chosen(fields: Fields) -> float:
    """Probability that chosen is better: a tie, p_chosen, agreement, or votes; else 1."""
    given = {"tie": 0.5 if fields.flag("tie") else None}
    given |= {key: fields.number(key, 0.0, 1.0) for key in _PROBABILITIES}
    counts = [fields.number(name, 0.0) for name in _OF_VOTES]
    chosen, rejected, tie = (count or 0.0 for count in counts)
    if total := chosen + rejected + tie:
        given["votes"] = (chosen + 0.5 * tie) / total
    elif any(count is not None for count in counts):
        fields.fail("votes must not all be 0")
    given = {key: p for key, p in given.items() if p is not None}
    values = list(given.values())
    if values and max(values) - min(values) > 1e-6 and "tie" not in given:
        fields.fail(f"{' and '.join(given)} contradict each other", f"give {values}")
    return values[0] if values else 1.0


def prefers_rejected(record: Mapping[str, Any]) -> str:
    """What of a pair's record says that `rejected` is the better response; "" where nothing does.

    Labels that cannot be read say nothing: reading the record names what is wrong with them.
    """
    given = {key: record[key] for key in PREFERENCE if record.get(key) is not None}
    is_pair = any(all(record.get(name) is not None for name in names) for names in _SIDES)
    if not given or not is_pair:
        return ""
    fields = Fields(given)
    chosen, rejected = _pair_labels(fields)
    if fields.problems or chosen >= rejected:
        return ""
    if any(key in given for key in _OF_VOTES):
        return "votes"
    return next((key for key in _PROBABILITIES if key in given), " and ".join(_GRADED))


def in_order(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The record with the response as `chosen` that its own labels prefer.

    A pair whose labels prefer `rejected` is turned round: every key of one side changes place with
    that of the other (texts, prompts, media, spans, cut flags, votes, scores), and a probability p
    becomes 1 - p. Any other record comes back as it is.
    """
    if not prefers_rejected(record):
        return record
    turned = {other_side(key, record): value for key, value in record.items()}
    given = {key: number(turned.get(key)) for key in _PROBABILITIES}
    return turned | {key: 1.0 - p for key, p in given.items() if p is not None}


def other_side(key: str, record: Mapping[str, Any]) -> str:
    """The same key of the other response: rejected_cut for chosen_cut; others as they are."""
    found = _SIDE.fullmatch(key)
    if found is None or key in _PROBABILITIES:
        return key
    other = "rejected" if found["side"] == "chosen" else "chosen"
    partner = f"{found['stem'] or ''}{other}{found['rest'] or ''}"
    # `rejected_irrelevant` is a third response, and belongs to no side.
    belongs = not found["rest"] or partner in record or found["rest"] in _BEGIN_WITH_SIDE
    return partner if belongs else key
