"""What is doubtful about rows that can be read: the same words before a run and in a check."""

from __future__ import annotations

import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from operator import eq
from pathlib import Path
from typing import Any

import numpy as np

from mmalign.data.convert import Unread
from mmalign.data.example import Candidate, Example, Message, Picture, Prompt, as_text, normalised
from mmalign.data.fields import as_list, number, show
from mmalign.data.layouts import CHOICES
from mmalign.data.media_layouts import CHOICES as PICTURE_CHOICES
from mmalign.data.media_layouts import HIGHER, LOWER, ends_of, side_of
from mmalign.data.records import Record

Response = str | Path | Picture | tuple[Message, ...]


@dataclass(slots=True)
class Counted:
    """Rows of which one thing is told."""

    what: str
    first: str  # its place, id, and what was found there
    places: list[str] = field(default_factory=list[str])
    of_pairs: bool = False  # counted among pairs, and not among all rows

    def line(self, total: int, unit: str, show_places: int) -> str:
        """What, how many, and where the first is; then the places of a few more."""
        return f"{self.what}: {len(self.places)} of {total} {unit}{self._where(show_places)}"

    def sentence(self, total: int, unit: str, show_places: int) -> str:
        """The same with the count first, where `what` goes on from it."""
        return f"{len(self.places)} of {total} {unit} {self.what}{self._where(show_places)}"

    def _where(self, show_places: int) -> str:
        text = f"; the first is {self.first}"
        more = [place.rpartition(":")[2] for place in self.places[1 : show_places + 1]]
        if more:
            rest = ", ..." if len(self.places) > show_places + 1 else ""
            text += f"; then {', '.join(more)}{rest}"
        return text


_WITH_ANSWERS = "have a prompt that is also trained on, with its responses"
_PROMPTS = "have a prompt that is also trained on"
_SHOWN = "show a clip, image or sound that is also trained on"


class Leakage:
    """Evaluation rows that are trained on too. Rows come in any order, texts are kept as hashes."""

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


_MARK = re.compile(
    r"<\|[A-Za-z][\w ]{0,40}\|>|<｜[^<>｜]{1,40}｜>|</s>|<(?:start|end)_of_turn>|<(?:bos|eos|pad)>"
    r"|\[/?INST\]|<<SYS>>"
)
"""Special tokens of well-known tokenizers and templates, as text."""
_ROLE = re.compile(r"\s*(?:assistant|human|user|gpt|chatgpt|bot|ai)\s*:", re.IGNORECASE)
_NEXT_TURN = re.compile(r"\n\n(?:Human|User): ")
_NOTHING = frozenset({"nan", "null", "<na>", "undefined", "[object object]"})
_AT_AN_END = re.compile(r"(?<!\w)[*_#`]+|(?<!_)[*_#`]+(?!\w)|[\"'“”‘’«»]|[.,;:!?…]+(?!\w)")


def special_mark(candidate: Candidate) -> str:
    """The first special token that is written in a response; "" where there is none."""
    for text in _words(candidate.response):
        if found := special_mark_of(text):
            return found
    return ""


def special_mark_of(text: str) -> str:
    """The first special token that is written in a text; "" where there is none."""
    found = _MARK.search(text) if "<" in text or "[" in text else None
    # Beside its opening tag it is HTML's way to strike text out.
    return found[0] if found and not (found[0] == "</s>" and "<s>" in text[1:]) else ""


def of_a_converter(candidate: Candidate) -> dict[str, str]:
    """What a response says that its writer did not: a phrase for each kind, and what was found."""
    found: dict[str, str] = {}
    for text in _words(candidate.response):
        if text.strip().casefold() in _NOTHING:
            found["answers that say nothing but an empty cell of a table"] = text.strip()
        if turn := _NEXT_TURN.search(text):
            found["answers in which the user speaks again"] = turn[0].strip()
    return found


def role_before(candidate: Candidate) -> str:
    """The role that a response begins with, as a transcript would: `Assistant:`; "" for none."""
    first = next(iter(_words(candidate.response)), "")
    found = _ROLE.match(first)
    return found[0].strip() if found else ""


def bare(response: Response) -> str:
    """The normalized words without marks of punctuation or markup at a word's end, or unseen ones.

    Marks between two letters or digits stay, and signs that calculate or call: `3.5` is not `35`.
    """
    return _words_of(_seen(response))


