"""What a record's prompt shows and plays: video, image, audio, for the row or for one side.

A medium is a path from the data file's folder, or an object with `path` (or the kind's own name),
`start` and `end` in seconds, and for clips `frames`, numbers chosen before. A single clip may have
`start`, `end`, `span` and `frames` beside it in the record.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from mmalign.data.example import Clip, Media, Picture, Prompt, Sound
from mmalign.data.fields import Fields, as_list, as_object, number, show

if TYPE_CHECKING:
    from pathlib import Path

    from mmalign.data.pictures import PictureRoot

Medium = TypeVar("Medium", Clip, Picture, Sound)

KINDS = ("video", "image", "audio")
SIDES = ("", "_chosen", "_rejected", "_corrupted")
MEDIA_KEYS = tuple(f"{kind}{s}{side}" for kind in KINDS for s in ("", "s") for side in SIDES)
WHOLE_KEYS = ("start", "end", "span", "frames")
_FEATURES = (".npy", ".npz", ".pt", ".pth")
_SOUNDS = (".mp3", ".wav", ".flac", ".ogg", ".m4a", ".aac", ".opus")


def has_media(fields: Fields, side: str = "") -> bool:
    """Whether the record names media for a side, or for the row."""
    return any(f"{kind}{s}{side}" in fields for kind in KINDS for s in ("", "s"))


def read_media(fields: Fields, root: PictureRoot | None, side: str = "") -> Media:
    """The media of the row, or of a side; problems go to `fields`.

    Args:
        fields: The record.
        root: Where paths start and what they may not leave.
        side: "", "_chosen", "_rejected" or "_corrupted".
    """
    videos = _several(fields, "video", side, root, _clip)
    images = _several(fields, "image", side, root, _picture)
    sounds = _several(fields, "audio", side, root, _sound)
    # A file of sound alone under `video` is a sound: some layouts have one column for both.
    heard = [Sound(c.path, c.start, c.end) for c in videos if _is_sound(c.path)]
    shown = [clip for clip in videos if not _is_sound(clip.path)]
    media = Media(tuple(shown), tuple(images), (*sounds, *heard))
    return media if side else _with_span(fields, media)


def check_marks(fields: Fields, prompt: Prompt | None, media: Media) -> None:
    """A problem where the prompt names more or fewer media of a kind than there are."""
    if prompt is None or not media:
        return
    texts = [prompt] if isinstance(prompt, str) else [turn.content for turn in prompt]
    counts = {"video": media.videos, "image": media.images, "audio": media.sounds}
    for kind, items in counts.items():
        named = sum(text.count(f"<{kind}>") for text in texts)
        if named not in (0, len(items)):
            fields.fail(
                f"the prompt must name <{kind}> as often as there are media of the kind, or never",
                f"names it {named} times and the record has {len(items)}",
            )


def _several(
    fields: Fields,
    kind: str,
    side: str,
    root: PictureRoot | None,
    read: Callable[[Fields, str, Any, PictureRoot | None], Medium | None],
) -> list[Medium]:
    """One or many media of a kind, under the kind's name or its plural."""
    one, many = f"{kind}{side}", f"{kind}s{side}"
    if one in fields and many in fields:
        fields.fail(f"{one} and {many} are both there; give one of them")
    name = many if many in fields else one
    value = fields.get(name)
    if value is None:
        return []
    items = as_list(value)
    found = [read(fields, name, item, root) for item in ([value] if items is None else items)]
    return [medium for medium in found if medium is not None]


def _clip(fields: Fields, name: str, value: Any, root: PictureRoot | None) -> Clip | None:
    parts = as_object(value) or {}
    path = _path(fields, name, parts.get("path", parts.get("video", value)), root)
    span = _span(fields, name, parts)
    frames = _frames(fields, name, parts.get("frames"))
    return None if path is None or span is None else Clip(path, *span, frames)


def _sound(fields: Fields, name: str, value: Any, root: PictureRoot | None) -> Sound | None:
    parts = as_object(value) or {}
    path = _path(fields, name, parts.get("path", parts.get("audio", value)), root)
    span = _span(fields, name, parts)
    return None if path is None or span is None else Sound(path, *span)


def _picture(fields: Fields, name: str, value: Any, root: PictureRoot | None) -> Picture | None:
    if isinstance(value, Picture):  # a cell of a table
        return value
    parts = as_object(value) or {}
    path = _path(fields, name, parts.get("path", parts.get("image", value)), root)
    return None if path is None else Picture(path)


def _path(fields: Fields, name: str, value: Any, root: PictureRoot | None) -> Path | None:
    if not isinstance(value, str) or not value.strip():
        fields.fail(
            f"{name} must be the path of a file, or an object with `path`", f"is {show(value)}"
        )
        return None
    if value.lower().endswith(_FEATURES):
        fields.fail(
            f"{name} must be a media file",
            f"{show(value, 80)} holds features; give the clip itself",
        )
        return None
    if root is None:
        fields.fail(f"{name} is a path, and no folder is known that it starts from")
        return None
    found = root.find(value, what="media file")
    if not isinstance(found, Picture):
        fields.fail(f"{name} {found.what}", found.found)
        return None
    return found.path


def _span(fields: Fields, name: str, parts: dict[str, Any]) -> tuple[float, float | None] | None:
    """Start and end in seconds; None where they are wrong."""
    given = [parts.get("start"), parts.get("end")]
    pair = as_list(parts.get("span"))
    if pair is not None and len(pair) == 2 and given == [None, None]:
        given = pair
    start = 0.0 if given[0] is None else number(given[0])
    end = None if given[1] is None else number(given[1])
    bad = start is None or start < 0 or (given[1] is not None and (end is None or end <= start))
    if bad or start is None:
        fields.fail(
            f"{name}: start and end must be seconds, 0 <= start < end", f"are {show(given)}"
        )
        return None
    return start, end


def _frames(fields: Fields, name: str, value: Any) -> tuple[int, ...]:
    numbers = as_list(value) if value is not None else []
    if numbers is None or not all(type(n) is int and n >= 0 for n in numbers):
        fields.fail(f"{name}: frames must be frame numbers from 0", f"is {show(value)}")
        return ()
    return tuple(numbers)


def _with_span(fields: Fields, media: Media) -> Media:
    """A part of the one clip or sound, given beside it in the record."""
    if not media or not any(key in fields for key in WHOLE_KEYS):
        return media
    given = {key: fields.get(key) for key in WHOLE_KEYS if key in fields}
    span = _span(fields, "the record", given)
    frames = _frames(fields, "the record", given.get("frames"))
    if span is None:
        return media
    if len(media.videos) == 1:
        clip = replace(media.videos[0], start=span[0], end=span[1])
        return replace(media, videos=(replace(clip, frames=frames or clip.frames),))
    if not media.videos and len(media.sounds) == 1 and not frames:
        return replace(media, sounds=(Sound(media.sounds[0].path, *span),))
    fields.fail(
        f"{', '.join(given)} belong to one clip",
        f"the record has {len(media.videos)}; write them into the clips: "
        '{"path": ..., "start": ..., "end": ...}',
    )
    return media


def _is_sound(path: Path) -> bool:
    return path.suffix.lower() in _SOUNDS
