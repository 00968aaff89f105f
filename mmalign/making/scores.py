"""How vague answers are, as an outside judge says in a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmalign.data.example import normalised
from mmalign.data.fields import Fields
from mmalign.data.files import read_rows
from mmalign.errors import DataError
from mmalign.making.vague import Vague


class Scores:
    """Scores of a JSONL file, 0 for exact to 1 for vague, with reasons where the judge gives any.

    A line has the row's `id` and `scores`, one an answer in the order of the file of answers; or
    `score` and `answer`, the text that is meant; or `score` alone, for all answers of the row.
    """

    def __init__(self, path: Path) -> None:
        """Read the file.

        Raises:
            DataError: A line without an id or a score in [0, 1].
        """
        self.path = path
        self._lists: dict[str, list[Vague]] = {}
        self._texts: dict[tuple[str, str], Vague] = {}
        self._rows: dict[str, Vague] = {}
        for row in read_rows(path):
            fields = Fields(row.value or {})
            name, answer = fields.get("id"), fields.get("answer")
            why = (str(fields.get("reason")),) if "reason" in fields else ()
            if name is None:
                raise DataError(f"{row.place}: {row.problem or 'has no `id`'}")
            if "scores" in fields:
                numbers = fields.numbers("scores")
                self._lists[str(name)] = [Vague(number, why) for number in numbers]
            else:
                score = fields.number("score", 0, 1)
                numbers = () if score is None else (score,)
                if isinstance(answer, str):
                    self._texts[str(name), normalised(answer)] = Vague(score or 0.0, why)
                else:
                    self._rows[str(name)] = Vague(score or 0.0, why)
            if fields.problems or not numbers or not all(0 <= n <= 1 for n in numbers):
                problem = fields.problems[0] if fields.problems else "needs scores between 0 and 1"
                raise DataError(f"{row.place}: {problem}")

    def of(self, row: str, answers: Sequence[str]) -> list[Vague] | None:
        """The scores of a row's answers; None where the file has none of it.

        Raises:
            DataError: It scores another number of answers, or only some of them.
        """
        listed = self._lists.get(row)
        if listed is None and row in self._rows:
            listed = [self._rows[row]] * len(answers)
        if listed is None:
            found = [self._texts.get((row, normalised(answer))) for answer in answers]
            listed = [score for score in found if score is not None]
            if not listed:
                return None
        if len(listed) != len(answers):
            raise DataError(
                f"{self.path}: scores {len(listed)} of the {len(answers)} answers of {row!r}; an "
                "answer needs one score"
            )
        return listed