def same_words(one: Response, other: Response) -> bool:
    """Whether two responses have the same `bare` words, and any.

    Letters are compared first: they tell nearly all pairs apart at once, and marks take far longer.
    """
    left, right = _seen(one), _seen(other)
    if not all(map(eq, filter(str.isalnum, left), filter(str.isalnum, right))):
        return False
    words = _words_of(left)
    return bool(words) and words == _words_of(right)


def _seen(response: Response) -> str:
    """The normalized text without characters that are not seen."""
    text = as_text(response)
    for character in set(text):  # far fewer than there are characters
        if unicodedata.category(character) == "Cf":
            text = text.replace(character, "")
    return normalised(text)


def _words_of(text: str) -> str:
    return " ".join(_AT_AN_END.sub(" ", text).split())


def _words(response: Response) -> list[str]:
    if isinstance(response, str):
        return [response]
    return [turn.content for turn in response] if isinstance(response, tuple) else []


_WINNERS = ("winner", "better_response_id", "label")
_RATINGS = ("desirable", "label", "kto_tag")
_SCORES = ("scores", "ratings", "human_preference")
_RANKS = ("ranks", "rank")


def contradictions(
    raw: Mapping[str, Any], record: Mapping[str, Any], row: Example, *, turned: bool = False
) -> dict[str, str]:
    """What disagrees about the better response: a phrase for each kind, and what was found.

    Readers follow one column of those that name it. The others are carried along unread, so a row
    may say two things at once: scores that prefer `rejected`, a `better_response_id` beside another
    `winner`.

    Args:
        raw: The row as its file has it, in any layout.
        record: The canonical record made of it, the better response first.
        row: The same as it is trained on.
        turned: Whether `chosen` of the file has become `rejected`.
    """
    if row.kind == "list":
        return _ranks_against_scores(raw)
    if row.kind != "pair":
        return _two_ratings(raw)
    numbers = _against_tie(record) if row.is_tie else _against_order(record)
    return numbers | _two_winners(raw, -1 if row.is_tie else int(turned))


def _against_tie(record: Mapping[str, Any]) -> dict[str, str]:
    """A tie whose votes or probability name a winner. Most votes for a tie make it one."""
    if record.get("tie") is not True:
        return {}
    for key in ("p_chosen", "agreement"):
        if number(record.get(key)) not in (None, 0.5):
            return {f"tie beside another {key}": f"{record[key]}"}
    votes = [number(record.get(f"votes_{side}")) or 0.0 for side in ("chosen", "rejected", "tie")]
    if votes[0] != votes[1] and max(votes[:2]) > votes[2]:
        shown = " to ".join(f"{count:g}" for count in votes[:2])
        return {"tie beside votes for one of the two": f"{shown}, and {votes[2]:g} for a tie"}
    return {}


def _against_order(record: Mapping[str, Any]) -> dict[str, str]:
    """Numbers of the two responses that do not say that the chosen one is the better."""
    found: dict[str, str] = {}
    for better, worse, lower in _numbered(frozenset(record)):
        first, second = number(record[better]), number(record[worse])
        if first is None or second is None or (first < second if lower else first > second):
            continue
        shown = f"{first:g} and {second:g}"
        says = "equal to" if first == second else "above" if lower else "below"
        found[f"{better} {says} {worse}, where chosen counts as the better one"] = shown
    return found


@cache
def _numbered(columns: frozenset[str]) -> tuple[tuple[str, str, bool], ...]:
    """Pairs of columns that hold a number of each response, and whether a lower one is better."""
    names = [
        (form.format(stem, "chosen"), form.format(stem, "rejected"), stem in LOWER)
        for stem in (*HIGHER, *LOWER)
        for form in ("{0}_{1}", "{1}_{0}", "{0}-{1}", "{1}-{0}")
    ]
    return tuple((one, other, low) for one, other, low in names if {one, other} <= columns)


def _two_winners(raw: Mapping[str, Any], won: int) -> dict[str, str]:
    """Columns that name different winners of one comparison; `won` is that of chosen, rejected."""
    names = _compared(frozenset(key for key, value in raw.items() if value is not None))
    if names is None:
        return {}
    if names[1].endswith("rejected") and not any(k == "winner" or "label_" in k for k in raw):
        return {}  # by far the most rows
    sides: dict[str, int | None] = {}  # what is followed comes first
    shares: dict[str, int | None] = {}
    for ends in dict.fromkeys((*ends_of(names), ("0", "1"))):
        keys = [f"label_{end}" for end in ends]
        shares[" and ".join(keys)] = _higher(*(number(raw.get(key)) for key in keys))
    if names in PICTURE_CHOICES:
        sides |= shares
    if names[1].endswith("rejected"):
        sides["the order of chosen and rejected"] = won
        if str(raw.get("winner")) in names:
            sides["winner"] = side_of(raw["winner"], names)
    else:
        sides |= {key: side_of(raw[key], names) for key in _WINNERS if raw.get(key) is not None}
        sides |= {"tie": -1} if raw.get("tie") is True else {}
    told = [(key, side) for key, side in (sides | shares).items() if side is not None]
    for key, side in told[1:]:
        if side != told[0][1]:
            return {f"{told[0][0]}, followed, against {key}": ""}
    return {}


