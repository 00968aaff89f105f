"""The records that pairs are made from: a clip, a question and the answer, where there is one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmalign.data.example import (
    Asked,
    Candidate,
    Clip,
    Example,
    Media,
    Picture,
    Prompt,
    Sound,
    as_text,
)
from mmalign.data.records import ProblemList, Record, read_records
from mmalign.errors import DataError


@dataclass(frozen=True, slots=True)
class Row:
    """One record to make pairs from.

    Attributes:
        id: Its own, or its file's name and line.
        prompt: Of its best answer.
        media: What that prompt shows.
        question: What is asked last.
        truth: The true answer; "" where the record has none.
        columns: What a pair takes over from the record; paths start from the new file's folder.
        clues: What a record says is seen and heard, by kind.
    """

    id: str
    prompt: Prompt | Asked
    media: Media
    question: str
    truth: str
    columns: Mapping[str, Any]
    clues: Mapping[str, str] | None = None


@dataclass(slots=True)
class Source:
    """Where records come from.

    Attributes:
        path: File, saved dataset or hub name.
        layout: Of its records; None to recognise it.
        drop_bad: Leave out records with problems instead of stopping.
        left_out: How many were.
    """

    path: str
    layout: str | None = None
    drop_bad: bool = False
    left_out: int = field(default=0, init=False)

    def rows(self, out: Path) -> list[Row]:
        """All rows that can be used.

        Args:
            out: The file that pairs go to.

        Raises:
            DataError: Records have problems, or media do not lie below the folder of `out`.
        """
        problems = ProblemList()
        rows: list[Row] = []
        for record in read_records(self.path, layout=self.layout):
            problems.add(record, *record.problems)
            if record.example is not None:
                rows.append(_row(record, record.example, out))
        self.left_out = problems.num_records
        if problems.groups and not self.drop_bad:
            raise problems.error(self.path)
        if not rows:
            raise DataError(f"{self.path}: holds no records that can be used")
        return rows

    def facts(self) -> dict[str, Any]:
        """What tells it from another, and from itself before a change."""
        file = Path(self.path)
        state = file.stat() if file.is_file() else None
        return {
            "source": self.path,
            "source_size": state and state.st_size,
            "source_time": state and state.st_mtime_ns,
            "layout": self.layout,
            "drop_bad": self.drop_bad,
        }


def _row(record: Record, example: Example, out: Path) -> Row:
    best = _best(example)
    media = best.media or example.media
    prompt = example.prompt if best.prompt is None else best.prompt
    asked = prompt if isinstance(prompt, str) else prompt[-1].content if prompt else ""
    given = prompt if isinstance(prompt, str) else [turn.as_dict() for turn in prompt]
    beside = {"tools": example.template.tools, "chat_template_kwargs": example.template.options}
    given = {"prompt": given} | {key: json.loads(text) for key, text in beside.items() if text}
    split = {"split": record.split} if record.split else {}
    return Row(
        id=Path(record.id).name if record.id == record.place else record.id,
        prompt=Asked(prompt, example.template) if example.template else prompt,
        media=media,
        question=asked,
        truth=_truth(record, example, best),
        columns={**_columns(media, record.place, out), **given, **split},
        clues=_clues(record, example),
    )


def _best(example: Example) -> Candidate:
    return example.candidates[max(range(example.num_rated), key=lambda k: example.labels[k])]


def _truth(record: Record, example: Example, best: Candidate) -> str:
    """The best answer of a record; "" where it is not a good one."""
    if example.kind == "unpaired" and not any(example.labels):
        return ""
    answer = best.response
    if isinstance(answer, tuple) and len(answer) == 1:
        return answer[0].content.strip()
    if not isinstance(answer, str):
        raise DataError(
            f"{record.place}: the answer must be one text; pairs are made of what is said about a "
            "clip in one turn"
        )
    return answer.strip()


def _clues(record: Record, example: Example) -> dict[str, str] | None:
    given = example.meta.get("clues")
    if given is None:
        return None
    named = {"": given} if isinstance(given, str) else given
    if not isinstance(named, Mapping) or not all(isinstance(v, str) for v in named.values()):
        raise DataError(
            f"{record.place}: `clues` must be a text, or texts by kind such as "
            '{"video": ..., "audio": ...}'
        )
    return {f"{kind} clue".strip(): text for kind, text in named.items()}


def _columns(media: Media, place: str, out: Path) -> dict[str, Any]:
    """What a prompt shows, as a record in the folder of `out` names it.

    Raises:
        DataError: A file does not lie below that folder.
    """
    folder = Path(os.path.realpath(out.parent))

    def named(medium: Clip | Picture | Sound) -> Any:
        file = Path(os.path.realpath(medium.path))
        if isinstance(medium, Picture) and medium.row >= 0:
            raise DataError(f"{place}: {medium} is a cell of a table; give the picture as a file")
        if not file.is_relative_to(folder):
            raise DataError(
                f"{place}: {file} does not lie below {folder}, and the paths of a data file start "
                "from its folder; choose an --out in or above the folder of the media"
            )
        path = file.relative_to(folder).as_posix()
        if isinstance(medium, Picture):
            return path
        frames = list(medium.frames) if isinstance(medium, Clip) else []
        part = {"start": medium.start or None, "end": medium.end, "frames": frames or None}
        part = {key: value for key, value in part.items() if value is not None}
        return {"path": path, **part} if part else path

    kinds = {"video": media.videos, "image": media.images, "audio": media.sounds}
    columns: dict[str, Any] = {}
    for kind, items in kinds.items():
        if len(items) == 1:
            columns[kind] = named(items[0])
        elif items:
            columns[f"{kind}s"] = [named(medium) for medium in items]
    return columns


def text_of(row: Row) -> str:
    """The whole prompt as one text, for messages and files of answers."""
    return as_text(row.prompt)
