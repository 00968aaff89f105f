"""What chat messages show and play: parts of a message's content become marks in its text.

    {"type": "video"}                            its path stands in the column `videos`
    {"type": "video", "video": PATH, "start": S} or in the part, with seconds or frames

The paths go to the columns `videos`, `images` and `audios`, which `parse_media` reads. Where the
rejected conversation shows something else, that goes to `videos_rejected` and so on.
"""

from __future__ import annotations

from typing import Any

from mmalign.data.fields import as_list, as_object, show
from mmalign.data.turns import ASSISTANTS, Columns
from mmalign.errors import DataError

_ASKED = ("prompt", "messages", "conversations")
_ANSWERED = ("chosen", "rejected")
_REJECTED = "rejected_messages"  # with its own prompt
_TYPES = {
    "video": "video", "video_url": "video", "image": "image", "image_url": "image",
    "audio": "audio", "audio_url": "audio", "input_audio": "audio",
}  # fmt: skip
_KINDS = ("video", "image", "audio")
_BESIDE = {key: key for key in ("start", "end", "frames", "fps", "max_pixels")} | {
    "video_start": "start",
    "video_end": "end",
}
"""What a part may say of its medium; the last two as Qwen's own tools call them."""

Shown = dict[str, list[Any]]  # kind -> its media in order; None where the path is elsewhere


def shown_in_messages(row: Columns) -> Columns:
    """The row with content parts as text with marks, and their media in columns.

    ms-swift's `rejected_videos` and its like become the media of that side.

    Raises:
        DataError: A part is of an unknown kind, has no path, or says what is not read.
    """
    row = dict(row)
    for kind in _KINDS:
        if f"rejected_{kind}s" in row:
            row[f"{kind}s_rejected"] = row.pop(f"rejected_{kind}s")
    found = {name: _flattened(row, name) for name in (*_ASKED, *_ANSWERED, _REJECTED)}
    for kind in _KINDS if any(found.values()) else ():
        asked = [medium for name in _ASKED for medium in found[name].get(kind, ())]
        chosen, rejected = (_with(asked, found[name].get(kind, [])) for name in _ANSWERED)
        if _REJECTED in row:
            rejected = found[_REJECTED].get(kind, [])
        _fill(row, kind, "", chosen)
        if rejected != chosen and ("rejected" in row or _REJECTED in row):
            _fill(row, kind, "_rejected", rejected)
    return row


def _with(asked: list[Any], answered: list[Any]) -> list[Any]:
    """Media of a prompt with its response, which may repeat the prompt."""
    return answered if answered[: len(asked)] == asked else asked + answered


def _fill(row: Columns, kind: str, side: str, media: list[Any]) -> None:
    """Put the media of parts in their column, unless it has them."""
    if not media:
        return
    names = [name for name in (f"{kind}{side}", f"{kind}s{side}") if row.get(name) is not None]
    given = [medium for medium in media if medium is not None]
    if not given:
        if not names:
            raise DataError(
                f"messages have a part of type {kind} without a path, and there is no column "
                f"{kind}s{side} that holds it"
            )
        return
    if len(given) < len(media):
        raise DataError(f"some parts of type {kind} have a path and some have none")
    if not names:
        row[f"{kind}s{side}"] = media
        return
    column = as_list(row[names[0]])
    if (column if column is not None else [row[names[0]]]) != media:
        raise DataError(f"{names[0]} and the parts of type {kind} in the messages differ")


def _flattened(row: Columns, column: str) -> Shown:
    """What the messages of a column show; in the row, they become text with marks."""
    items = as_list(row.get(column)) or []
    if not any(_has_media(item) for item in items):
        return {}
    shown: Shown = {}
    row[column] = [_flat(item, column, shown) for item in items]
    return shown


def _content(message: Any) -> tuple[str, list[Any]]:
    turn = as_object(message) or {}
    name = "content" if "content" in turn else "value"
    return name, as_list(turn.get(name)) or []


def _has_media(message: Any) -> bool:
    return any(str((as_object(part) or {}).get("type")) in _TYPES for part in _content(message)[1])


def _flat(message: Any, column: str, shown: Shown) -> Any:
    turn = as_object(message)
    name, parts = _content(message)
    if turn is None or not parts:
        return message
    text = ""
    for item in parts:
        # Tables fill the keys that a part of another type has with null.
        part = {k: v for k, v in (as_object(item) or {}).items() if v is not None}
        kind = _TYPES.get(str(part.get("type")))
        if kind is not None and turn.get("role", turn.get("from")) in ASSISTANTS:
            raise DataError(f"{column} shows a medium in an answer; only questions can show media")
        if kind is not None:
            text += f"<{kind}>"
            shown.setdefault(kind, []).append(_medium(part, kind))
        elif part.get("type") == "text" and isinstance(part.get("text"), str):
            text += part["text"]
        else:
            raise DataError(
                f"{column} has a part that is neither text, video, image nor audio: {show(item)}"
            )
    return {**turn, name: text}


def _medium(part: dict[str, Any], kind: str) -> Any:
    """The path of a part, an object where it also says which stretch; None without a path."""
    names = (str(part["type"]), kind, "path", "url")
    values = [part[name] for name in dict.fromkeys(names) if name in part]
    left = {k: v for k, v in part.items() if k not in (*names, "type") and (k, v) != ("text", "")}
    for key in left:
        if key not in _BESIDE:
            raise DataError(
                f"a part of type {kind} has {key!r}, which is not read from messages; how many "
                "frames of which size are shown is set under `video` in the config"
            )
    if len(values) > 1 or (left and not values):
        raise DataError(f"a part of type {kind} must have one path, but is {show(part, 80)}")
    if not values:
        return None
    inside = as_object(values[0]) or {}
    path = inside["url"] if set(inside) == {"url"} else values[0]
    return {"path": path} | {_BESIDE[k]: v for k, v in left.items()} if left else path