def _higher(first: float | None, second: float | None) -> int | None:
    """Which of two numbers is the higher, 0 or 1; -1 where they are equal."""
    if first is None or second is None:
        return None
    return -1 if first == second else int(second > first)


@cache
def _compared(columns: frozenset[str]) -> tuple[str, str] | None:
    """The columns of the two responses of a row."""
    pairs = (*CHOICES, *PICTURE_CHOICES, ("chosen", "rejected"), ("image_chosen", "image_rejected"))
    return next((names for names in pairs if set(names) <= columns), None)


def _ranks_against_scores(raw: Mapping[str, Any]) -> dict[str, str]:
    """Both given for the responses of a list, in different orders."""
    scores, ranks = _numbers(raw, _SCORES), _numbers(raw, _RANKS)
    if not scores or len(scores) != len(ranks) or None in scores or None in ranks:
        return {}
    both = ((s or 0.0, r or 0.0) for s, r in zip(scores, ranks, strict=True))
    pairs = sorted(both, reverse=True)
    if any(s > t and r > q for (s, r), (t, q) in pairwise(pairs)):
        return {"ranks in another order than the scores": ""}
    return {}


def _numbers(raw: Mapping[str, Any], names: tuple[str, ...]) -> list[float | None]:
    """The numbers of a list under the first of the names that is there."""
    found = next((as_list(raw[name]) for name in names if raw.get(name) is not None), None)
    return [number(value) for value in found or []]


def _two_ratings(raw: Mapping[str, Any]) -> dict[str, str]:
    """`desirable`, `label` and `kto_tag` of one response that differ."""
    given = {key: raw[key] for key in _RATINGS if isinstance(raw.get(key), bool | int)}
    for key, value in list(given.items())[1:]:
        first = next(iter(given))
        if bool(value) != bool(given[first]):
            return {f"{first} and {key} that differ": f"{given[first]} and {value}"}
    return {}


HEAVY = 100.0
"""A weight above this many times the median is named."""
SHORTEST_REPEAT = 20  # characters of a prompt; an answer may well begin with a shorter one
FEWEST_EQUAL = 5  # rows; fewer may have one same answer by chance
MOSTLY = 0.5  # of the rows, from which on a way of writing is no row's own
_ROLES = "answers that begin with a role, as in a transcript"


