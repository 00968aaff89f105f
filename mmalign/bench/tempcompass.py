"""TempCompass: four ways to ask about action, direction, speed, order and change of attributes.

The published scorer asks a language model about answers that its rules do not match. Here they
count 0 and are counted as unmatched, unless the file holds the judge's `rating` of 0 or 1.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from mmalign.bench.base import (
    Benchmark,
    Entry,
    Metric,
    Prediction,
    Question,
    Sheet,
    Source,
    Sums,
    Verdict,
    entry,
    ratio,
)
from mmalign.bench.parsers import LETTERS, letter, yes_no
from mmalign.bench.spoken import final
from mmalign.errors import DataError

_INDEX = re.compile(r"(?:sentence|option|caption|information)\s+", re.IGNORECASE)
_LINE = re.compile(r"^\s*(?:(?:Sentence|Option|Caption) )?([A-Z]|\d)\s*[.:)]\s*(.*)$")


class TempCompass(Benchmark):
    """Accuracy over all questions and by dimension, with the share that the rules matched."""

    layout = "{video: {dimension: [{question, answer, prediction?, rating?}]}}"
    metric = "accuracy over all questions; by dimension and the match rate besides"
    source = "Liu et al. 2024, arXiv:2403.00476; llyx97/TempCompass, eval_*.py"
    task: ClassVar[str]

    def items(self, source: Source) -> Iterator[Question]:
        """Questions are numbered from 0 in their video and dimension."""
        for video, dimensions in source.keyed():
            for dimension, asked in entry(dimensions, f"{source.path} {video!r}").value.items():
                where = f"{source.path} {video!r} {dimension}"
                if not isinstance(asked, list):
                    raise DataError(f"{where}: must be a list of questions")
                for i, item in enumerate(asked):
                    yield self._question(entry(item, f"{where} {i}"), video, dimension, i)

    def _question(self, asked: Entry, video: str, dimension: str, number: int) -> Question:
        text, rating = asked.text("question"), asked.value.get("rating")
        meta = {"video": video, "lines": text.split("\n")[1:]}
        return Question(
            id=f"{video}/{dimension}/{number}",
            task=dimension,
            prompt=text + self.suffix,
            video=f"{video}.mp4",
            answer=asked.text("answer", "gt-answer"),
            options=self.options(meta["lines"]),
            meta=meta | ({} if rating is None else {"rating": rating}),
            said=asked.said("prediction", "response", "video-llm-prediction"),
        )

    def options(self, lines: Sequence[str]) -> tuple[str, ...]:
        """Texts of the options, without their marks."""
        found = [_LINE.match(line) for line in lines]
        return tuple(match[2].strip() for match in found if match)

    @abstractmethod
    def match(self, text: str, row: Prediction, legacy: bool) -> tuple[str, bool] | None:
        """What the rules read and whether it is right; None where no rule matches."""

    def judge(self, text: str, row: Prediction, legacy: bool) -> Verdict:
        """By rule, else by the judge's rating, else wrong."""
        found = self.match(text.replace("</s>", "").strip(), row, legacy)
        if found is None:
            return Verdict(None, row.meta.get("rating") == 1)
        return Verdict(found[0], found[1])

    def groups(self, row: Prediction) -> Mapping[str, str]:
        """By dimension."""
        return {"dimension": row.task}

    def tally(self, rows: Sequence[Prediction], legacy: bool) -> tuple[Sheet, list[Verdict]]:
        """Right answers, and those that a rule matched."""
        sheet, verdicts = super().tally(rows, legacy)
        for row, verdict in zip(rows, verdicts, strict=True):
            sheet.add(self.unit_of(row), matched=verdict.read is not None)
        return sheet, verdicts

    def metrics(self, sums: Sums) -> dict[str, Metric]:
        """Accuracies and the match rate."""
        return super().metrics(sums) | {"match_rate": ratio(sums["matched"], sums["seen"])}


