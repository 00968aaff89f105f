"""The files of a round: a JSON object a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmalign.data.fields import as_list, as_object
from mmalign.errors import DataError

Line = dict[str, Any]


def read(path: Path) -> list[Line]:
    """The objects of a file, in order.

    Raises:
        DataError: It is missing, or a line is no object; the place is named.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    lines: list[Line] = []
    for number, text in enumerate(data.split(b"\n"), start=1):
        if not text.strip():
            continue
        try:
            line = as_object(json.loads(text))
        except ValueError:
            line = None
        if line is None:
            raise DataError(f"{path}:{number}: is no JSON object; make the file again")
        lines.append(line)
    return lines


def named(path: Path) -> dict[str, Line]:
    """The objects of a file by their `id`, in order.

    Raises:
        DataError: As `read`, or one has no id, or that of another.
    """
    found: dict[str, Line] = {}
    for number, line in enumerate(read(path), start=1):
        key = str(line.get("id"))
        if line.get("id") is None or key in found:
            what = "has no `id`" if line.get("id") is None else f"the id {key!r} comes twice"
            raise DataError(f"{path}: line {number}: {what}, and lines go together by their ids")
        found[key] = line
    return found


def about_of(line: Line) -> list[Line]:
    """What is known of each response of a candidate line; a line made elsewhere may not say."""
    told = [as_object(one) or {} for one in as_list(line.get("about")) or ()]
    count = len(line[kind_of(line)])
    return told if len(told) == count else [{} for _ in range(count)]


def kind_of(line: Line) -> str:
    """Where a candidate line has its responses: `responses`, or `images`."""
    return "responses" if "responses" in line else "images"
