"""`mmalign data check`: all problems of the files in one pass, and what is in them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmalign.data.doubts import Doubts
from mmalign.data.example import HELD_OUT, Example, Media, Picture, as_text
from mmalign.data.fields import Problem
from mmalign.data.jobs import track
from mmalign.data.pictures import LARGEST_CUT, LARGEST_FACTOR, decode_all, is_odd
from mmalign.data.records import ProblemList, Record, read_records
from mmalign.errors import DataError
from mmalign.safe import printable

if TYPE_CHECKING:
    from PIL.Image import Image

    from mmalign.config import DataSource

Decode = Callable[[Sequence[Example]], Sequence[Sequence[str]]]
"""Rows to what is wrong with the media of each; callers bring it, for data decodes no clips."""


class MediaBook:
    """Collects what the prompts of all records show, corrupted clips of their own included.

    Whether a clip or a sound can be decoded is found out where that is asked for, and before a
    run's first step, with the run's limits.
    """

    def __init__(self) -> None:
        kinds = ("clip", "image", "sound")
        self.files: dict[str, Counter[Path | Picture]] = {kind: Counter() for kind in kinds}
        self.rows: list[tuple[Record, Example, list[Media]]] = []

    def add(self, record: Record, row: Example) -> None:
        """Take in the media of one row, and of its candidates."""
        shown = [m for m in (row.media, *(c.media for c in row.candidates)) if m]
        if shown:
            self.rows.append((record, row, shown))
        for media in shown:
            self.files["clip"].update(clip.path for clip in media.videos)
            self.files["image"].update(media.images)
            self.files["sound"].update(sound.path for sound in media.sounds)

    def close(self, problems: ProblemList, decode: Decode | None = None) -> None:
        """Decode the images, in threads, and with `decode` all else, and add what is wrong."""
        if decode is not None:
            faults = decode([row for _, row, _ in self.rows])
            for (record, _, _), texts in zip(self.rows, faults, strict=True):
                for text in texts:
                    problems.add(record, Problem("what is shown must be decodable", text))
            return
        files = self.files["clip"] | self.files["sound"]
        absent = {file for file in files if isinstance(file, Path) and not file.is_file()}
        for record, _, shown in self.rows if absent else ():
            for file in dict.fromkeys(file for media in shown for file in media.files()):
                if file in absent:
                    what = "what is shown or played must be a media file that is there"
                    problems.add(record, Problem(what, f"there is no {file}"))
        pictures = (file for file in self.files["image"] if isinstance(file, Picture))
        found = decode_all(pictures, lambda _: None)
        for record, _, shown in self.rows:
            for picture in (picture for media in shown for picture in media.images):
                _add_fault(problems, record, found[picture])

    def lines(self) -> list[str]:
        """How many media there are of each kind, and in how many files."""
        parts = [
            f"{_times(files.total(), kind)} ({_times(len(files), 'file')})"
            for kind, files in self.files.items()
            if files
        ]
        return [f"  {'shown':8} " + ", ".join(parts)] if parts else []


def _times(count: int, name: str) -> str:
    return f"{count} {name}{'s' * (count != 1)}"


def _add_fault(problems: ProblemList, record: Record, result: object) -> None:
    """Add a problem where an image could not be decoded."""
    if isinstance(result, DataError):
        problems.add(record, Problem("an image must be decodable", str(result)))


Size = tuple[int, int]  # width, height

USUAL = 512
"""Pixels a side that images are brought to where no config says another number."""

_STRIP = 2**20  # pixels


class PictureBook:
    """Collects the images of all records, and decodes each once at the end."""

    def __init__(self) -> None:
        self.rows: list[tuple[Record, list[tuple[str, Picture]], bool]] = []  # own captions
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
            has_captions = any(candidate.prompt is not None for candidate in row.candidates)
            self.rows.append((record, parts, has_captions))

    def close(self, problems: ProblemList, doubts: Doubts, *, alone: bool = True) -> None:
        """Decode all images, in threads, and add what is wrong with them.

        Args:
            problems: Images that cannot be decoded go there.
            doubts: Rows that teach nothing, or other than they seem to, go there.
            alone: Judge sizes as well: no config does, which knows how large images must be.
        """
        found = decode_all((picture for _, parts, _ in self.rows for _, picture in parts), _look)
        self.num_decoded = sum(not isinstance(result, DataError) for result in found.values())
        whole: list[tuple[Record, list[Size]]] = []
        for record, parts, has_captions in self.rows:
            sizes: list[Size] = []
            digests: list[bytes] = []
            for name, picture in parts:
                result = found[picture]
                _add_fault(problems, record, result)
                if not isinstance(result, DataError):
                    sizes.append(result[0])
                    digests.append(result[1])
                    self.sizes.setdefault(name, []).append(result[0])
            if len(sizes) < len(parts):
                continue
            if is_odd(sizes):
                what = "rows whose images differ in aspect ratio by more than 2 to 1"
                doubts.note(record, f"{what}: not trained on", " and ".join(map(_shown, sizes)))
            elif len(set(digests)) < len(digests) and not has_captions:
                doubts.note(record, "rows that show one image twice, pixel by pixel")
            whole.append((record, sizes))
        if alone:
            _judge_sizes(whole, doubts)

    def lines(self) -> list[str]:
        """How many images there are, and a table of their sizes."""
        if not self.rows:
            return []
        total = sum(len(parts) for _, parts, _ in self.rows)
        heads = {"width": 0, "height": 0, "width / height": 2}
        sides = {name: [(w, h, w / h) for w, h in sizes] for name, sizes in self.sizes.items()}
        table = _table(heads, {"min": 0.0, "median": 0.5, "max": 1.0}, sides, " " * 4)
        files = f"{total} in {len(self.rows)} records; {self.num_decoded} files decoded"
        return [f"  images   {files}", *table]


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


EVAL = "eval"
QUANTILES = {"min": 0.0, "5%": 0.05, "median": 0.5, "95%": 0.95, "max": 1.0}


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
    lists: list[tuple[Record, int]] = field(default_factory=list["tuple[Record, int]"])
    """Ranked lists, and how many responses each has."""
    pictures: PictureBook = field(default_factory=PictureBook)
    media: MediaBook = field(default_factory=MediaBook)

    def add(self, record: Record, split: str, source: str) -> None:
        """Take in one record of the split and file."""
        self.num_records += 1
        self.problems.add(record, *record.problems)
        row = record.example
        if row is None:
            return
        self.kinds[row.kind] += 1
        self.splits[split] += 1
        self.labels[_label(row)] += 1
        for part, text in _parts(row):
            self.lengths.setdefault(part, []).append((len(text), len(text.split())))
        self.pictures.add(record, row)
        self.media.add(record, row)
        self.warnings.add(record, source, held_out=split == EVAL)
        self.warnings.leakage.add(row, held_out=split == EVAL)
        if row.kind == "list":
            self.lists.append((record, row.num_rated))

    def close(self, decode: Decode | None, *, sizes: bool) -> None:
        """Compare what needed all records, and look into images and media."""
        self.pictures.close(self.problems, self.warnings, alone=sizes)
        self.media.close(self.problems, decode)
        if self.warnings.all_weights_are_zero:
            nowhere = Record(self.names, self.names, "", None)
            self.problems.add(nowhere, Problem("the weight of all rows is 0"))
        usual = Counter(k for _, k in self.lists).most_common(1)
        for record, k in self.lists:
            if k != usual[0][0]:
                what = f"all lists must have the same length, which is mostly {usual[0][0]} here"
                self.problems.add(record, Problem(what, f"this one has {k} responses"))

    @property
    def exit_code(self) -> int:
        """1 when there are problems."""
        return int(bool(self.problems.groups))

    def text(self, show: int = 20) -> str:
        """The report for a terminal; `show` places for each kind of problem."""
        lines = [f"{self.names}: {self.num_records} records"]
        for title in ("kinds", "splits", "labels"):
            counts: Counter[str] = getattr(self, title)
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
    for number, (item, name) in enumerate(zip(given, names, strict=True)):
        source: dict[str, Any] = {"layout": layout, "pictures": pictures}
        if not isinstance(item, str | Path):
            source = {key: getattr(item, key) for key in ("name", "split", "layout", "pictures")}
        before = report.num_records
        try:
            for record in track(read_records(name, **source), f"reading {name}"):
                by_split = source.get("split") is None and record.split.lower() in HELD_OUT
                held_out = number >= len(paths) or by_split
                report.add(record, EVAL if held_out else record.split or "train", name)
            if report.num_records == before:
                raise DataError(f"{name}: holds no records")
        except DataError as error:
            report.problems.add(Record(name, name, "", None), Problem(str(error)))
    report.close(decode, sizes=sizes)
    return report


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


def _table(
    heads: Mapping[str, int],
    quantiles: Mapping[str, float],
    values: Mapping[str, Sequence[tuple[float, ...]]],
    between: str,
) -> list[str]:
    """Two lines of heads, which say the digits of a column too, then a line for each name."""
    width = max(map(len, values), default=0) + 2
    under = "".join(f"{name:>8}" for name in quantiles)
    lines = [
        f"  {'':{width}}" + between.join(f"{head:>{len(under)}}" for head in heads),
        f"  {'':{width}}" + between.join(under for _ in heads),
    ]
    for name, rows in values.items():
        found = np.quantile(np.array(rows, np.float64), list(quantiles.values()), axis=0)
        columns = zip(found.T.tolist(), heads.values(), strict=True)
        cells = ("".join(f"{n:8.{digits}f}" for n in column) for column, digits in columns)
        lines.append(f"  {name:{width}}" + between.join(cells))
    return lines


def _length_table(lengths: dict[str, list[tuple[int, int]]]) -> list[str]:
    """Quantiles of characters and words, a line for each part of a row."""
    if not lengths:
        return []
    lines = _table({"characters": 0, "words": 0}, QUANTILES, lengths, " " * 6)
    if {"chosen", "rejected"} <= set(lengths):
        pairs = zip(lengths["chosen"], lengths["rejected"], strict=True)
        longer = sum(chosen > rejected for (chosen, _), (rejected, _) in pairs)
        share = longer / len(lengths["chosen"])
        lines.append(f"  chosen is the longer one in {share:.0%} of the pairs")
    return lines
