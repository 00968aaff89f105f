"""What a benchmark is: how its files are read, how an answer is judged, what is counted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from mmalign.benchmark.records import Prediction, Question
from mmalign.benchmark.sources import Source
from mmalign.benchmark.tally import Floats, Sheet, Sums, mean, share


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one answer.

    Attributes:
        read: What it was understood as; None: nothing was understood, or it is missing.
        right: Whether that is the answer.
        counted: False where the published code leaves the question out.
    """

    read: str | None
    right: bool
    counted: bool = True


class Benchmark(ABC):
    """A benchmark; the class attributes are what `mmalign bench list` and the docs say.

    Attributes:
        name: For `--benchmark`.
        title: In full.
        layout: Its file, in one line.
        metric: The number to report.
        suffix: How the prompt ends; where it is ours, it says so.
        strict: How answers are read.
        legacy: What the published code does differently.
        source: Paper and code.
        unit: What is drawn as one piece: "pair" or "video".
        headline: The metric that is compared first.
        codes: Whose code the legacy reading can follow, the default first; () where there is one.
        skips_missing: Whether the published code leaves out questions without an answer.
        plain: Metrics that are no shares.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    layout: ClassVar[str]
    metric: ClassVar[str]
    suffix: ClassVar[str]
    strict: ClassVar[str]
    legacy: ClassVar[str]
    source: ClassVar[str]
    unit: ClassVar[str] = "video"
    headline: ClassVar[str] = "accuracy"
    codes: ClassVar[tuple[str, ...]] = ()
    skips_missing: ClassVar[bool] = False
    plain: ClassVar[frozenset[str]] = frozenset()

    code = ""
    """One of `codes`, where the legacy reading is not to follow the first."""

    @abstractmethod
    def items(self, source: Source) -> Iterator[tuple[Question, str | None]]:
        """Questions of a published file, with the answer of a model where the file holds one."""

    def answers(self, source: Source) -> dict[str, str | None]:
        """Answers of a file that holds answers, by question id; questions come from another."""
        return {question.id: text for question, text in self.items(source)}

    @abstractmethod
    def judge(self, row: Prediction, legacy: bool) -> Verdict:
        """Read one answer; `row.prediction` is never None."""

    def groups(self, row: Prediction) -> Mapping[str, str]:
        """The tables that a question counts in, and its row in each; the first one is averaged."""
        return {"task": row.task}

    def unit_of(self, row: Prediction) -> str:
        """What a question is drawn with."""
        drawn = row.pair_id if self.unit == "pair" else str(row.meta.get("video") or "")
        return drawn or row.id

    def verdict(self, row: Prediction, legacy: bool) -> Verdict:
        """Read one answer; one that is missing is wrong, or left out as the published code does."""
        if row.prediction is None:
            return Verdict(None, False, not (legacy and self.skips_missing))
        return self.judge(row, legacy)

    def tally(self, rows: Sequence[Prediction], legacy: bool) -> tuple[Sheet, list[Verdict]]:
        """Count right answers, in all and in every group."""
        sheet, verdicts = Sheet(), [self.verdict(row, legacy) for row in rows]
        for row, verdict in zip(rows, verdicts, strict=True):
            unit = self.unit_of(row)
            sheet.add(unit)
            if verdict.counted:
                places = ["", *(f"/{table}/{group}" for table, group in self.groups(row).items())]
                for place in places:
                    sheet.put(unit, {f"right{place}": verdict.right, f"seen{place}": 1})
        return sheet, verdicts

    def metrics(self, sums: Sums) -> dict[str, Floats]:
        """Every number from sums, [R] each: micro and macro accuracy, then that of each group."""
        if not sums:
            return {}
        names = [name.removeprefix("seen/") for name in sums if name.startswith("seen/")]
        tables = list(dict.fromkeys(name.partition("/")[0] for name in names))
        groups = {
            name: share(sums[f"right/{name}"], sums[f"seen/{name}"])
            for table in tables
            for name in names
            if name.partition("/")[0] == table
        }
        averaged = [groups[name] for name in names if name.partition("/")[0] == tables[0]]
        found = {"accuracy": share(sums["right"], sums["seen"])}
        if averaged:
            found["macro"] = mean(averaged)
        return found | groups

    def sizes(self, sums: Sums) -> dict[str, int]:
        """How many questions, or pairs, a metric is over."""
        counts = {name: int(value[0]) for name, value in sums.items() if name.startswith("seen")}
        found = {name.removeprefix("seen/"): count for name, count in counts.items()}
        return found | {"accuracy": counts.get("seen", 0), "macro": counts.get("seen", 0)}

    def notes(self) -> list[str]:
        """What a reader of the numbers has to know."""
        return []
