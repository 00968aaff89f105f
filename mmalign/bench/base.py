"""What a benchmark is: its files, questions and answers, how an answer is judged, what is counted.

Files are as they are published: lists and objects of JSON, JSONL, parquet.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmalign.data.fields import is_deep, number, show
from mmalign.data.files import read_rows
from mmalign.data.jobs import first_few, write_lines
from mmalign.data.opening import open_data
from mmalign.errors import DataError
from mmalign.stats import NUM_RESAMPLES, resample_counts

MAX_OPTIONS = 26

SAID = ("prediction", "pred", "response")
"""Keys under which files hold a model's answers."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One JSON object of a file, with the place that messages name."""

    value: dict[str, Any]
    where: str

    def maybe(self, *keys: str) -> str | None:
        """The text of the first key that is there; numbers are written out, null is absent."""
        for key in keys:
            value = self.value.get(key)
            if value is not None:
                if isinstance(value, str | int | float) and not isinstance(value, bool):
                    return str(value)
                raise DataError(f"{self.where}: {key!r} must be text; found {show(value)}")
        return None

    def text(self, *keys: str) -> str:
        """The same, which must be there."""
        found = self.maybe(*keys)
        if found is None:
            raise DataError(f"{self.where}: has no {keys[0]!r}; found {show(sorted(self.value))}")
        return found

    def texts(self, key: str) -> list[str]:
        """A list of texts, at most one a letter."""
        value = self.value.get(key)
        if not isinstance(value, list) or not value:
            raise DataError(f"{self.where}: {key!r} must be a list of texts; found {show(value)}")
        if len(value) > MAX_OPTIONS:
            raise DataError(f"{self.where}: {key!r} holds {len(value)}, of {MAX_OPTIONS} at most")
        return [str(item) for item in value]

    def seconds(self, key: str) -> float | None:
        """A time in seconds, or None."""
        value = self.value.get(key)
        found = number(value)
        if value is not None and found is None:
            raise DataError(f"{self.where}: {key!r} must be seconds; found {show(value)}")
        return found

    def place(self, key: str, count: int) -> int:
        """A place in a list of `count`, from 0."""
        found = self.value.get(key)
        if not isinstance(found, int) or not 0 <= found < count:
            raise DataError(f"{self.where}: {key!r} must be 0 to {count - 1}; found {found!r}")
        return found

    def said(self, *keys: str) -> str | None:
        """What a model said: under the first of `keys`, or of `SAID`, that is there."""
        return self.maybe(*keys, *SAID)

    def inner(self, key: str) -> Entry:
        """The object under a key."""
        return entry(self.value.get(key), f"{self.where} {key}")


@dataclass(frozen=True, slots=True)
class Source:
    """A file that was read; `value` is its JSON, for JSONL and parquet a list of the rows."""

    path: Path
    value: Any

    def entries(self) -> Iterator[Entry]:
        """The objects of a list; those of a JSONL file are named by number too."""
        if not isinstance(self.value, list):
            raise DataError(f"{self.path}: must hold a list; found {_kind(self.value)}")
        for i, item in enumerate(self.value, start=1):
            yield entry(item, f"{self.path}:{i}")

    def keyed(self) -> Iterator[tuple[str, Any]]:
        """The members of an object."""
        if not isinstance(self.value, dict):
            raise DataError(f"{self.path}: must hold an object; found {_kind(self.value)}")
        yield from self.value.items()


def entry(value: Any, where: str) -> Entry:
    """A value that must be an object."""
    if not isinstance(value, dict):
        raise DataError(f"{where}: must be an object; found {show(value)}")
    return Entry(value, where)


