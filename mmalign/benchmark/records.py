"""Questions and answers of any benchmark, and the JSONL file that all of them share."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmalign.benchmark.sources import Source
from mmalign.errors import DataError


@dataclass(frozen=True, slots=True)
class Question:
    """One question as a model is asked it.

    Attributes:
        id: The same for a question wherever it is read from.
        task: The benchmark's own part: a task, a dimension, a category.
        prompt: The whole text, options and the benchmark's last sentence included.
        video: The clip's file as the benchmark names it, from the folder of its media.
        start: Seconds where the clip begins; None: the file's beginning.
        end: Seconds where it ends; None: the file's end.
        options: Their texts without letters; empty where the answer is free.
        answer: What is right: a letter where there are options.
        pair_id: Names what is only right together; empty where each question counts alone.
        meta: Whatever else the benchmark groups by; `video` is what was drawn as one piece.
    """

    id: str
    task: str
    prompt: str
    video: str
    answer: str
    start: float | None = None
    end: float | None = None
    options: tuple[str, ...] = ()
    pair_id: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)

    def answered(self, benchmark: str, prediction: str | None) -> Prediction:
        """The question with a model's answer; None: there is none."""
        meta = {"video": self.video, **self.meta}
        return Prediction(
            self.id, benchmark, self.task, prediction, self.answer, self.options, self.pair_id, meta
        )


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a model said to a question; `prediction` is None where it said nothing at all."""

    id: str
    benchmark: str
    task: str
    prediction: str | None
    answer: str
    options: tuple[str, ...] = ()
    pair_id: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """The line of the common file; what is empty is left out."""
        rest = {"options": list(self.options), "pair_id": self.pair_id, "meta": dict(self.meta)}
        return {
            "id": self.id,
            "benchmark": self.benchmark,
            "task": self.task,
            "prediction": self.prediction,
            "answer": self.answer,
            **{key: value for key, value in rest.items() if value},
        }


def is_common(source: Source) -> bool:
    """Whether a file is in the common format, not a benchmark's own."""
    first = source.value[0] if isinstance(source.value, list) and source.value else None
    return isinstance(first, dict) and {"id", "benchmark", "prediction", "answer"} <= set(first)


def common(source: Source, benchmark: str) -> list[Prediction]:
    """The lines of a common file.

    Raises:
        DataError: A line without a field, or of another benchmark.
    """
    found: list[Prediction] = []
    for entry in source.entries():
        named = entry.text("benchmark")
        if named != benchmark:
            raise DataError(
                f"{entry.where}: the benchmark is {named!r}, but --benchmark is {benchmark!r}"
            )
        meta = entry.value.get("meta") or {}
        if not isinstance(meta, dict):
            raise DataError(f"{entry.where}: `meta` must be an object")
        found.append(
            Prediction(
                entry.text("id"),
                named,
                entry.maybe("task") or "",
                entry.maybe("prediction"),
                entry.text("answer"),
                tuple(entry.texts("options")) if entry.value.get("options") else (),
                entry.maybe("pair_id") or "",
                meta,
            )
        )
    return found


def write_predictions(path: Path, rows: Iterable[Prediction]) -> None:
    """Write the common file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_lines(path, (row.record() for row in rows))


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSON object a line."""
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text("".join(lines), encoding="utf-8")


def distinct(rows: Sequence[Prediction], where: str) -> dict[str, Prediction]:
    """Rows by id.

    Raises:
        DataError: Two rows have one id.
    """
    found = {row.id: row for row in rows}
    if len(found) < len(rows):
        seen: set[str] = set()
        twice = next(row.id for row in rows if row.id in seen or seen.add(row.id))
        raise DataError(f"{where}: {len(rows) - len(found)} ids come twice, the first is {twice!r}")
    return found


def named(ids: Iterable[str], most: int = 3) -> str:
    """A few ids for a message."""
    ordered = sorted(ids)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(map(repr, ordered[:most])) + more
