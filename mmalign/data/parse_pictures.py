"""The pictures of a canonical record: image_chosen and image_rejected, images, or image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmalign.data.example import Candidate, ExampleKind, Picture
from mmalign.data.fields import Fields, as_list, as_object, show

if TYPE_CHECKING:
    from mmalign.data.pictures import PictureRoot

PICTURE_KEYS = ("image_chosen", "image_rejected", "images", "image")


def read_pictures(
    fields: Fields, kind: ExampleKind, root: PictureRoot | None
) -> list[Candidate | None]:
    """The rated candidates; None in the place of each that is wrong.

    Args:
        fields: The record. A picture is a path, a {path} object, or a Picture already.
        kind: What the record is.
        root: Where paths start and what they may not leave.
    """
    if not isinstance(fields.get("prompt") or "", str):
        fields.fail("the prompt of a picture must be text, not messages")
    if kind == "pair":
        return _pair(fields, root)
    if kind != "list":
        return [_candidate(fields, "image", fields.get("image"), root)]
    items = as_list(fields.get("images"))
    if not items or len(items) == 1:
        found = f"is {show(fields.get('images'))}"
        fields.fail("images must be a list of at least two pictures", found)
    return [_candidate(fields, "a picture of images", item, root) for item in items or ()]


def _pair(fields: Fields, root: PictureRoot | None) -> list[Candidate | None]:
    sides: list[Candidate | None] = []
    for side in ("chosen", "rejected"):
        caption = None
        if f"prompt_{side}" in fields:
            caption = fields.text(f"prompt_{side}")
            if isinstance(caption, tuple):
                fields.fail("the prompt of a picture must be text, not messages")
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
        if root is None:
            fields.fail(f"{name} is a path, and no folder is known that it starts from")
            return None
        found = root.find(path)
        if not isinstance(found, Picture):
            fields.fail(f"{name} {found.what}", found.found)
            return None
        value = found
    if not isinstance(value, Picture):
        fields.fail(f"{name} must be the path of a picture file", f"is {show(value)}")
        return None
    return Candidate(value, prompt=caption)
