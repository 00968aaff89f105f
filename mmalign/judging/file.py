"""Verdicts of a file: of people, or of any judge that runs elsewhere."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmalign.data.files import read_rows
from mmalign.data.select import win_rate
from mmalign.errors import DataError
from mmalign.judging.base import NAN, Drawn, Verdict, matrix, numbers


class Filed:
    """Rewards or win probabilities of a JSONL file, by the rows' ids.

    A line has `id` and `rewards`, one a candidate in the order of the file that is judged, or
    `wins`, [K][K] probabilities that one is preferred to another; null: not judged.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        """Read the file.

        Raises:
            DataError: A line without an id or a verdict, or two of one id.
        """
        self.path, self.name = path, name or str(path)
        self._known: dict[str, tuple[str, dict[str, Any]]] = {}
        for row in read_rows(path):
            value = row.value or {}
            if value.get("id") is None:
                raise DataError(f"{row.place}: {row.problem or 'has no `id`'}")
            key = str(value["id"])
            if ("rewards" in value) == ("wins" in value):
                raise DataError(f"{row.place}: needs either `rewards` or `wins`")
            if key in self._known:
                raise DataError(f"{row.place}: the id {key!r} is also at {self._known[key][0]}")
            self._known[key] = (row.place, value)

    def facts(self) -> dict[str, Any]:
        """The file's content."""
        return {"file": hashlib.sha256(self.path.read_bytes()).hexdigest()}

    def __call__(self, rows: Sequence[Drawn]) -> list[Verdict]:
        """The verdicts under the rows' ids; a row without one is lost and counted.

        Raises:
            DataError: A verdict of another number of candidates; its line is named.
        """
        return [self._verdict(row) for row in rows]

    def _verdict(self, row: Drawn) -> Verdict:
        size = len(row.candidates)
        if row.id not in self._known:
            return Verdict([NAN] * size, note=f"{self.path} has no verdict")
        place, value = self._known[row.id]
        try:
            if "rewards" in value:
                given = numbers(value["rewards"], row.size, "rewards")
                return _of(Verdict([given[k] for k in row.places]), self.path)
            wins = matrix(value["wins"], row.size)
        except DataError as error:
            raise DataError(f"{place}: {error}") from error
        own = [[0.5 if i == j else wins[i][j] for j in row.places] for i in row.places]
        rates = win_rate(own).tolist() if size > 1 else [NAN]
        return _of(Verdict(rates, own), self.path)


def _of(verdict: Verdict, path: Path) -> Verdict:
    if any(reward == reward for reward in verdict.rewards):
        return verdict
    return Verdict(verdict.rewards, verdict.wins, f"{path} judges none of its responses")