class MultiChoice(TempCompass):
    """Four options."""

    name = "tempcompass-multi-choice"
    title = "TempCompass, multiple choice"
    suffix = "\nPlease directly give the best option:"
    strict = "the letter given as the answer, or the one option whose text is said"
    legacy = "the whole answer, a letter alone, or `A.` or `A)` in front; `(A)` is not matched"

    def match(self, text: str, row: Prediction, legacy: bool) -> tuple[str, bool] | None:
        """The letter; answers are written `A. text`."""
        if legacy:
            front = re.match(r"([A-D])(?:$|[.)])", text)
            read = row.answer[0] if text == row.answer else front[1] if front else None
        else:
            read = letter(text, row.options, None if row.options else 4)
        return None if read is None else (read, read == row.answer[:1])


class YesNo(TempCompass):
    """Questions of yes or no."""

    name = "tempcompass-yes-no"
    title = "TempCompass, yes or no"
    suffix = "\nPlease answer yes or no:"
    strict = "the yes or no that is meant; contradictions are none"
    legacy = "whether the answer begins with yes or no, so that `Nothing` is no"

    def match(self, text: str, row: Prediction, legacy: bool) -> tuple[str, bool] | None:
        """Yes or no."""
        low = text.lower()
        starts = next((word for word in ("yes", "no") if low.startswith(word)), None)
        read = starts if legacy else yes_no(text)
        return None if read is None else (read, read == row.answer.lower())


class CaptionMatching(TempCompass):
    """Which of some captions is true."""

    name = "tempcompass-caption-matching"
    title = "TempCompass, caption matching"
    suffix = "\nPlease directly give the best option:"
    strict = "the mark of an option in front, or the one option whose text is said"
    legacy = "exactly an option, its sentence or its mark, letter for letter"

    def match(self, text: str, row: Prediction, legacy: bool) -> tuple[str, bool] | None:
        """The option; answers are written `Sentence A: text`."""
        lines = [str(line) for line in row.meta.get("lines") or ()]
        if legacy:
            return _published_caption(text, lines, row.answer)
        marks = [match[1] for match in map(_LINE.match, lines) if match]
        right = _LINE.match(row.answer)
        if not right or right[1] not in marks:
            raise DataError(f"{row.id}: the answer {row.answer!r} is none of the options")
        said = final(text)
        bare = _INDEX.sub("", said, count=1) if _INDEX.match(said) else said
        given = re.match(r"[\W_]*(\d)(?:$|[.:)])", bare)
        read = given[1] if given and given[1] in marks else None
        if read is None:
            found = letter(bare, row.options)
            read = None if found is None else marks[LETTERS.index(found)]
        return None if read is None else (read, read == right[1])


def _published_caption(text: str, lines: Sequence[str], answer: str) -> tuple[str, bool] | None:
    """The published rules: equality with an option, its sentence up to a colon, or its mark.

    Source: llyx97/TempCompass, eval_caption_matching.py.
    """
    split = [line.split(": ") for line in lines if ": " in line]
    marks = [parts[0] for parts in split]
    bare = [_INDEX.sub("", mark) for mark in marks]
    sentences = [parts[1] for parts in split]
    read: str | None = text if text in lines else None
    after = text.split(") ")[1] if ") " in text else None
    for sentence in sentences:
        if sentence in (text, after):
            read = sentence
    for mark in (*marks, *bare):
        if mark in (text, text.replace(".", "")):
            read = mark
    if read is None:
        return None
    mark, _, sentence = answer.partition(": ")
    return read, read in (answer, mark, sentence.split(": ")[0], mark.split()[-1])


class Captioning(TempCompass):
    """A caption is written from one of several pieces of information; a judge says which."""

    name = "tempcompass-captioning"
    title = "TempCompass, captioning"
    suffix = ""
    strict = "a judge's rating in the file; without one, the answer counts as unmatched and wrong"
    legacy = "the same: the published scorer asks a language model, which is not done here"

    def options(self, lines: Sequence[str]) -> tuple[str, ...]:
        """None: the question says what captions may be about."""
        return ()

    def match(self, text: str, row: Prediction, legacy: bool) -> tuple[str, bool] | None:
        """A rating of 0 or 1 by a judge; plain captions are compared by nobody here."""
        rating = row.meta.get("rating")
        return (f"rated {rating}", rating == 1) if rating in (0, 1) else None
