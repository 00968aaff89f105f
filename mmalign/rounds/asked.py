"""The prompts of files: what is asked, and what judges may read beside it."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmalign.config import DataSource
from mmalign.data.example import PREFERENCE, Example
from mmalign.data.files import read_rows
from mmalign.data.layouts import ASKING, SYSTEM
from mmalign.data.parse import KIND_KEYS, OPTIONAL
from mmalign.data.pictures import PictureRoot
from mmalign.data.records import PictureCopies, picture_root, read_asked
from mmalign.errors import ConfigError, DataError

log = logging.getLogger("mmalign.data")

_NO_COLUMNS = {*KIND_KEYS, *OPTIONAL, *PREFERENCE, *ASKING, *SYSTEM, "instruction"}
_OF_A_RESPONSE = re.compile(r"(?:.+[_-])?(?:chosen|rejected)(?:[_-].+)?|completions?|rewards")


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, and all that judges may read beside it.

    Attributes:
        id: The row's own, or made of what it asks.
        record: Prompt, media, tools: what a model is asked.
        beside: The row's other columns; what it says of responses is left out.
        example: The same for the loaders.
        root: Where paths of its media start.
        source: Number of the source that it comes from.
    """

    id: str
    record: Mapping[str, Any]
    beside: Mapping[str, Any]
    example: Example
    root: PictureRoot
    source: int = 0


def questions(source: DataSource, number: int, bad_rows: str) -> Iterator[tuple[str, Question]]:
    """The split and the prompt of each row of a source.

    Args:
        source: The file; rows with responses are read for their prompts alone.
        number: Of the source among several.
        bad_rows: "stop" at a row without a usable prompt, or "drop" it.

    Raises:
        ConfigError: A setting of the source that prompts do not have.
        DataError: A row has no usable prompt.
    """
    for key in ("weight", "layout"):
        if getattr(source, key) != DataSource.model_fields[key].default:
            raise ConfigError(f"data: {source.path} has `{key}`, which prompts do not read")
    root = picture_root(Path(source.path), source.pictures)
    bad = 0
    for row in read_rows(source.path, name=source.name, split=source.split):
        value = row.value or {}
        split = str(value.get("split") or "")
        if source.split is not None and split and split != source.split:
            continue
        try:
            record, example = read_asked(row, root)
        except DataError:
            if bad_rows == "stop":
                raise
            bad += 1
            continue
        beside = {
            key: item
            for key, item in value.items()
            if key not in _NO_COLUMNS and key not in record and not _OF_A_RESPONSE.fullmatch(key)
        }
        name = value.get("id")
        given = isinstance(name, str | int) and not isinstance(name, bool)
        key = str(name) if given else _name(record)
        yield split, Question(key, record, beside, example, root, number)
    if bad:
        log.warning("%s: %d rows have no usable prompt and are left out", source.path, bad)


def _name(record: Mapping[str, Any]) -> str:
    text = json.dumps(record, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def different(asked: Sequence[Question]) -> list[Question]:
    """Each once.

    Raises:
        DataError: Two that ask different things have one id.
    """
    found: dict[str, Question] = {}
    for question in asked:
        first = found.setdefault(question.id, question)
        if first.record != question.record:
            raise DataError(f"{question.example.place}: the id {question.id!r} is not unique")
    return list(found.values())


def prompt_rows(asked: Sequence[Question], path: Path) -> list[dict[str, Any]]:
    """Prompts as lines of a file; clips and images that they show get a second name beside it."""
    copies: dict[int, PictureCopies] = {}
    rows: list[dict[str, Any]] = []
    for question in asked:
        number = question.source
        if number not in copies:
            name = path.with_stem(f"{path.stem}-{number}") if number else path
            copies[number] = PictureCopies(name, question.root)
        media = copies[number].media(question.record, question.example)
        rows.append({"id": question.id, **question.record, **media, **question.beside})
    return rows
