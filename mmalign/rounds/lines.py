"""The files of a round: a JSON object a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmalign.data.fields import as_object
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


def kind_of(line: Line) -> str:
    """Where a candidate line has its responses: `responses`, or `images`."""
    return "responses" if "responses" in line else "images"
