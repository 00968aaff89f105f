"""`mmalign data check`: all problems of the files in one pass, and what is in them."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmalign.data.doubts import Doubts
from mmalign.data.example import HELD_OUT, Example, Picture, as_text
from mmalign.data.fields import Problem
from mmalign.data.jobs import track
from mmalign.data.pictures import LARGEST_CUT, LARGEST_FACTOR, decode_all, is_odd
from mmalign.data.records import ProblemList, Record, read_records
from mmalign.errors import DataError
from mmalign.safe import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from PIL.Image import Image

    from mmalign.config import DataSource

    Decode = Callable[[Sequence[Example]], Sequence[Sequence[str]]]
    """Rows to what is wrong with the media of each; callers bring it, for data decodes no clips."""


# What prompts of checked files show and play: how much there is, and images that are broken.
#
# That a clip or a sound is there was seen when its record was read. Whether it can be decoded is
# found out where that is asked for, and before a run's first step, with the run's limits.


class MediaBook:
    """Collects what the prompts of all records show, corrupted clips of their own included."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = dict.fromkeys(("clip", "image", "sound"), 0)
        self.files: dict[str, set[Path | Picture]] = {name: set() for name in self.counts}
        self.pictures: list[tuple[Record, Picture]] = []
        self.rows: list[tuple[Record, Example]] = []

    def add(self, record: Record, row: Example) -> None:
        """Take in the media of one row, and of its candidates."""
        if row.media or any(c.media for c in row.candidates):
            self.rows.append((record, row))
        for media in (row.media, *(c.media for c in row.candidates)):
            if media is None:
                continue
            self._count("clip", [clip.path for clip in media.videos])
            self._count("image", media.images)
            self._count("sound", [sound.path for sound in media.sounds])
            self.pictures += [(record, picture) for picture in media.images]

    def close(self, problems: ProblemList, decode: Decode | None = None) -> None:
        """Decode the images, in threads, and with `decode` all else, and add what is wrong."""
        if decode is not None:
            faults = decode([row for _, row in self.rows])
            for (record, _), texts in zip(self.rows, faults, strict=True):
                for text in texts:
                    problems.add(record, Problem("what is shown must be decodable", text))
            return
        self._add_absent(problems)
        found = decode_all((picture for _, picture in self.pictures), _seen)
        for record, picture in self.pictures:
            result = found[picture]
            if isinstance(result, DataError):
                problems.add(record, Problem("an image must be decodable", str(result)))

    def _add_absent(self, problems: ProblemList) -> None:
        """Clips and sounds that are not there; images are opened anyway."""
        files = self.files["clip"] | self.files["sound"]
        absent = {file for file in files if isinstance(file, Path) and not file.is_file()}
        for record, row in self.rows if absent else ():
            media = [row.media, *(c.media for c in row.candidates if c.media is not None)]
            for file in dict.fromkeys(file for item in media for file in item.files()):
                if file in absent:
                    what = "what is shown or played must be a media file that is there"
                    problems.add(record, Problem(what, f"there is no {file}"))

    def lines(self) -> list[str]:
        """How many media there are of each kind, and in how many files."""
        parts = [
            f"{_times(count, name)} ({_times(len(self.files[name]), 'file')})"
            for name, count in self.counts.items()
            if count
        ]
        return [f"  {'shown':8} " + ", ".join(parts)] if parts else []

    def _count(self, name: str, files: Sequence[Path | Picture]) -> None:
        self.counts[name] += len(files)
        self.files[name].update(files)


def _times(count: int, name: str) -> str:
    return f"{count} {name}{'s' * (count != 1)}"


def _seen(_: Image) -> None:
    """Nothing is kept of an image that can be decoded."""


# The images of checked files: which cannot be decoded, their sizes, and what is doubtful.

Size = tuple[int, int]  # width, height

USUAL = 512
"""Pixels a side that images are brought to where no config says another number."""

_STRIP = 2**20  # pixels


