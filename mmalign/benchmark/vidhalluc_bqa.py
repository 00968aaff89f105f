"""VidHalluc, binary questions on action: one question about several clips of a video."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from mmalign.benchmark.base import Benchmark, Verdict
from mmalign.benchmark.parsers import yes_no
from mmalign.benchmark.records import Prediction, Question
from mmalign.benchmark.sources import Source, entry
from mmalign.benchmark.tally import Sheet
from mmalign.errors import DataError


class VidHallucBQA(Benchmark):
    """A question is right where the answers for all of its clips are."""

    name = "vidhalluc-bqa"
    title = "VidHalluc, action, yes or no"
    layout = '{key: [{q, a: {clip: "Yes" or "No"}}]}; answers in a file of the same shape'
    metric = "share of questions answered rightly for every clip"
    suffix = " Only answer with a single word 'Yes' or 'No'."
    strict = "the yes or no that is meant; contradictions are none"
    legacy = (
        "all text before the first full stop and comma must be yes or no; questions without any "
        "answer are left out"
    )
    source = "Li et al. 2024, arXiv:2412.03735; Vid-Halluc/VidHalluc, eval/evaluation/eval_bqa.py"
    skips_missing = True

    def items(self, source: Source) -> Iterator[tuple[Question, str | None]]:
        """A question and a clip each; the file holds right answers."""
        for key, number, text, clips in _asked(source):
            for clip, answer in clips.items():
                question = Question(
                    id=f"{key}/{number}/{clip}",
                    task="bqa",
                    prompt=text + self.suffix,
                    video=f"{clip}.mp4",
                    answer=str(answer).strip().lower(),
                    pair_id=f"{key}/{number}",
                    meta={"video": key},
                )
                yield question, None

    def answers(self, source: Source) -> dict[str, str | None]:
        """The same shape, with what the model said in the place of what is right."""
        return {
            f"{key}/{number}/{clip}": None if said is None else str(said)
            for key, number, _, clips in _asked(source)
            for clip, said in clips.items()
        }

    def judge(self, row: Prediction, legacy: bool) -> Verdict:
        """Whether one clip's answer is right."""
        text = row.prediction or ""
        read = text.strip().split(".")[0].split(",")[0].strip().lower() if legacy else yes_no(text)
        return Verdict(read, read == row.answer.lower())

    def verdict(self, row: Prediction, legacy: bool) -> Verdict:
        """A missing clip is wrong; whether its question is left out is told by the other clips."""
        return Verdict(None, False) if row.prediction is None else self.judge(row, legacy)

    def tally(self, rows: Sequence[Prediction], legacy: bool) -> tuple[Sheet, list[Verdict]]:
        """Count questions; the published code leaves out those that no clip has an answer for."""
        sheet, verdicts = Sheet(), [self.verdict(row, legacy) for row in rows]
        questions: dict[str, list[int]] = defaultdict(list)
        for i, row in enumerate(rows):
            questions[row.pair_id or row.id].append(i)
        for places in questions.values():
            unit = self.unit_of(rows[places[0]])
            sheet.add(unit)
            if legacy and all(rows[i].prediction is None for i in places):
                for i in places:
                    verdicts[i] = Verdict(None, False, counted=False)
                continue
            sheet.add(unit, right=all(verdicts[i].right for i in places), seen=1)
        return sheet, verdicts


def _asked(source: Source) -> Iterator[tuple[str, int, str, dict[str, Any]]]:
    """Key, number in the key, question and clips."""
    for key, questions in source.keyed():
        if not isinstance(questions, list):
            raise DataError(f"{source.path} {key!r}: must be a list of questions")
        for number, item in enumerate(questions):
            asked = entry(item, f"{source.path} {key!r} question {number + 1}")
            yield key, number, asked.text("q"), asked.inner("a").value
