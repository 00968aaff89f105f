"""Benchmarks of questions with lettered options, one of which is right."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import ClassVar

from mmalign.benchmark.base import Benchmark, Verdict
from mmalign.benchmark.parsers import LETTERS, letter
from mmalign.benchmark.records import Prediction, Question
from mmalign.benchmark.sources import Entry, Source
from mmalign.errors import DataError

_ANY_LETTER = re.compile(r"[A-Za-z]")


def first_letter(text: str) -> str | None:
    """The first alphabetic character of an answer, as RRPO's copies of the scorers read it.

    "The answer is (B)" is read as T.

    Source: pritamqu/RRPO, eval/tvbench, eval/mvbench, eval/mlvu, eval/longvideobench.
    """
    found = _ANY_LETTER.search(text)
    return found[0].upper() if found else None


def first_word_fits(text: str, letter: str) -> bool:
    """Whether TVBench's and MVBench's own code takes an answer for a letter.

    Its first word, up to a blank, must be part of `(b)` but for full stops, or hold it: "b)" and
    "(B)dog" are right, and so is an answer that is empty or begins with a blank.

    Source: daniel-cores/tvbench, vqa_dataset.py; OpenGVLab/Ask-Anything, mvbench.ipynb; check_ans.
    """
    word, option = text.lower().split(" ")[0], f"({letter.lower()})"
    return word.replace(".", "") in option or option in word


def listed(question: str, options: Sequence[str], mark: str = "({}) {}") -> str:
    """A question with its lettered options, as MVBench asks it."""
    lines = [mark.format(LETTERS[i], option) for i, option in enumerate(options)]
    return "\n".join([f"Question: {question}", "Options:", *lines])


def right_letter(answer: str, options: Sequence[str], where: str) -> str:
    """The letter of the option that is the answer, which is given by its text or its letter.

    Raises:
        DataError: It is neither.
    """
    if answer in options:
        return LETTERS[list(options).index(answer)]
    given = answer.strip().strip("().").upper()
    if len(given) == 1 and given in LETTERS[: len(options) or 26]:
        return given
    raise DataError(f"{where}: the answer {answer!r} is none of the {len(options)} options")


class Choice(Benchmark):
    """Accuracy of letters."""

    strict = "the letter given as the answer, or the one option whose text is said"
    legacy = "the first alphabetic character; questions without an answer are left out"
    skips_missing = True

    def judge(self, row: Prediction, legacy: bool) -> Verdict:
        """Whether the letter that is read is the right one."""
        text = row.prediction or ""
        read = first_letter(text) if legacy else letter(text, row.options)
        return Verdict(read, read == row.answer)


class BothCodes(Choice):
    """Choices that can be read as RRPO's copies do, or as the benchmark's own code does."""

    codes = ("rrpo", "original")
    legacy = (
        "rrpo: the first alphabetic character; original: the first word is part of `(a)` or holds "
        "it; questions without an answer are left out"
    )

    def judge(self, row: Prediction, legacy: bool) -> Verdict:
        """Whether the letter that is read is the right one."""
        if not legacy or self.code != "original":
            return super().judge(row, legacy)
        text = row.prediction or ""
        letters = (row.answer, *LETTERS[: len(row.options)])
        read = next((letter for letter in letters if first_word_fits(text, letter)), None)
        return Verdict(read, read == row.answer)


class TaskFiles(Choice):
    """One file a task: a list of `{video, question, candidates, answer}`; so MVBench has them."""

    layout = "task.json: [{video, question, candidates, answer, start?, end?, prediction?}, ...]"
    suffix: ClassVar[str] = "\nOnly give the best option."

    def items(self, source: Source) -> Iterator[tuple[Question, str | None]]:
        """Questions are numbered from 0 in their file."""
        counts: dict[str, int] = {}
        for entry in source.entries():
            options = entry.texts("candidates")
            task = self.task(entry, source)
            number = counts[task] = counts.get(task, -1) + 1
            question = Question(
                id=f"{task}/{number}",
                task=task,
                prompt=listed(entry.text("question"), options) + self.suffix,
                video=self.clip(entry.text("video"), task),
                start=entry.seconds("start"),
                end=entry.seconds("end"),
                options=tuple(options),
                answer=right_letter(entry.text("answer"), options, entry.where),
            )
            yield question, entry.maybe("prediction", "pred", "response")

    def task(self, entry: Entry, source: Source) -> str:
        """By default the file's name."""
        return source.path.stem

    def clip(self, video: str, task: str) -> str:
        """The clip's file in the folder of all media."""
        return video