def load(path: Path) -> Source:
    """Read a file.

    Raises:
        DataError: It is not there, is empty, or is not what its name says.
    """
    if path.suffix.lower() != ".json" or not path.is_file():
        if not path.suffix:
            raise DataError(f"{path}: must be a .json, .jsonl or .parquet file")
        rows = list(read_rows(path))
        bad = [row for row in rows if row.value is None]
        if bad:
            more = f"; {len(bad) - 1} more lines like it" if len(bad) > 1 else ""
            raise DataError(f"{bad[0].place}: {bad[0].problem}{more}")
        return _filled(path, [row.value for row in rows])
    try:
        with open_data(path) as handle:
            text = handle.read().decode("utf-8-sig")
        value = json.loads(text)
        if "\\ud" in text or "\\uD" in text:  # an escape may be half of a pair
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise DataError(f"{path}: holds half of a surrogate pair, {half!a}") from error
    except RecursionError as error:
        raise DataError(f"{path}: not JSON: nested too deeply") from error
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    if is_deep(value):
        raise DataError(f"{path}: nested too deeply")
    return _filled(path, value)


def _filled(path: Path, value: Any) -> Source:
    if not value:
        raise DataError(f"{path}: holds no questions")
    return Source(path, value)


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        return f"an object with {show(sorted(value))}"
    return f"a list of {len(value)}" if isinstance(value, list) else show(value)


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
        said: What a model said, where the file holds that too.
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
    said: str | None = None

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
        names = ("id", "benchmark", "task", "prediction", "answer")
        rest = {"options": list(self.options), "pair_id": self.pair_id, "meta": dict(self.meta)}
        given = {key: value for key, value in rest.items() if value}
        return {name: getattr(self, name) for name in names} | given


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
    write_lines(path, (row.record() for row in rows))


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
    return ", ".join(first_few([repr(name) for name in sorted(ids)], most))


Floats = NDArray[np.float64]
Sums = Mapping[str, Floats]


class Sheet:
    """Columns of numbers with a row a unit, from which every number of a benchmark follows.

    A unit is what was drawn as one piece: a pair of questions, or a video with all of its
    questions. Every metric is a function of sums over units, so that a resample of units is a
    product of counts with one matrix, and two runs are resampled alike.
    """

    def __init__(self) -> None:
        self._cells: dict[str, dict[str, float]] = {}

    def add(self, unit: str, values: Mapping[str, float] | None = None, **more: float) -> None:
        """Add to the sums of a unit; without values it is only known to be there."""
        cells = self._cells.setdefault(unit, defaultdict(float))
        for name, value in {**(values or {}), **more}.items():
            cells[name] += float(value)

    @property
    def units(self) -> list[str]:
        """In the order of their names: the order of a file does not matter."""
        return sorted(self._cells)

    def _matrix(self) -> tuple[list[str], Floats]:
        """Columns in the order in which they first came up, and the sums, [units, columns]."""
        names = list(dict.fromkeys(name for cells in self._cells.values() for name in cells))
        rows = [[self._cells[unit].get(name, 0.0) for name in names] for unit in self.units]
        return names, np.asarray(rows, dtype=np.float64).reshape(len(rows), len(names))

    def total(self) -> dict[str, Floats]:
        """Sums over all units, [1] each."""
        names, matrix = self._matrix()
        return dict(zip(names, matrix.sum(0)[:, None], strict=True))

    def resampled(self, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> dict[str, Floats]:
        """Sums over units drawn with replacement, [resamples] each.

        The draws are those of `mmalign.stats.bootstrap_interval`, unit by unit.
        """
        names, matrix = self._matrix()
        counts = resample_counts(len(matrix), num_resamples, seed)
        sums = np.concatenate([drawn @ matrix for drawn in counts])  # [resamples, columns]
        return dict(zip(names, sums.T, strict=True))


def share(part: Floats, whole: Floats) -> Floats:
    """part / whole; nan where there is nothing to divide by."""
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=whole != 0)


class Metric(NamedTuple):
    """A number in each resample, and how many questions, or pairs, it is over; [R] each."""

    value: Floats
    size: Floats


def ratio(part: Floats, whole: Floats) -> Metric:
    """The share of a part."""
    return Metric(share(part, whole), whole)


