"""From the rows of a source to Examples, with every problem on the way."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.data.convert import to_record
from mmalign.data.fields import Problem
from mmalign.data.files import read_rows
from mmalign.data.labels import in_order, prefers_rejected
from mmalign.data.parse import read_record
from mmalign.data.picture_copies import PictureCopies
from mmalign.data.picture_layouts import ALONE
from mmalign.data.pictures import PictureRoot
from mmalign.data.unread import unread_of
from mmalign.errors import DataError
from mmalign.safe import message, printable

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

    from mmalign.data.example import Example
    from mmalign.data.row import Wanted


@dataclass(frozen=True, slots=True)
class Record:
    """One row after parsing; `example` is None when there are problems."""

    place: str
    id: str
    split: str  # "" when the row names none
    example: Example | None
    problems: tuple[Problem, ...] = ()
    value: Mapping[str, Any] = field(default_factory=dict[str, Any])  # the canonical record
    raw: Mapping[str, Any] = field(default_factory=dict[str, Any])  # the row as the file has it
    turned: str = ""  # what preferred `rejected`, so that `value` is turned round; "": nothing
    unread: tuple[str, ...] = ()  # what of the row nothing reads


def read_records(
    path: str | Path,
    *,
    name: str | None = None,
    split: str | None = None,
    layout: str | None = None,
    pictures: Path | None = None,
    wanted: Wanted | None = None,
) -> Generator[Record]:
    """Every row of a source; `split` names a hub split, or a value of the `split` column.

    Paths of pictures start from the folder `pictures`, or that of the source, and stay inside it.
    Rows whose split is not `wanted`, asked row by row, are passed over unread.
    """
    root = _root(Path(path), pictures)
    first_use: dict[str, str] = {}
    other_splits: set[str] = set()
    for row in read_rows(path, name=name, split=split, wanted=wanted):
        part = str((row.value or {}).get("split") or "")
        if split is not None and row.value is not None and part != split:
            other_splits.add(part)
            continue
        if wanted is not None and not wanted(part):
            continue
        record, problems = {}, [Problem(row.problem)]
        if row.value is not None:
            try:
                record = to_record(row.value, layout)
            except DataError as error:
                problems = [Problem(str(error))]
        example = None
        if record:
            example, problems = read_record(
                record, where=row.place, root=root, alone=layout == ALONE
            )
        identity = str(record.get("id", row.place))
        if identity in first_use:
            problems.append(Problem("the id is not unique", f"is also at {first_use[identity]}"))
        first_use.setdefault(identity, row.place)
        example = None if problems else example
        turned = prefers_rejected(record) if example else ""
        value = in_order(record) if turned else record
        raw = row.value or {}
        unread = unread_of(raw, record, example) if example else ()
        yield Record(
            row.place, identity, part, example, tuple(problems), value, raw, turned, unread
        )
    if other_splits and not first_use:
        named = printable(", ".join(sorted(other_splits - {""}))) or "it has no `split` column"
        raise DataError(f"{path}: no row has the split {split!r}; found: {named}")


def _root(source: Path, pictures: Path | None) -> PictureRoot:
    if pictures is not None and not pictures.is_dir():
        raise DataError(f"pictures: there is no folder {pictures}")
    if pictures is None and source.exists():
        pictures = source if source.is_dir() else source.parent
    return PictureRoot(pictures)


@dataclass(slots=True)
class ProblemList:
    """Problems grouped by what is wrong, in the order they came up."""

    groups: dict[str, list[tuple[Record, Problem]]] = field(
        default_factory=dict[str, "list[tuple[Record, Problem]]"]
    )

    def add(self, record: Record, *problems: Problem) -> None:
        """Take in problems of one record."""
        for problem in problems:
            self.groups.setdefault(problem.what, []).append((record, problem))

    @property
    def num_records(self) -> int:
        """Records with at least one problem."""
        return len({record.place for group in self.groups.values() for record, _ in group})

    def lines(self, show: int = 8) -> list[str]:
        """One sentence for each kind of problem: the first in full, the places of `show` more."""
        return [_sentence(group, show) for group in self.groups.values()]

    def summary(self, kinds: int = 3) -> str:
        """The first kinds of problem, and how many more there are."""
        lines = self.lines()
        more = len(lines) - kinds
        rest = [f"{more} other kinds of problem follow."] if more > 0 else []
        return " ".join([*lines[:kinds], *rest])

    def error(self, source: str) -> DataError:
        """The first kinds of problem as an error."""
        return DataError(
            f"{self.summary()} {self.num_records} records of {source} cannot be used; "
            f"`mmalign data check {source}` lists them all, and data.bad_rows: drop leaves them out"
        )


def _sentence(group: list[tuple[Record, Problem]], show: int) -> str:
    record, problem = group[0]
    name = f" (id {record.id!r})" if record.id != record.place else ""
    told = str(problem).removeprefix(f"{record.place}: ").removesuffix(".")  # of a whole file
    text = message(printable(f"{record.place}{name}: {told}."))
    if len(group) == 1:
        return text
    text += f" {len(group) - 1} more {'has' if len(group) == 2 else 'have'} the same problem"
    if not show:
        return text + "."
    places = ", ".join(other.place.rpartition(":")[2] for other, _ in group[1 : show + 1])
    return f"{text}: {places}{', ...' if len(group) > show + 1 else '.'}"


def json_line(value: Mapping[str, Any]) -> str:
    """A record as a line of JSONL; dates and such, which only tables hold, are written as text."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:  # half of a surrogate pair can only be written escaped
            text = json.dumps(value, default=str)
    return text + "\n"


def convert_file(
    source: str | Path,
    out: str | Path,
    *,
    layout: str | None = None,
    split: str | None = None,
    drop_bad: bool = False,
    pictures: Path | None = None,
) -> tuple[int, int]:
    """Write the records of a file or dataset in mmalign's own layout, as JSONL.

    Pictures that are not below the folder of `out`, or that are cells of a table, are copied as
    they are, byte for byte, to a folder beside it: paths in a data file start from its folder.

    Args:
        source: File, folder, saved dataset or hub name.
        out: The JSONL file to write; it appears whole or not at all.
        layout: A name of `LAYOUTS`; None to recognise it.
        split: Only these rows.
        drop_bad: Leave out records with problems instead of stopping.
        pictures: The folder that picture paths of the source start from; None: the source's own.

    Returns:
        How many records were written and how many left out.

    Raises:
        DataError: naming the problems, unless they are left out.
    """
    target = Path(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    problems = ProblemList()
    written = 0
    partial = target.with_name(target.name + ".partial")
    copies = PictureCopies(target, _root(Path(source), pictures))
    try:
        with partial.open("w", encoding="utf-8") as handle:
            for record in read_records(source, split=split, layout=layout, pictures=pictures):
                problems.add(record, *record.problems)
                if record.example is None:
                    continue
                try:
                    named = copies.columns(record.example)
                    named |= copies.media(record.value, record.example)
                    value = {**record.value, **named}
                except DataError as error:
                    problems.add(record, Problem(str(error)))
                    continue
                handle.write(json_line(value))
                written += 1
        if problems.groups and not drop_bad:
            raise problems.error(str(source))
        if not written:
            raise DataError(f"{source}: holds no records that can be used")
        os.replace(partial, target)
    except BaseException:
        copies.remove()
        raise
    finally:
        partial.unlink(missing_ok=True)
    return written, problems.num_records
