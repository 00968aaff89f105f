"""Evaluation rows that are trained on too, told in the same words before a run and in a check."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmalign.data.counted import Counted
from mmalign.data.example import as_text, normalised

if TYPE_CHECKING:
    from pathlib import Path

    from mmalign.data.example import Example, Picture

_WITH_ANSWERS = "have a prompt that is also trained on, with its responses"
_PROMPTS = "have a prompt that is also trained on"
_SHOWN = "show a clip, picture or sound that is also trained on"


class Leakage:
    """Takes in rows of both parts, in any order. Texts are kept as hashes."""

    def __init__(self) -> None:
        self._prompts: set[int] = set()
        self._answered: set[int] = set()
        self._files: set[Path | Picture] = set()
        self._held_out: list[tuple[str, int, list[int], tuple[Path | Picture, ...]]] = []

    def add(self, row: Example, *, held_out: bool) -> None:
        """Take in one row."""
        prompt = hash((normalised(asked(row)), row.media))
        answered = [
            hash((prompt, as_text(candidate.response), candidate.media))
            for candidate in row.candidates[: row.num_rated]
            if candidate.response
        ]
        if held_out:
            self._held_out.append((row.id, prompt, answered, row.files()))
        else:
            self._prompts.add(prompt)
            self._answered.update(answered)
            self._files.update(row.files())

    def lines(self, show_places: int = 0) -> list[str]:
        """One line for each way in which evaluation rows are known from training."""
        groups: dict[str, Counted] = {}
        for identity, prompt, answered, files in self._held_out:
            what = ""
            if not self._answered.isdisjoint(answered):
                what = _WITH_ANSWERS
            elif prompt in self._prompts:
                what = _PROMPTS
            elif not self._files.isdisjoint(files):
                what = _SHOWN
            if what:
                groups.setdefault(what, Counted(what, identity)).places.append(identity)
        total = len(self._held_out)
        return [group.sentence(total, "evaluation rows", show_places) for group in groups.values()]


def asked(row: Example) -> str:
    """The prompt; that of the best candidate in a row whose candidates have their own."""
    return as_text(row.prompt or row.candidates[0].prompt or "")
