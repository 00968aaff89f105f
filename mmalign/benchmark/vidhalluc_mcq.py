"""VidHalluc, options on action: one or several of four are right."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from mmalign.benchmark.base import Benchmark, Verdict
from mmalign.benchmark.parsers import LETTERS, letters
from mmalign.benchmark.records import Prediction, Question
from mmalign.benchmark.sources import Source, entry
from mmalign.errors import DataError


def published_letters(text: str, options: tuple[str, ...]) -> frozenset[str]:
    """Every A to D that stands as a word, "A man" too but not "AC"; else the first option said.

    Source: Vid-Halluc/VidHalluc, eval/evaluation/eval_mcq.py.
    """
    given = frozenset(re.findall(r"\b[A-D]\b", text))
    if given:
        return given
    said = (LETTERS[i] for i, option in enumerate(options) if option.lower() in text.lower())
    return frozenset([first]) if (first := next(said, None)) else frozenset()


class VidHallucMCQ(Benchmark):
    """The set of letters must be exactly the right one."""

    name = "vidhalluc-mcq"
    title = "VidHalluc, action, options"
    layout = '{key: {clip: {Question, Choices: {A: ...}, "Correct Answer", "Model Answer"?}}}'
    metric = "share of questions with exactly the right set of letters"
    suffix = (
        " Please select the correct answer (one or more options), only return your answer(s). "
        "(e.g., ABCD), then the options"
    )
    strict = "letters that stand as an answer, or the options that are said"
    legacy = (
        "every A to D that stands as a word, `A man` too but not `AC`; else the first option said"
    )
    source = "Li et al. 2024, arXiv:2412.03735; Vid-Halluc/VidHalluc, eval/evaluation/eval_mcq.py"
    skips_missing = True

    def items(self, source: Source) -> Iterator[tuple[Question, str | None]]:
        """A clip each."""
        for key, clips in source.keyed():
            for clip, item in entry(clips, f"{source.path} {key!r}").value.items():
                asked = entry(item, f"{source.path} {key!r} {clip!r}")
                choices = asked.inner("Choices").value
                if list(choices) != list(LETTERS[: len(choices)]):
                    raise DataError(f"{asked.where}: the keys of `Choices` must be A, B, ...")
                right = re.findall("[A-D]", asked.text("Correct Answer").upper())
                lines = [f"{key}. {value}\n" for key, value in choices.items()]
                question = Question(
                    id=f"{key}/{clip}",
                    task="mcq",
                    prompt=asked.text("Question")
                    + self.suffix.removesuffix(", then the options")
                    + "\nChoices:\n"
                    + "".join(lines),
                    video=f"{clip}.mp4",
                    options=tuple(map(str, choices.values())),
                    answer="".join(sorted(set(right))),
                    meta={"video": key},
                )
                yield question, asked.maybe("Model Answer", "prediction")

    def judge(self, row: Prediction, legacy: bool) -> Verdict:
        """Compare sets of letters."""
        text = row.prediction or ""
        options = row.options or ("",) * 4
        given = published_letters(text, row.options) if legacy else letters(text, options)
        return Verdict("".join(sorted(given)) or None, given == frozenset(row.answer))

    def groups(self, row: Prediction) -> Mapping[str, str]:
        """By how many letters are right."""
        return {"right options": "one" if len(row.answer) == 1 else "several"}