class Doubts:
    """Takes in every row as it is read; `lines` says what is in doubt.

    Rows are compared by hashes, so memory does not grow with the length of texts.
    """

    def __init__(self) -> None:
        self.num_rows = 0
        self.leakage = Leakage()  # of the rows that it is given
        self.unread = Unread()
        self._groups: dict[str, Counted] = {}
        self._turned: dict[str, Counter[str]] = {}  # file -> what prefers rejected -> pairs
        self._pairs_of: Counter[str] = Counter()  # file -> pairs
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
        self._pairs_of[source] += row.kind == "pair"
        if record.turned:
            self._turned.setdefault(source, Counter())[record.turned] += 1
        told = contradictions(record.raw, record.value, row, turned=bool(record.turned))
        for what, found in told.items():
            self.note(record, what, found)
        self._weights.append(row.weight)
        if row.weight > self._heaviest[0]:
            self._heaviest = (row.weight, record.place)
        self._read(record, row, held_out)

    def note(self, record: Record, what: str, found: str = "", *, of_pairs: bool = False) -> None:
        """One row with a thing in doubt, and what was found."""
        group = self._groups.get(what)
        if group is None:
            name = f" (id {record.id!r})" if record.id != record.place else ""
            after = f": {found}" if found else ""
            group = Counted(what, f"{record.place}{name}{after}", of_pairs=of_pairs)
            self._groups[what] = group
        if group.places[-1:] != [record.place]:  # both answers of a row are one row
            group.places.append(record.place)

    def lines(self, show_places: int = 0) -> list[str]:
        """One line for each thing in doubt."""
        lines = [*self.unread.lines(), *self._turned_lines()]
        pairs, rows = (self._pairs_of.total(), "pairs"), (self.num_rows, "rows")
        for what, group in self._groups.items():
            few = len(group.places) < max(FEWEST_EQUAL, MOSTLY * self.num_rows)
            if what != _ROLES or not few:
                lines.append(group.line(*(pairs if group.of_pairs else rows), show_places))
        lines += [
            f"one same {name} in all {same.count} rows: {show(same.shown)}"
            for name, same in self._same.items()
            if len(same.texts) == 1 and len(same.prompts) > 1 and same.count >= FEWEST_EQUAL
        ]
        return [*lines, *self._weight_lines(), *self.leakage.lines(show_places)]

    def _turned_lines(self) -> list[str]:
        lines: list[str] = []
        for source, reasons in self._turned.items():
            which = " or ".join(reasons)
            verb = "prefers" if which in ("p_chosen", "agreement") else "prefer"
            count = f"{reasons.total()} of {self._pairs_of[source]} pairs"
            lines.append(f"{count} of {source} were turned round: their {which} {verb} `rejected`")
        return lines

    @property
    def all_weights_are_zero(self) -> bool:
        """Whether there are rows, and none has a weight: nothing would be learned from them."""
        return bool(self._weights) and self._heaviest[0] == 0.0

    def _weight_lines(self) -> list[str]:
        weights = np.frombuffer(self._weights) if self._weights else np.zeros(0)
        positive = weights[weights > 0]
        usual = float(np.median(positive)) if positive.size else 0.0
        heavy, none = int((positive > HEAVY * usual).sum()), weights.size - positive.size
        lines: list[str] = []
        if none and positive.size:
            lines.append(f"rows of weight 0, of which nothing is learned: {none} of {weights.size}")
        if heavy:
            weight, place = self._heaviest
            lines.append(
                f"weights above {HEAVY:g} times the median of {usual:g}: {heavy} of "
                f"{self.num_rows} rows; the highest is {weight:g} at {place}"
            )
        return lines

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
            if mark := special_mark(candidate):
                self.note(record, "special tokens written in answers", f"{mark} in {name}")
            for what, found in of_a_converter(candidate).items():
                self.note(record, what, f"{found} in {name}")
            if role := role_before(candidate):
                self.note(record, _ROLES, role)
            shown = None if candidate.prompt is None else normalised(candidate.prompt)
            answers.append((text, hash((text, shown, candidate.media))))
        if row.kind == "pair":
            self._compare_sides(record, row, answers[0][1] == answers[1][1])
        if not row.files() and all(c.prompt is None for c in row.candidates):
            same = self._same.setdefault("prompt", _Same(as_text(row.prompt)))
            same.add(prompt[0], answers[0][0] if answers else "")
        if row.kind != "list":
            for name, candidate, (text, _) in zip(names, rated, answers, strict=True):
                if text:  # what is trained on prompts alone has none
                    same = self._same.setdefault(name, _Same(as_text(candidate.response)))
                    same.add(text, prompt[0])
        self._compare(record, row, hash((prompt, held_out)), [key for _, key in answers])

    def _compare_sides(self, record: Record, row: Example, equal: bool) -> None:
        """Whether the two sides of a pair say the same."""
        first, second = row.candidates[:2]
        alike = (first.prompt, first.media) == (second.prompt, second.media)
        words = alike and isinstance(first.response, str | tuple)
        if equal:
            what = "chosen equal to rejected but for white space and case"
            self.note(record, what, of_pairs=True)
        elif words and same_words(first.response, second.response):
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


@dataclass(slots=True)
class _Same:
    """Whether all rows have one same answer to different prompts, or one prompt for all answers."""

    shown: str  # as the first is written
    texts: set[int] = field(default_factory=set[int])  # hashes of at most two
    prompts: set[int] = field(default_factory=set[int])
    count: int = 0

    def add(self, text: str, prompt: str) -> None:
        self.count += 1
        for known, new in ((self.texts, text), (self.prompts, prompt)):
            if len(known) < 2:
                known.add(hash(new))


def _last(prompt: Prompt) -> str:
    """What the last turn of a prompt says."""
    return prompt if isinstance(prompt, str) else prompt[-1].content if prompt else ""


def _said(candidate: Candidate, text: str) -> str:
    """The normalized words of a response without the role before them."""
    response = candidate.response
    return normalised(response[0].content) if isinstance(response, tuple) else text
