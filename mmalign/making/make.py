"""A file of records to a file of pairs; `mmalign data make`."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmalign.data.jobs import Journal
from mmalign.errors import DataError
from mmalign.making.answers import Answer, Answers, Sampled, answers_record
from mmalign.making.recipes import Recipe
from mmalign.making.rows import Row, Source

NAMED = 8
"""How many unusable files a message names."""


@dataclass(slots=True)
class Made:
    """What `make` did.

    Attributes:
        out: The file of pairs.
        num_rows: Records that were asked about.
        num_pairs: Pairs written.
        counts: What became of the answers.
        broken: What is wrong with media that cannot be used, each once, and how many records that
            costs.
        left_out: Records with problems.
        answers: The file of all sampled answers; None where they came from a file.
    """

    out: Path
    num_rows: int = 0
    num_pairs: int = 0
    counts: Counter[str] = field(default_factory=Counter[str])
    broken: Counter[str] = field(default_factory=Counter[str])
    left_out: int = 0
    answers: Path | None = None

    def text(self) -> str:
        """For a terminal."""
        lines = [f"{self.out}: {self.num_pairs} pairs of {self.num_rows} records"]
        told = [f"{number} {what}" for what, number in self.counts.items() if number]
        lines += [f"answers: {', '.join(told)}"] if told else []
        if self.left_out:
            lines.append(f"{self.left_out} records with problems left out")
        if self.broken:
            lines.append(f"{self.broken.total()} records left out, which cannot be asked:")
            lines += [f"  {text}" for text in list(self.broken)[:NAMED]]
            more = len(self.broken) - NAMED
            lines += [f"  and {more} more"] if more > 0 else []
        if self.answers is not None:
            lines.append(f"all answers: {self.answers}")
        return "\n".join(lines)


def make(
    source: Source,
    out: Path,
    answers: Answers,
    recipe: Recipe,
    *,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> Made:
    """Write pairs of records and a model's answers to them, in mmalign's own layout.

    Sampled answers go to OUT.partial as they come, so that the same call after an interruption
    goes on; pairs are made from all of them at the end. They stay in NAME.answers.jsonl, for a
    judge or for other rules.

    Args:
        source: The records.
        out: The JSONL file to write; it appears whole or not at all.
        answers: Sampled, or of a file.
        recipe: What pairs are made of them.
        progress: Told after every record that one more is done, and how many there are in all.

    Raises:
        DataError: The file is there, records have problems, or none can be asked about.
    """
    if out.suffix != ".jsonl":
        raise DataError(f"--out {out}: must end in .jsonl")
    kept = out.with_name(f"{out.stem}.answers.jsonl") if isinstance(answers, Sampled) else None
    partial = out.with_name(out.name + ".partial")
    for file in (out, kept):
        if file is not None and file.exists() and not partial.exists():
            raise DataError(f"{file}: is there already; delete it, or give another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = source.rows(out)
    recipe.check(rows)
    result = Made(out, len(rows), left_out=source.left_out, answers=kept)
    if not isinstance(answers, Sampled):
        _write(rows, [answers(row) for row in rows], recipe, result)
        return result
    journal = Journal(partial, {**source.facts(), **answers.facts()})
    try:
        # A clip that was broken may have been repaired.
        done = {key for key, line in journal.done.items() if "broken" not in line}
        progress(len(done), len(rows))
        for row in rows:
            if row.id not in done:
                journal.add({row.id: _line(answers(row))})
                progress(1, len(rows))
        _write(rows, [_read(journal.done[row.id]) for row in rows], recipe, result)
    finally:
        journal.close()
    journal.remove()
    return result


def _line(said: list[Answer] | DataError) -> dict[str, Any]:
    if isinstance(said, DataError):
        return {"broken": str(said)}
    return {"answers": [answer.record() for answer in said]}


def _read(line: Mapping[str, Any]) -> list[Answer] | DataError:
    if "broken" in line:
        return DataError(line["broken"])
    return [Answer(**answer) for answer in line["answers"]]


def _write(
    rows: Sequence[Row], said: Sequence[list[Answer] | DataError], recipe: Recipe, result: Made
) -> None:
    """Pairs, and the answers they were made of; neither file is there before it is whole."""
    told = list(zip(rows, said, strict=True))
    result.broken = Counter(str(answers) for _, answers in told if isinstance(answers, DataError))
    asked = [(row, answers) for row, answers in told if not isinstance(answers, DataError)]
    if not asked:
        first = next(iter(result.broken))
        raise DataError(f"none of {len(rows)} records can be asked about; the first: {first}")
    pairs: list[dict[str, Any]] = []
    for row, answers in asked:
        pairs += recipe(row, answers, result.counts)
    result.num_pairs = len(pairs)
    _write_lines(result.out, pairs)
    if result.answers is not None:
        _write_lines(result.answers, (answers_record(row, answers) for row, answers in asked))


def _write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as handle:
        # Dates and such, which only tables hold, are written as text.
        handle.writelines(json.dumps(r, ensure_ascii=False, default=str) + "\n" for r in records)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)
