"""`mmalign data check`: all problems of the files in one pass, and what is in them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmalign.data.doubts import Doubts
from mmalign.data.example import Example, Picture, as_text
from mmalign.data.fields import Problem
from mmalign.data.progress import track
from mmalign.data.records import ProblemList, Record, read_records
from mmalign.data.row import HELD_OUT
from mmalign.data.validate_media import MediaBook
from mmalign.data.validate_pictures import PictureBook
from mmalign.errors import DataError
from mmalign.safe import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from mmalign.config import DataSource
    from mmalign.data.validate_media import Decode

EVAL = "eval"
QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)


@dataclass(slots=True)
class Report:
    """What `check_files` found. Problems stop a run; warnings do not."""

    names: str
    problems: ProblemList = field(default_factory=ProblemList)
    warnings: Doubts = field(default_factory=Doubts)
    """What training on the files would warn of in the same words."""
    num_records: int = 0
    kinds: Counter[str] = field(default_factory=Counter[str])
    splits: Counter[str] = field(default_factory=Counter[str])
    labels: Counter[str] = field(default_factory=Counter[str])
    lengths: dict[str, list[tuple[int, int]]] = field(
        default_factory=dict[str, "list[tuple[int, int]]"]
    )
    """For each part of a row: (characters, words) of every one."""
    pictures: PictureBook = field(default_factory=PictureBook)
    media: MediaBook = field(default_factory=MediaBook)

    @property
    def exit_code(self) -> int:
        """1 when there are problems."""
        return int(bool(self.problems.groups))

    def text(self, show: int = 20) -> str:
        """The report for a terminal; `show` places for each kind of problem."""
        lines = [f"{self.names}: {self.num_records} records"]
        for title, counts in (
            ("kinds", self.kinds),
            ("splits", self.splits),
            ("labels", self.labels),
        ):
            if counts:
                told = ", ".join(f"{n} {printable(key)}" for key, n in counts.items())
                lines.append(f"  {title:8} {told}")
        lines += _length_table(self.lengths) + self.pictures.lines() + self.media.lines()
        lines += [f"  {line}" for line in self.warnings.unread.notes()]
        found = self.problems
        where = f" in {found.num_records} of {self.num_records} records" if self.num_records else ""
        for title, told, of in (
            ("problems", found.lines(show), where),
            ("warnings", self.warnings.lines(show), ""),
        ):
            lines.append(f"{title}{of}:" if told else f"no {title}")
            lines += [f"  {line}" for line in told]
        return "\n".join(lines)


def check_files(
    paths: Sequence[str | Path | DataSource],
    *,
    eval_paths: Sequence[str | Path | DataSource] = (),
    layout: str | None = None,
    pictures: Path | None = None,
    decode: Decode | None = None,
    sizes: bool = True,
) -> Report:
    """Read every record of the files and report every problem with its line.

    Args:
        paths: Files, saved datasets or hub names, or sources of a config, which have a layout and
            pictures of their own. Rows whose `split` column says eval, test or validation count
            as evaluation rows, unless a source asks for that split.
        eval_paths: More of them, all of evaluation rows.
        layout: The layout of all of them; None to recognise it.
        pictures: The folder that picture paths start from; None: that of each file.
        decode: What is wrong with the media of rows; None: they are only counted.
        sizes: Judge the sizes of pictures; false where a config does, which knows what they become.
    """
    given = (*paths, *eval_paths)
    names = [str(item if isinstance(item, str | Path) else item.path) for item in given]
    report = Report(", ".join(names))
    book = _Book(report)
    for number, (item, name) in enumerate(zip(given, names, strict=True)):
        split = None if isinstance(item, str | Path) else item.split
        before = report.num_records
        try:
            for record in track(_records(item, layout, pictures), f"reading {name}"):
                by_split = split is None and record.split.lower() in HELD_OUT
                held_out = number >= len(paths) or by_split
                book.add(record, EVAL if held_out else record.split or "train", name)
            if report.num_records == before:
                raise DataError(f"{name}: holds no records")
        except DataError as error:
            report.problems.add(Record(name, name, "", None), Problem(str(error)))
    book.close(decode, sizes=sizes)
    return report


def _records(
    item: str | Path | DataSource, layout: str | None, pictures: Path | None
) -> Iterator[Record]:
    if isinstance(item, str | Path):
        return read_records(item, layout=layout, pictures=pictures)
    return read_records(
        item.path, name=item.name, split=item.split, layout=item.layout, pictures=item.pictures
    )


class _Book:
    """Fills a report; keeps what must be compared between records."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.lists: list[tuple[Record, int]] = []

    def add(self, record: Record, split: str, source: str) -> None:
        """Take in one record of the split and file."""
        self.report.num_records += 1
        self.report.problems.add(record, *record.problems)
        row = record.example
        if row is None:
            return
        self.report.kinds[row.kind] += 1
        self.report.splits[split] += 1
        self.report.labels[_label(row)] += 1
        for part, text in _parts(row):
            self.report.lengths.setdefault(part, []).append((len(text), len(text.split())))
        self.report.pictures.add(record, row)
        self.report.media.add(record, row)
        self.report.warnings.add(record, source, held_out=split == EVAL)
        self.report.warnings.leakage.add(row, held_out=split == EVAL)
        if row.kind == "list":
            self.lists.append((record, row.num_rated))

    def close(self, decode: Decode | None, *, sizes: bool) -> None:
        """Compare what needed all records, and look into pictures and media."""
        found = self.report
        found.pictures.close(found.problems, found.warnings, alone=sizes)
        self.report.media.close(self.report.problems, decode)
        if self.report.warnings.all_weights_are_zero:
            nowhere = Record(self.report.names, self.report.names, "", None)
            self.report.problems.add(nowhere, Problem("the weight of all rows is 0"))
        usual = Counter(k for _, k in self.lists).most_common(1)
        for record, k in self.lists:
            if k != usual[0][0]:
                what = f"all lists must have the same length, which is mostly {usual[0][0]} here"
                self.report.problems.add(record, Problem(what, f"this one has {k} responses"))