class PictureBook:
    """Collects the images of all records, and decodes each once at the end."""

    def __init__(self) -> None:
        self.rows: list[tuple[Record, list[tuple[str, Picture]]]] = []
        self.num_decoded = 0
        self.sizes: dict[str, list[Size]] = {}

    def add(self, record: Record, row: Example) -> None:
        """Take in the images of one row."""
        names = ("chosen", "rejected") if row.kind == "pair" else ("image",) * row.num_rated
        parts = [
            (name, candidate.response)
            for name, candidate in zip(names, row.candidates, strict=False)
            if isinstance(candidate.response, Picture)
        ]
        if parts:
            self.rows.append((record, parts))

    def close(self, problems: ProblemList, doubts: Doubts, *, alone: bool = True) -> None:
        """Decode all images, in threads, and add what is wrong with them.

        Args:
            problems: Images that cannot be decoded go there.
            doubts: Rows that teach nothing, or other than they seem to, go there.
            alone: Judge sizes as well: no config does, which knows how large images must be.
        """
        found = decode_all((picture for _, parts in self.rows for _, picture in parts), _look)
        self.num_decoded = sum(not isinstance(result, DataError) for result in found.values())
        whole: list[tuple[Record, list[Size]]] = []
        for record, parts in self.rows:
            sizes: list[Size] = []
            digests: list[bytes] = []
            for name, picture in parts:
                result = found[picture]
                if isinstance(result, DataError):
                    problems.add(record, Problem("an image must be decodable", str(result)))
                else:
                    sizes.append(result[0])
                    digests.append(result[1])
                    self.sizes.setdefault(name, []).append(result[0])
            if len(sizes) < len(parts):
                continue
            if is_odd(sizes):
                what = (
                    "rows whose images differ in aspect ratio by more than 2 to 1: not trained on"
                )
                doubts.note(record, what, " and ".join(map(_shown, sizes)))
            elif _has_one_caption(record) and len(set(digests)) < len(digests):
                doubts.note(record, "rows that show one image twice, pixel by pixel")
            whole.append((record, sizes))
        if alone:
            _judge_sizes(whole, doubts)

    def lines(self) -> list[str]:
        """How many images there are, and a table of their sizes."""
        if not self.rows:
            return []
        total = sum(len(parts) for _, parts in self.rows)
        width = max(map(len, self.sizes), default=0) + 2
        heads = ("width", "height", "width / height")
        quantiles = "".join(f"{name:>8}" for name in ("min", "median", "max"))
        lines = [
            f"  images   {total} in {len(self.rows)} records; {self.num_decoded} files decoded",
            f"  {'':{width}}" + "    ".join(f"{head:>24}" for head in heads),
            f"  {'':{width}}" + "    ".join(quantiles for _ in heads),
        ]
        for name, values in self.sizes.items():
            sides = np.array(values, dtype=np.float64)
            columns = (sides[:, 0], sides[:, 1], sides[:, 0] / sides[:, 1])
            cells = [
                "".join(f"{n:8.{2 * (i == 2)}f}" for n in np.quantile(column, (0, 0.5, 1)))
                for i, column in enumerate(columns)
            ]
            lines.append(f"  {name:{width}}" + "    ".join(cells))
        return lines


def _has_one_caption(record: Record) -> bool:
    """Whether images alone tell the candidates of a row apart."""
    row = record.example
    return row is not None and all(candidate.prompt is None for candidate in row.candidates)


def _judge_sizes(rows: list[tuple[Record, list[Size]]], doubts: Doubts) -> None:
    """Note images that a square crop cuts, or that training would have to enlarge, by much.

    How large images must be is not known: the small ones are those that are small for the usual
    size and beside the others of the file.
    """
    sides = [min(size) for _, sizes in rows for size in sizes]
    least = min(USUAL, float(np.median(sides))) / LARGEST_FACTOR if sides else 0.0
    for record, sizes in rows:
        if is_odd(sizes):
            continue
        small = min(sizes, key=min)
        if min(small) < least:
            what = f"rows with images that would be enlarged more than {LARGEST_FACTOR:g} times"
            doubts.note(record, what, f"{_shown(small)}, where most have {2 * least:g} a side")
        long = max(sizes, key=lambda size: max(size) / min(size))
        if 1 - min(long) / max(long) > LARGEST_CUT:
            what = "rows with images that a square crop cuts by more than half"
            doubts.note(record, what, f"{_shown(long)}; diffusion.buckets keeps more")


def _shown(size: Size) -> str:
    return f"{size[0]} x {size[1]}"


def _look(picture: Image) -> tuple[Size, bytes]:
    """Size, and a digest of the pixels, taken in strips: a large image lies in memory once."""
    digest, (width, height) = hashlib.blake2b(repr(picture.size).encode()), picture.size
    step = max(1, _STRIP // width)
    for top in range(0, height, step):
        digest.update(picture.crop((0, top, width, min(height, top + step))).tobytes())
    return picture.size, digest.digest()


# `mmalign data check`: all problems of the files in one pass, and what is in them.

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
            images of their own. Rows whose `split` column says eval, test or validation count
            as evaluation rows, unless a source asks for that split.
        eval_paths: More of them, all of evaluation rows.
        layout: The layout of all of them; None to recognize it.
        pictures: The folder that image paths start from; None: that of each file.
        decode: What is wrong with the media of rows; None: they are only counted.
        sizes: Judge the sizes of images; false where a config does, which knows what they become.
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
        """Compare what needed all records, and look into images and media."""
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
