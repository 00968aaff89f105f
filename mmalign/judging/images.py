"""The scorers of images as judges: CLIP, PickScore, HPS, the aesthetic predictor, ImageReward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from mmalign.data.example import Picture
from mmalign.errors import DataError
from mmalign.judging.base import NAN, Drawn, Verdict


class Scored:
    """The published score of a scorer, in its own unit (PickScore's is about 20)."""

    def __init__(self, spec: str, name: str | None = None) -> None:
        """Find the scorer; its weights are loaded when there is something to judge.

        Args:
            spec: NAME, or NAME=DIR of local weights.
            name: Of the rewards; by default NAME.

        Raises:
            ConfigError: There is no such scorer.
        """
        from mmalign.diffusion.scorers import parse_scorer

        self._scorer_name, self._path = parse_scorer(spec)
        self.name = name or self._scorer_name

    def facts(self) -> dict[str, Any]:
        """The scorer and where its weights lie."""
        return {"scorer": self._scorer_name, "weights": self._path}

    def __call__(self, rows: Sequence[Drawn]) -> list[Verdict]:
        """A verdict a row; one with an image that cannot be read is lost, with the reason."""
        from mmalign.diffusion.scorers.files import Item, score_items

        items = [
            Item(n, _pictures(row), (row.question,) * len(row.candidates))
            for n, row in enumerate(rows)
        ]
        verdicts: list[Verdict] = []
        for part in score_items(items, {self.name: self._scorer}, len(items) or 1):
            for item, found in part:
                if isinstance(found, DataError):
                    verdicts.append(Verdict([NAN] * len(item.pictures), note=str(found)))
                else:
                    verdicts.append(Verdict(found[self.name]))
        return verdicts

    @cached_property
    def _scorer(self) -> Callable[..., Any]:
        from mmalign.diffusion.scorers import load_scorer

        return load_scorer(self._scorer_name, None if self._path is None else Path(self._path))


def _pictures(row: Drawn) -> tuple[Picture, ...]:
    if row.images is None:
        raise DataError(
            f"row {row.id!r}: its responses are texts; scorers of images do not read them"
        )
    return tuple(map(Picture, row.images))
