"""What a record shows and plays: media of a prompt, and the images that are compared.

A medium of a prompt is a path from the data file's folder, or an object with `path` (or the kind's
own name), `start` and `end` or `span` in seconds, and for clips `frames`, numbers chosen before, or
`fps` and `max_pixels` (of a frame). A single clip may have `start`, `end`, `span` and `frames`
beside it in the record; `start` and `end` then hold for the one sound beside it too. `fps` and
`max_pixels` in the record hold for all its clips. A kind that a side does not name is that of the
row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from mmalign.data.example import Candidate, Clip, ExampleKind, Media, Picture, Prompt, Sound
from mmalign.data.fields import Fields, as_list, as_object, number, show
from mmalign.data.pictures import PictureRoot

Medium = TypeVar("Medium", Clip, Picture, Sound)

KINDS = ("video", "image", "audio")
SIDES = ("", "_chosen", "_rejected", "_corrupted")
MEDIA_KEYS = tuple(f"{kind}{s}{side}" for kind in KINDS for s in ("", "s") for side in SIDES)
_PART_KEYS = ("start", "end", "span", "frames")
_READING_KEYS = ("fps", "max_pixels")
WHOLE_KEYS = (*_PART_KEYS, *_READING_KEYS)
"""What a record may say of its media beside them."""
_NAMES = {
    side: frozenset(f"{kind}{s}{side}" for kind in KINDS for s in ("", "s")) for side in SIDES
}
_OF_ROW = _NAMES[""] | set(_PART_KEYS)
_PARTS = {"video": WHOLE_KEYS, "image": (), "audio": ("start", "end", "span")}
"""What an object may say of a medium beside its path."""

_FEATURES = (".npy", ".npz", ".pt", ".pth")
_SOUNDS = (".mp3", ".wav", ".flac", ".ogg", ".m4a", ".aac", ".opus")


def has_media(fields: Fields, side: str = "") -> bool:
    """Whether the record names media for a side, or for the row."""
    return fields.has_any(_NAMES[side])


def read_media(fields: Fields, root: PictureRoot | None) -> Media:
    """The media of the row; problems go to `fields`.

    Args:
        fields: The record.
        root: Where paths start and what they may not leave.
    """
    return _with_span(fields, _read(fields, root, "")) if fields.has_any(_OF_ROW) else Media()


def read_side(fields: Fields, root: PictureRoot | None, side: str, row: Media) -> Media | None:
    """The media of a side, or None where they are those of the row.

    Args:
        fields: The record.
        root: Where paths start and what they may not leave.
        side: "_chosen", "_rejected" or "_corrupted".
        row: What is shown in place of the kinds that the side does not name.
    """
    if not has_media(fields, side):
        return None
    own = _read(fields, root, side)
    return Media(own.videos or row.videos, own.images or row.images, own.sounds or row.sounds)


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


def _read(fields: Fields, root: PictureRoot | None, side: str) -> Media:
    videos = _several(fields, "video", side, root, _clip)
    beside = {key: fields.get(key) for key in _READING_KEYS if videos and key in fields}
    if beside:
        videos = [_read_as(fields, "the record", clip, beside) for clip in videos]
    images = _several(fields, "image", side, root, _picture)
    if images and "max_pixels" in fields:
        fields.fail("max_pixels is of clips; how large images are shown is video.image_pixels")
    sounds = _several(fields, "audio", side, root, _sound)
    # A file of sound alone under `video` is a sound: some layouts have one column for both.
    heard = [clip for clip in videos if clip.path.suffix.lower() in _SOUNDS]
    shown = (clip for clip in videos if clip not in heard)
    sounds += [Sound(clip.path, clip.start, clip.end) for clip in heard]
    return Media(tuple(shown), tuple(images), tuple(sounds))


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
    path, parts = _file(fields, name, value, "video", root)
    span = _span(fields, name, parts)
    frames = _frames(fields, name, parts.get("frames"))
    if path is None or span is None:
        return None
    return _read_as(fields, name, Clip(path, *span, frames), parts)


def _sound(fields: Fields, name: str, value: Any, root: PictureRoot | None) -> Sound | None:
    path, parts = _file(fields, name, value, "audio", root)
    span = _span(fields, name, parts)
    return None if path is None or span is None else Sound(path, *span)


def _picture(fields: Fields, name: str, value: Any, root: PictureRoot | None) -> Picture | None:
    if isinstance(value, Picture):  # a cell of a table
        return value
    path, _ = _file(fields, name, value, "image", root)
    return None if path is None else Picture(path)


def _file(
    fields: Fields, name: str, value: Any, kind: str, root: PictureRoot | None
) -> tuple[Path | None, dict[str, Any]]:
    """The file of a medium, and the keys of an object beside its path."""
    parts = {k: v for k, v in (as_object(value) or {}).items() if v is not None}
    if not parts:
        return _path(fields, name, value, root), {}
    given = [parts.pop(key) for key in ("path", kind) if key in parts]
    if len(given) != 1:
        what = f"{name} must have one `path`, as text or in an object"
        fields.fail(what, f"is {show(value)}")
        return None, {}
    known = ", ".join(("path", *_PARTS[kind]))
    for key in sorted(set(parts) - set(_PARTS[kind])):
        fields.fail(f"{name} has the key {key!r}, which means nothing there; it may have {known}")
    return _path(fields, name, given[0], root), parts


def _path(fields: Fields, name: str, value: Any, root: PictureRoot | None) -> Path | None:
    if not isinstance(value, str) or not value.strip():
        what = f"{name} must be the path of a file, or an object with `path`"
        fields.fail(what, f"is {show(value)}")
        return None
    if value.lower().endswith(_FEATURES):
        found = f"{show(value, 80)} holds features; give the clip itself"
        fields.fail(f"{name} must be a media file", found)
        return None
    found = _found(fields, name, value, root, what="a media file", absent=True)
    return found and found.path  # `video.bad_media` is the policy for what is absent


def _found(
    fields: Fields, name: str, path: str, root: PictureRoot | None, **how: Any
) -> Picture | None:
    """The file at a path, which must start from a known folder and stay inside it."""
    if root is None:
        fields.fail(f"{name} is a path, and no folder is known that it starts from")
        return None
    found = root.find(path, **how)
    if isinstance(found, Picture):
        return found
    fields.fail(f"{name} {found.what}", found.found)
    return None


def _span(fields: Fields, name: str, parts: dict[str, Any]) -> tuple[float, float | None] | None:
    """Start and end in seconds; None where they are wrong."""
    given = [parts.get("start"), parts.get("end")]
    if "span" in parts:
        pair = as_list(parts["span"])
        if pair is None or len(pair) != 2 or given != [None, None]:
            what = f"{name}: span must be [start, end] in seconds, without start and end beside it"
            fields.fail(what, f"is {show(parts)}")
            return None
        given = pair
    start = 0.0 if given[0] is None else number(given[0])
    end = None if given[1] is None else number(given[1])
    wrong = given[1] is not None and (end is None or start is None or end <= start)
    if start is None or start < 0 or wrong:
        what = f"{name}: start and end must be seconds, 0 <= start < end"
        fields.fail(what, f"are {show(given)}")
        return None
    return start, end


def _frames(fields: Fields, name: str, value: Any) -> tuple[int, ...]:
    numbers = as_list(value) if value is not None else []
    if numbers is None or not all(type(n) is int and n >= 0 for n in numbers):
        fields.fail(f"{name}: frames must be frame numbers from 0", f"is {show(value)}")
        return ()
    return tuple(numbers)


def _read_as(fields: Fields, name: str, clip: Clip, said: dict[str, Any]) -> Clip:
    """The clip with the rate and the size at which it is to be read; what it says itself stays."""
    fps, area = said.get("fps"), said.get("max_pixels")
    rate = None if fps is None else number(fps)
    if fps is not None and (rate is None or not 1e-4 <= rate <= 1000):
        fields.fail(f"{name}: fps must be frames a second, 0.0001 to 1000", f"is {show(fps)}")
        rate = None
    if area is not None and (type(area) is not int or not 256 <= area <= 2**26):
        what = f"{name}: max_pixels must be a whole number of pixels of a frame, at least 256"
        fields.fail(what, f"is {show(area)}")
        area = None
    return replace(
        clip,
        fps=rate if clip.fps is None else clip.fps,
        max_pixels=area if clip.max_pixels is None else clip.max_pixels,
    )


def _with_span(fields: Fields, media: Media) -> Media:
    """A part of the one clip, or of the one sound, given beside it in the record."""
    if not media or not any(key in fields for key in _PART_KEYS):
        return media
    given = {key: fields.get(key) for key in _PART_KEYS if key in fields}
    span = _span(fields, "the record", given)
    frames = _frames(fields, "the record", given.get("frames"))
    one, kinds = (*media.videos, *media.sounds), (len(media.videos), len(media.sounds))
    if kinds not in ((1, 0), (1, 1), (0, 1)) or (frames and not media.videos):
        fields.fail(
            f"{', '.join(given)} in the record must be of one clip, or one sound",
            f"it has {kinds[0]} clips and {kinds[1]} sounds; write them into the media: "
            '{"path": ..., "start": ..., "end": ...}',
        )
        return media
    timed = set(given) != {"frames"}
    twice = timed and any(item.start or item.end is not None for item in one)
    if twice or (frames and media.videos[0].frames):
        fields.fail(f"{', '.join(given)} in the record must not be given in its media too")
        return media
    videos, sounds = media.videos, media.sounds
    if frames:
        videos = tuple(replace(clip, frames=frames) for clip in videos)
    if timed and span is not None:
        start, end = span
        videos = tuple(replace(clip, start=start, end=end) for clip in videos)
        sounds = tuple(replace(sound, start=start, end=end) for sound in sounds)
    return replace(media, videos=videos, sounds=sounds)


PICTURE_KEYS = ("image_chosen", "image_rejected", "images", "image")


def read_pictures(
    fields: Fields, kind: ExampleKind, root: PictureRoot | None
) -> list[Candidate | None]:
    """The rated candidates; None in the place of each that is wrong.

    Args:
        fields: The record. An image is a path, a {path} object, or a Image already.
        kind: What the record is.
        root: Where paths start and what they may not leave.
    """
    if not isinstance(fields.get("prompt") or "", str):
        fields.fail("the prompt of an image must be text, not messages")
    if kind == "pair":
        return _pair(fields, root)
    if kind != "list":
        return [_candidate(fields, "image", fields.get("image"), root)]
    items = as_list(fields.get("images"))
    if not items or len(items) == 1:
        found = f"is {show(fields.get('images'))}"
        fields.fail("images must be a list of at least two images", found)
    return [_candidate(fields, "an entry of images", item, root) for item in items or ()]


def _pair(fields: Fields, root: PictureRoot | None) -> list[Candidate | None]:
    sides: list[Candidate | None] = []
    for side in ("chosen", "rejected"):
        caption = fields.text(f"prompt_{side}") if f"prompt_{side}" in fields else None
        if isinstance(caption, tuple):
            fields.fail("the prompt of an image must be text, not messages")
            caption = None
        key = f"image_{side}"
        sides.append(_candidate(fields, key, fields.get(key), root, caption))
    chosen, rejected = sides
    if chosen and chosen == rejected:
        fields.fail("image_chosen equals image_rejected")
    return sides


def _candidate(
    fields: Fields, name: str, value: Any, root: PictureRoot | None, caption: str | None = None
) -> Candidate | None:
    if value is None:
        fields.fail(f"{name} is missing")
        return None
    parts = as_object(value) or {}
    path = parts.get("path", value)
    if isinstance(path, str) and path.strip() and not parts.get("bytes"):
        value = _found(fields, name, path, root)
        if value is None:
            return None
    if not isinstance(value, Picture):
        fields.fail(f"{name} must be the path of an image file", f"is {show(value)}")
        return None
    return Candidate(value, prompt=caption)
