"""The rules of `mmalign.pairs.judge` as judges of texts with a known true answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from mmalign.errors import DataError
from mmalign.judging.base import NAN, Drawn, Verdict


@dataclass(frozen=True)
class _BesideTruth:
    """A judge of responses beside a true answer.

    Attributes:
        column: Of the true answer.
        name: Of the rewards.
    """

    kind: ClassVar[str]
    column: str
    name: str

    def facts(self) -> dict[str, Any]:
        """The column."""
        return {self.kind: self.column}


class Right(_BesideTruth):
    """1 for a response that says what the true answer says, 0 for a wrong one.

    Options, yes and no, numbers and contradictions are told by rule; where none can tell, the
    response is not judged.
    """

    kind = "right"

    def __call__(self, rows: Sequence[Drawn]) -> list[Verdict]:
        """A verdict a row.

        Raises:
            DataError: A row has no true answer, or images as responses.
        """
        from mmalign.pairs.judge import judge

        known = {"right": 1.0, "wrong": 0.0}
        verdicts: list[Verdict] = []
        for row in rows:
            truth, texts = _truth(row, self.column), _texts(row)
            found = [judge(text, truth, row.question).outcome for text in texts]
            rewards = [known.get(outcome, NAN) for outcome in found]
            told = any(outcome in known for outcome in found)
            verdicts.append(Verdict(rewards, note="" if told else "no rule can tell"))
        return verdicts


class Specific(_BesideTruth):
    """1 less the vagueness of a response, 0 to 1: hedges, refusals and words for anything cost.

    It says nothing of whether a response is true.
    """

    kind = "specific"

    def __call__(self, rows: Sequence[Drawn]) -> list[Verdict]:
        """A verdict a row.

        Raises:
            DataError: A row has no true answer, or images as responses.
        """
        from mmalign.pairs.judge import vagueness

        return [
            Verdict(
                [
                    1.0 - vagueness(text, _truth(row, self.column), row.question).score
                    for text in _texts(row)
                ]
            )
            for row in rows
        ]


def _texts(row: Drawn) -> tuple[str, ...]:
    if row.responses is None:
        raise DataError(f"row {row.id!r}: its responses are images, and this judge reads texts")
    return row.responses


def _truth(row: Drawn, column: str) -> str:
    value = row.columns.get(column)
    if not isinstance(value, str | int | float) or not str(value).strip():
        raise DataError(
            f"row {row.id!r}: has no true answer in the column {column!r}; it has "
            f"{', '.join(sorted(row.columns)) or 'no other columns'}"
        )
    return str(value)
