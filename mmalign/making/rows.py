"""The records that pairs are made from: a clip, a question and the answer, where there is one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmalign.data.example import Clip, Example, Picture, Sound, as_text
from mmalign.data.records import ProblemList, Record, read_records
from mmalign.errors import DataError

_COPIED = ("prompt", "split")
_MEDIA = ("video", "videos", "image", "images", "audio", "audios", "start", "end", "frames")


@dataclass(frozen=True, slots=True)
class Row:
    """One record to make pairs from.

    Attributes:
        id: Its own, or its file's name and line.
        example: As it was read, with its media.
        question: What is asked last.
        truth: The true answer; "" where the record has none.
        columns: What a pair takes over from the record; paths start from the new file's folder.
        clues: What a record says is seen and heard, by kind.
    """

    id: str
    example: Example
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
    turns = example.prompt
    asked = turns if isinstance(turns, str) else turns[-1].content if turns else ""
    media = {k: v for k, v in record.value.items() if k in _MEDIA and k not in example.meta}
    copied = {k: record.value[k] for k in _COPIED if k in record.value}
    return Row(
        id=Path(record.id).name if record.id == record.place else record.id,
        example=example,
        question=asked,
        truth=_truth(record, example),
        columns={**_moved(media, _Places(example, record.place, out)), **copied},
        clues=_clues(record, example),
    )


def _truth(record: Record, example: Example) -> str:
    """The best answer of a record; its text where it is one message."""
    if not any(example.labels) and example.kind == "unpaired":
        return ""
    rated = range(example.num_rated)
    best = example.candidates[max(rated, key=lambda k: example.labels[k])].response
    if isinstance(best, tuple) and len(best) == 1:
        return best[0].content.strip()
    if not isinstance(best, str):
        raise DataError(
            f"{record.place}: the answer must be one text; pairs are made of what is said about a "
            "clip in one turn"
        )
    return best.strip()


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


class _Places:
    """Where the media of a record lie, seen from another folder."""

    def __init__(self, example: Example, place: str, out: Path) -> None:
        self.place, self.folder = place, Path(os.path.realpath(out.parent))
        shown = [example.media, *(c.media for c in example.candidates if c.media is not None)]
        references: list[Clip | Picture | Sound] = []
        for media in shown:
            references += [*media.videos, *media.images, *media.sounds]
        self.files = {Path(os.path.realpath(reference.path)) for reference in references}

    def find(self, text: str) -> str | None:
        """The file that a text of the record names, from the new folder; None: it names none."""
        ending = Path(text).parts
        for file in self.files:
            if ending and file.parts[-len(ending) :] == ending:
                if not file.is_relative_to(self.folder):
                    raise DataError(
                        f"{self.place}: {file} does not lie below {self.folder}, and paths of a "
                        "data file start from its folder; choose an --out in or above the folder "
                        "of the media"
                    )
                return file.relative_to(self.folder).as_posix()
        return None


def _moved(value: Any, places: _Places) -> Any:
    """A value of a record with the paths of its media as the new file names them."""
    if isinstance(value, str):
        return places.find(value) or value
    if isinstance(value, Mapping):
        return {key: _moved(inner, places) for key, inner in value.items()}
    return [_moved(inner, places) for inner in value] if isinstance(value, list) else value


def text_of(row: Row) -> str:
    """The whole prompt as one text, for messages and files of answers."""
    return as_text(row.example.prompt)
