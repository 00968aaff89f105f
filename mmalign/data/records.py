"""From the rows of a source to Examples, with every problem on the way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mmalign.data.convert import to_record
from mmalign.data.fields import Problem
from mmalign.data.files import read_rows
from mmalign.data.parse import read_record
from mmalign.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from mmalign.data.example import Example


@dataclass(frozen=True, slots=True)
class Record:
    """One row after parsing; `example` is None when there are problems."""

    place: str
    id: str
    split: str  # "" when the row names none
    example: Example | None
    problems: tuple[Problem, ...] = ()


def read_records(
    path: str | Path,
    *,
    name: str | None = None,
    split: str | None = None,
    layout: str | None = None,
) -> Iterator[Record]:
    """Every row of a source; `split` names a hub split, or a value of the `split` column."""
    first_use: dict[str, str] = {}
    for row in read_rows(path, name=name, split=split):
        part = str((row.value or {}).get("split") or "")
        if split is not None and part and part != split:
            continue
        record, problems = {}, [Problem(row.problem)]
        if row.value is not None:
            try:
                record = to_record(row.value, layout)
            except DataError as error:
                problems = [Problem(str(error))]
        example = None
        if record:
            example, problems = read_record(record, where=row.place)
        identity = str(record.get("id") or row.place)
        if identity in first_use:
            problems.append(Problem("the id is not unique", f"is also at {first_use[identity]}"))
        first_use.setdefault(identity, row.place)
        yield Record(row.place, identity, part, None if problems else example, tuple(problems))


@dataclass(slots=True)
class ProblemList:
    """Problems grouped by what is wrong, in the order they came up."""

    groups: dict[str, list[tuple[Record, Problem]]] = field(
        default_factory=dict[str, "list[tuple[Record, Problem]]"]
    )
    num_records: int = 0  # with at least one problem

    def add(self, record: Record) -> None:
        """Take in the problems of one record."""
        self.num_records += bool(record.problems)
        for problem in record.problems:
            self.groups.setdefault(problem.what, []).append((record, problem))

    def lines(self, show: int = 8) -> list[str]:
        """One sentence for each kind of problem: the first in full, the places of `show` more."""
        return [_sentence(group, show) for group in self.groups.values()]

    def error(self, source: str) -> DataError:
        """The first kinds of problem as an error."""
        lines = self.lines()
        more = f" {len(lines) - 3} other kinds of problem follow." if len(lines) > 3 else ""
        return DataError(
            f"{' '.join(lines[:3])}{more} {self.num_records} records of {source} cannot be used; "
            f"`mmalign data check {source}` lists them all, and data.bad_rows: drop leaves them out"
        )


def _sentence(group: list[tuple[Record, Problem]], show: int) -> str:
    record, problem = group[0]
    name = f" (id {record.id!r})" if record.id != record.place else ""
    text = f"{record.place}{name}: {problem}."
    if len(group) == 1:
        return text
    places = ", ".join(other.place.rpartition(":")[2] for other, _ in group[1 : show + 1])
    dots = ", ..." if len(group) > show + 1 else ""
    return f"{text} {len(group) - 1} more have the same problem: {places}{dots}."