def _label(row: Example) -> str:
    if row.kind == "list":
        return f"lists of {row.num_rated}"
    if row.kind == "plain":
        return "unrated"
    if row.kind == "unpaired":
        return "desirable" if row.labels[0] else "undesirable"
    if row.is_tie:
        return "ties"
    return "hard" if row.labels[:2] == (1.0, 0.0) else "soft"


def _parts(row: Example) -> Iterable[tuple[str, str]]:
    if row.prompt:
        yield "prompt", as_text(row.prompt)
    rated = ("chosen", "rejected") if row.kind == "pair" else ("response",) * row.num_rated
    for i, candidate in enumerate(row.candidates):
        if candidate.prompt is not None:
            yield "own prompt", as_text(candidate.prompt)
        if candidate.response and not isinstance(candidate.response, Picture):
            yield candidate.role or rated[i], as_text(candidate.response)


def _length_table(lengths: dict[str, list[tuple[int, int]]]) -> list[str]:
    """Quantiles of characters and words, a line for each part of a row."""
    if not lengths:
        return []
    width = max(map(len, lengths)) + 2
    head = "".join(f"{name:>8}" for name in ("min", "5%", "median", "95%", "max"))
    lines = [
        f"  {'':{width}}{'characters':>40}      {'words':>40}",
        f"  {'':{width}}{head}      {head}",
    ]
    for part, values in lengths.items():
        table = np.quantile(np.array(values), QUANTILES, axis=0).round().astype(int)
        characters, words = ("".join(f"{n:8}" for n in table[:, i].tolist()) for i in (0, 1))
        lines.append(f"  {part:{width}}{characters}      {words}")
    if {"chosen", "rejected"} <= set(lengths):
        pairs = zip(lengths["chosen"], lengths["rejected"], strict=True)
        longer = sum(chosen > rejected for (chosen, _), (rejected, _) in pairs)
        share = longer / len(lengths["chosen"])
        lines.append(f"  chosen is the longer one in {share:.0%} of the pairs")
    return lines
