"""What surveys found, kept in a folder by everything that decides it; a second start reads it."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from mmalign.text.survey import Found

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mmalign.data.example import Example
    from mmalign.text.encode import Encoder
    from mmalign.text.limits import Limits

VERSION = 2  # raise it when the same rows and settings give other findings


class SurveyCache:
    """A folder with one small file for each set of rows under each set of settings."""

    def __init__(self, folder: Path, encoder: Encoder, limits: Limits) -> None:
        """`folder` is made when it is first written to."""
        self.folder = folder
        masks = encoder.masks and encoder.masks.model_dump(mode="json")  # spans can be at fault too
        self._settings = [VERSION, encoder.fingerprint(), asdict(limits), masks]

    def file(self, rows: Sequence[Example]) -> Path:
        """Where what is found in these rows lies."""
        digest = hashlib.sha256(json.dumps(self._settings).encode())
        for row in rows:
            digest.update(repr(_content(row)).encode())
        return self.folder / f"{digest.hexdigest()[:40]}.json"

    @staticmethod
    def get(file: Path) -> Found | None:
        """What was found; None where nobody looked yet, or the file is damaged."""
        try:
            value: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            if value.keys() != {item.name for item in fields(Found)}:
                return None
            value["counts"] = Counter(value["counts"])
            value["problems"] = [
                (int(n), str(what), str(found)) for n, what, found in value["problems"]
            ]
            value["longest"] = tuple(value["longest"])
            return Found(**value)
        except (OSError, ValueError, TypeError, AttributeError):
            return None

    @staticmethod
    def put(file: Path, found: Found) -> None:
        """Keep it; where that cannot be written, the next start looks again."""
        partial = file.with_name(f".{file.name}.{os.getpid()}.part")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            value = {item.name: getattr(found, item.name) for item in fields(found)}
            partial.write_text(json.dumps(value), encoding="utf-8")
            partial.replace(file)
        except OSError:
            return


def _content(row: Example) -> tuple[Any, ...]:
    """All that decides the row's tokens."""
    answers = [(c.response, c.prompt, c.spans, c.steps, c.complete, c.role) for c in row.candidates]
    return row.prompt, row.template.tools, row.template.options, row.kind, answers
