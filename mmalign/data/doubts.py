"""What is doubtful about rows that can be read: the same words before a run and in a check.

Each kind is one line with its count and the first place. Rows are compared by hashes, so memory
does not grow with the length of texts.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mmalign.data.counted import Counted
from mmalign.data.example import as_text, normalised
from mmalign.data.fields import show
from mmalign.data.leakage import Leakage
from mmalign.data.unread import Unread
from mmalign.data.verdicts import contradictions
from mmalign.data.written import of_a_converter, role_before, same_words, special_mark

if TYPE_CHECKING:
    from mmalign.data.example import Candidate, Example, Prompt
    from mmalign.data.records import Record

HEAVY = 100.0
"""A weight above this many times the median is named."""
SHORTEST_REPEAT = 20  # characters of a prompt; an answer may well begin with a shorter one
FEWEST_EQUAL = 5  # rows; fewer may have one same answer by chance
MOSTLY = 0.5  # of the rows, from which on a way of writing is no row's own


class Doubts:
    """Takes in every row as it is read; `lines` says what is in doubt."""

    def __init__(self) -> None:
        self.num_rows = 0
        self.num_pairs = 0
        self.leakage = Leakage()  # of the rows that it is given
        self.unread = Unread()
        self._groups: dict[str, Counted] = {}
        self._of_pairs: set[str] = set()
        self._roles = Counted("answers that begin with a role, as in a transcript", "")
        self._turned: dict[str, dict[str, int]] = {}  # file -> what prefers rejected -> pairs
        self._pairs_of: dict[str, int] = {}  # file -> pairs
        self._first: dict[int, str] = {}  # hash of a row -> its place
        self._rated: dict[int, tuple[bool, str]] = {}  # hash of a single response -> its rating
        self._same: dict[str, _Same] = {}
        self._weights = array("d")
        self._heaviest = (0.0, "")

    def add(self, record: Record, source: str, *, held_out: bool = False) -> None:
        """Take in one row of a file. What is held out repeats what is trained on as leakage."""
        row = record.example
        if row is None:
            return
        self.num_rows += 1
        self.unread.add(source, record.unread)
        if row.kind == "pair":
            self.num_pairs += 1
            self._pairs_of[source] = self._pairs_of.get(source, 0) + 1
        if record.turned:
            reasons = self._turned.setdefault(source, {})
            reasons[record.turned] = reasons.get(record.turned, 0) + 1
        told = contradictions(record.raw, record.value, row, turned=bool(record.turned))
        for what, found in told.items():
            self.note(record, what, found)
        self._weigh(record, row.weight)
        self._read(record, row, held_out)

    def note(self, record: Record, what: str, found: str = "", *, of_pairs: bool = False) -> None:
        """One row with a thing in doubt, and what was found."""
        group = self._groups.get(what)
        if group is None:
            name = f" (id {record.id!r})" if record.id != record.place else ""
            after = f": {found}" if found else ""
            group = self._groups[what] = Counted(what, f"{record.place}{name}{after}")
        if of_pairs:
            self._of_pairs.add(what)
        if group.places[-1:] != [record.place]:  # both answers of a row are one row
            group.places.append(record.place)

    def lines(self, show_places: int = 0) -> list[str]:
        """One line for each thing in doubt."""
        lines = [*self.unread.lines(), *self._turned_lines()]
        for what, group in self._groups.items():
            of_pairs = what in self._of_pairs
            total, unit = (self.num_pairs, "pairs") if of_pairs else (self.num_rows, "rows")
            lines.append(group.line(total, unit, show_places))
        if len(self._roles.places) >= max(FEWEST_EQUAL, MOSTLY * self.num_rows):
            lines.append(self._roles.line(self.num_rows, "rows", show_places))
        lines += [*self._same_lines(), *self._weight_lines()]
        return lines + self.leakage.lines(show_places)

    def _turned_lines(self) -> list[str]:
        lines: list[str] = []
        for source, reasons in self._turned.items():
            count, total = sum(reasons.values()), self._pairs_of[source]
            which = " or ".join(reasons)
            one = which in ("p_chosen", "agreement")
            lines.append(
                f"{count} of {total} pairs of {source} were turned round: their {which} "
                f"{'prefers' if one else 'prefer'} `rejected`"
            )
        return lines

    @property
    def all_weights_are_zero(self) -> bool:
        """Whether there are rows, and none has a weight: nothing would be learned from them."""
        return bool(self._weights) and self._heaviest[0] == 0.0

    def _weigh(self, record: Record, weight: float) -> None:
        self._weights.append(weight)
        if weight > self._heaviest[0]:
            self._heaviest = (weight, record.place)

    def _weight_lines(self) -> list[str]:
        weights = np.frombuffer(self._weights) if self._weights else np.zeros(0)
        positive = weights[weights > 0]
        usual = float(np.median(positive)) if positive.size else 0.0
        heavy, none = int((positive > HEAVY * usual).sum()), weights.size - positive.size
        lines: list[str] = []
        if none and positive.size:
            lines.append(f"rows of weight 0, of which nothing is learned: {none} of {weights.size}")
        if not heavy:
            return lines
        weight, place = self._heaviest
        return [
            *lines,
            f"weights above {HEAVY:g} times the median of {usual:g}: {heavy} of {self.num_rows} "
            f"rows; the highest is {weight:g} at {place}",
        ]

    def _read(self, record: Record, row: Example, held_out: bool) -> None:
        """Compare the texts of a row with each other and with those of earlier rows."""
        rated = row.candidates[: row.num_rated]
        prompt = (normalised(row.prompt), row.media, row.template)
        asked = prompt[0] if isinstance(row.prompt, str) else normalised(_last(row.prompt))
        names = ("chosen", "rejected") if row.kind == "pair" else ("response",) * len(rated)
        answers: list[tuple[str, int]] = []
        for name, candidate in zip(names, rated, strict=True):
            text = normalised(candidate.response)
            own = asked if candidate.prompt is None else normalised(_last(candidate.prompt))
            if len(own) >= SHORTEST_REPEAT and _said(candidate, text).startswith(own):
                self.note(record, "answers that repeat their prompt", name)
            mark = special_mark(candidate)
            if mark:
                what = "special tokens written in answers"
                self.note(record, what, f"{mark} in {name}")
            for what, found in of_a_converter(candidate).items():
                self.note(record, what, f"{found} in {name}")
            if role := role_before(candidate):
                self._roles.first = self._roles.first or f"{record.place}: {role}"
                if self._roles.places[-1:] != [record.place]:
                    self._roles.places.append(record.place)
            shown = None if candidate.prompt is None else normalised(candidate.prompt)
            answers.append((text, hash((text, shown, candidate.media))))
        if row.kind == "pair":
            self._compare_sides(record, row, answers[0][1] == answers[1][1])
        if not row.files() and all(c.prompt is None for c in row.candidates):
            same = self._same.setdefault("prompt", _Same(prompt[0], as_text(row.prompt)))
            same.add(prompt[0], answers[0][0] if answers else "")
        if row.kind != "list":
            for name, candidate, (text, _) in zip(names, rated, answers, strict=True):
                if text:  # what is trained on prompts alone has none
                    same = self._same.setdefault(name, _Same(text, as_text(candidate.response)))
                    same.add(text, prompt[0])
        self._compare(record, row, hash((prompt, held_out)), [key for _, key in answers])

    def _compare_sides(self, record: Record, row: Example, equal: bool) -> None:
        """Whether the two sides of a pair say the same."""
        first, second = row.candidates[:2]
        if equal:
            what = "chosen equal to rejected but for white space and case"
            self.note(record, what, of_pairs=True)
        elif isinstance(first.response, str | tuple):
            alike = (first.prompt, first.media) == (second.prompt, second.media)
            if alike and same_words(first.response, second.response):
                what = "chosen equal to rejected but for punctuation and marks that are not seen"
                self.note(record, what, of_pairs=True)

    def _compare(self, record: Record, row: Example, prompt: int, answers: list[int]) -> None:
        key, reverse = hash((prompt, *answers)), hash((prompt, *reversed(answers)))
        earlier, other = self._first.get(key), self._first.get(reverse)
        if row.kind == "unpaired":
            rating, place = self._rated.setdefault(key, (bool(row.labels[0]), record.place))
            if rating != bool(row.labels[0]):
                what = "responses rated otherwise than in an earlier row"
                self.note(record, what, f"the other is {place}")
                return
        if earlier is not None and earlier != record.place:
            self.note(record, "rows that repeat an earlier one", f"it repeats {earlier}")
        elif row.kind == "pair" and not row.is_tie and other not in (None, record.place):
            what = "pairs that contradict an earlier one, which prefers the other response"
            self.note(record, what, f"the other is {other}", of_pairs=True)
        self._first.setdefault(key, record.place)

    def _same_lines(self) -> list[str]:
        return [
            f"one same {name} in all {same.count} rows: {show(same.shown)}"
            for name, same in self._same.items()
            if same.everywhere and same.prompts_differ and same.count >= FEWEST_EQUAL
        ]


@dataclass(slots=True)
class _Same:
    """Whether all rows have one same answer to different prompts, or one prompt for all answers."""

    text: str
    shown: str  # as it was written
    count: int = 0
    prompt: str | None = None
    everywhere: bool = True
    prompts_differ: bool = False

    def add(self, text: str, prompt: str) -> None:
        self.count += 1
        self.everywhere = self.everywhere and text == self.text
        if self.prompt is None:
            self.prompt = prompt
        self.prompts_differ = self.prompts_differ or prompt != self.prompt


def _last(prompt: Prompt) -> str:
    """What the last turn of a prompt says."""
    return prompt if isinstance(prompt, str) else prompt[-1].content if prompt else ""


def _said(candidate: Candidate, text: str) -> str:
    """The normalised words of a response without the role before them."""
    response = candidate.response
    return normalised(response[0].content) if isinstance(response, tuple) else text