def mean(values: list[Floats]) -> Floats:
    """Unweighted mean of metrics, over those that have a value in a resample."""
    stacked = np.stack(values)  # [groups, R]
    present = ~np.isnan(stacked)
    return share(np.where(present, stacked, 0.0).sum(0), present.sum(0).astype(np.float64))


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one answer."""

    read: str | None  # what it was understood as; None: nothing was understood, or it is missing
    right: bool
    counted: bool = True  # False where the published code leaves the question out


class Benchmark(ABC):
    """A benchmark; the class attributes are what `mmalign bench list` and the docs say."""

    name: ClassVar[str]  # for `--benchmark`
    title: ClassVar[str]  # in full
    layout: ClassVar[str]  # its file, in one line
    metric: ClassVar[str]  # the number to report
    suffix: ClassVar[str]  # how the prompt ends; " (ours)" behind it where nothing is published
    strict: ClassVar[str]  # how answers are read
    legacy: ClassVar[str]  # what the published code does differently
    source: ClassVar[str]  # paper and code
    unit: ClassVar[str] = "video"  # what is drawn as one piece: "pair" or "video"
    headline: ClassVar[str] = "accuracy"  # the metric that is compared first
    codes: ClassVar[tuple[str, ...]] = ()  # whose the legacy reading can follow, the default first
    skips_missing: ClassVar[bool] = False  # the published code leaves out what has no answer
    plain: ClassVar[frozenset[str]] = frozenset()  # metrics that are no shares
    tables: ClassVar[tuple[str, ...]] = ()  # `meta` keys to group by, the first averaged; (): task

    code = ""  # one of `codes`, where the legacy reading is not to follow the first

    @property
    def ending(self) -> str:
        """The suffix as a model is given it."""
        return self.suffix.removesuffix(" (ours)")

    @abstractmethod
    def items(self, source: Source) -> Iterator[Question]:
        """Questions of a published file."""

    def answers(self, source: Source) -> dict[str, str | None]:
        """Answers of a file that holds answers, by question id; questions come from another."""
        return {question.id: question.said for question in self.items(source)}

    @abstractmethod
    def judge(self, text: str, row: Prediction, legacy: bool) -> Verdict:
        """Read one answer; `text` is what was said."""

    def groups(self, row: Prediction) -> Mapping[str, str]:
        """The tables that a question counts in, and its row in each; the first one is averaged."""
        if not self.tables:
            return {"task": row.task}
        return {key: str(row.meta[key]) for key in self.tables if key in row.meta}

    def unit_of(self, row: Prediction) -> str:
        """What a question is drawn with."""
        drawn = row.pair_id if self.unit == "pair" else str(row.meta.get("video") or "")
        return drawn or row.id

    def verdict(self, row: Prediction, legacy: bool) -> Verdict:
        """Read one answer; one that is missing is wrong, or left out as the published code does."""
        if row.prediction is None:
            return Verdict(None, False, not (legacy and self.skips_missing))
        return self.judge(row.prediction, row, legacy)

    def tally(self, rows: Sequence[Prediction], legacy: bool) -> tuple[Sheet, list[Verdict]]:
        """Count right answers, in all and in every group."""
        sheet, verdicts = Sheet(), [self.verdict(row, legacy) for row in rows]
        for row, verdict in zip(rows, verdicts, strict=True):
            unit = self.unit_of(row)
            sheet.add(unit)
            if verdict.counted:
                places = ["", *(f"/{table}/{group}" for table, group in self.groups(row).items())]
                for place in places:
                    sheet.add(unit, {f"right{place}": verdict.right, f"seen{place}": 1})
        return sheet, verdicts

    def metrics(self, sums: Sums) -> dict[str, Metric]:
        """Every number from sums: micro and macro accuracy, then that of each group."""
        if not sums:
            return {}
        tables: dict[str, dict[str, Metric]] = defaultdict(dict)
        for name in (name.removeprefix("seen/") for name in sums if name.startswith("seen/")):
            table = tables[name.partition("/")[0]]
            table[name] = ratio(sums[f"right/{name}"], sums[f"seen/{name}"])
        found = {"accuracy": ratio(sums["right"], sums["seen"])}
        if tables:
            first = next(iter(tables.values()))
            found["macro"] = Metric(mean([group.value for group in first.values()]), sums["seen"])
        return {key: value for part in (found, *tables.values()) for key, value in part.items()}

    def notes(self) -> list[str]:
        """What a reader of the numbers has to know."""
        return []
