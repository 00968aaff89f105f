"""What a judge is given and what it says; rows of candidates as files hold them.

K responses of one prompt, texts or images. A judge never sees an empty response, nor two that are
identical: the one is nobody's winner and the others are one response.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from mmalign.data.convert import to_record
from mmalign.data.example import PREFERENCE, Example, Picture, other_side
from mmalign.data.fields import Problem, as_list, as_object, number, show
from mmalign.data.files import read_rows
from mmalign.data.parse import read_record
from mmalign.data.pictures import PictureRoot
from mmalign.data.records import ProblemList, Record, picture_root
from mmalign.errors import DataError

NAN = math.nan
FAILURES = ("unparsable", "refused", "timed out")
"""Verdicts that were asked for and cannot be had, as `Verdict.counts` names them."""

JUDGED = ("human", "rewards", "wins", "scores")
"""Keys of a judged row beside those of its candidates."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """One prompt and the responses to judge.

    Attributes:
        id: Of the row.
        prompt: A text, or a list of messages, as the file has it.
        columns: What else the row has, by name; `about` has an entry a response.
        responses: Texts; None where they are images.
        images: Files; None where the responses are texts.
        folder: Where paths in `columns` start, of images that are responses their own.
        places: Which of the row's candidates each response is.
        size: How many candidates the row has.
    """

    id: str
    prompt: Any
    columns: Mapping[str, Any] = field(default_factory=dict[str, Any])
    responses: tuple[str, ...] | None = None
    images: tuple[Path, ...] | None = None
    folder: Path = Path()
    places: tuple[int, ...] = ()
    size: int = 0

    @property
    def candidates(self) -> tuple[str, ...] | tuple[Path, ...]:
        """The responses, whatever they are."""
        return self.images or () if self.responses is None else self.responses

    @property
    def question(self) -> str:
        """The prompt as one text, with the roles of a conversation."""
        if isinstance(self.prompt, str):
            return self.prompt
        turns = [as_object(turn) or {} for turn in as_list(self.prompt) or ()]
        return "\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in turns)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a judge says of the K responses of a row.

    Attributes:
        rewards: K numbers, more is better; nan where a response is not judged.
        wins: [K][K], entry (i, j) the probability that i is preferred to j, nan where nobody
            compared them; None: the judge gives rewards alone.
        note: Why nothing could be judged; "" where something was.
        by: The rewards by name of the judges that this one is made of.
        counts: What is to be added up over rows and said, e.g. verdicts that could not be read.
    """

    rewards: Sequence[float]
    wins: Sequence[Sequence[float]] | None = None
    note: str = ""
    by: Mapping[str, Sequence[float]] = field(default_factory=dict[str, "Sequence[float]"])
    counts: Mapping[str, int] = field(default_factory=dict[str, int])


class Judge(Protocol):
    """Says how good responses are."""

    @property
    def name(self) -> str:
        """What its rewards are called in judged rows."""
        ...

    def facts(self) -> dict[str, Any]:
        """What its verdicts depend on, as JSON: those of two judges are never mixed."""
        ...

    def __call__(self, rows: Sequence[Drawn]) -> list[Verdict]:
        """A verdict a row, each of as many rewards as the row has responses.

        Raises:
            MmalignError: Nothing can be judged: a server is away, a rule fails.
        """
        ...


@runtime_checkable
class Settles(Protocol):
    """A judge whose rewards depend on all rows of a file."""

    def settle(self, verdicts: Sequence[Verdict]) -> list[Verdict]:
        """The verdicts of all rows, from those of the rows in parts."""
        ...

    def chosen(self, verdicts: Sequence[Verdict]) -> str:
        """What all rows have decided, for people."""
        ...


@dataclass(frozen=True, slots=True)
class Row:
    """A row of candidates: its line, and its responses as judges see them.

    Attributes:
        id: Of the row.
        line: What a judged line takes over; `responses` or `images`, and `human` where the file
            says which is better.
        size: K, the number of candidates.
        drawn: The different responses that are not empty; None where there are none.
        same: For each candidate its place among those; None for an empty one.
    """

    id: str
    line: Mapping[str, Any]
    size: int
    drawn: Drawn | None
    same: tuple[int | None, ...]

    def unfolded(self, verdict: Verdict) -> Verdict:
        """A verdict of the different responses as one of all K candidates."""

        def spread(values: Sequence[float]) -> list[float]:
            return [NAN if at is None else float(values[at]) for at in self.same]

        wins = verdict.wins
        if wins is not None:
            wins = [
                [
                    NAN if a is None or b is None else 0.5 if a == b else wins[a][b]
                    for b in self.same
                ]
                for a in self.same
            ]
        by = {name: spread(values) for name, values in verdict.by.items()}
        return Verdict(spread(verdict.rewards), wins, verdict.note, by, verdict.counts)


def read_candidates(path: Path, pictures: Path | None = None) -> list[Row]:
    """The rows of a file of candidates: one a prompt with `responses` or `images`.

    Pairs and ranked lists in any known layout are read too: the two sides are the candidates, and
    what the file says of them becomes `human`.

    Args:
        path: The file; images that are responses start from its folder.
        pictures: Where paths of what prompts show start; None: the file's folder.

    Raises:
        DataError: The file holds no rows, or some that cannot be read; all problems are named.
    """
    problems = ProblemList()
    rows: list[Row] = []
    first: dict[str, str] = {}
    root = picture_root(path, pictures)
    for found in read_rows(path):
        value = found.value or {}
        try:
            if found.value is None:
                raise DataError(found.problem)
            line = _candidates(value) if _is_drawn(value) else _unlabelled(value, root, found.place)
            row = _row(line, path, found.place, pictures)
            if row.id in first:
                raise DataError(f"the id {row.id!r} is also at {first[row.id]}")
            first[row.id] = found.place
            rows.append(row)
        except DataError as error:
            name = str(value.get("id", found.place))
            problems.add(Record(found.place, name, "", None), Problem(str(error)))
    if problems.groups:
        raise DataError(
            f"{problems.summary()} {problems.num_records} rows of {path} are not judged"
        )
    if not rows:
        raise DataError(f"{path}: holds no rows")
    return rows


def _is_drawn(value: Mapping[str, Any]) -> bool:
    """Whether a line is one of candidates; a list with scores is a ranked one of the data."""
    listed = any(as_list(value.get(key)) is not None for key in ("responses", "images"))
    return listed and "prompt" in value and ("scores" not in value or "rewards" in value)


def _candidates(value: Mapping[str, Any]) -> dict[str, Any]:
    """A line of candidates, without what an earlier judge said."""
    return {key: item for key, item in value.items() if key not in ("rewards", "wins", "scores")}


def _unlabelled(value: Mapping[str, Any], root: PictureRoot, place: str) -> dict[str, Any]:
    """A record with labels as a line of candidates; the labels are `human`."""
    record = to_record(value)
    example, problems = read_record(record, where=place, root=root)
    if example is None:
        raise DataError("; ".join(map(str, problems)))
    own = ("response", "responses", "scores", "desirable", "cut", "spans", "steps", *PREFERENCE)
    rest = {k: v for k, v in record.items() if k not in own and other_side(k, record) == k}
    if example.kind != "pair":
        rest = {k: v for k, v in record.items() if k not in own}
    if any(isinstance(one.response, Picture) for one in example.candidates):
        rest = {k: v for k, v in rest.items() if k not in ("image", "images")}
    return {**rest, **_responses(example, root)}


def _responses(example: Example, root: PictureRoot) -> dict[str, Any]:
    rated = example.candidates[: example.num_rated]
    if any(one.prompt is not None or one.media is not None for one in rated):
        raise DataError("its responses have prompts or media of their own, which judges do not see")
    human = {} if example.kind == "plain" else {"human": list(example.labels[: len(rated)])}
    pictures = [one.response for one in rated if isinstance(one.response, Picture)]
    if pictures:
        if any(picture.row >= 0 for picture in pictures) or root.folder is None:
            raise DataError("its images are cells of a table; give them as files")
        return {"images": [_below(p.path, Path(root.folder)) for p in pictures], **human}
    texts = [_text(one.response) for one in rated]
    beside = {
        "cut": [not one.complete for one in rated],
        "spans": [[list(span) for span in one.spans] for one in rated],
        "steps": [[list(step) for step in one.steps] for one in rated],
    }
    return {"responses": texts, **human, **{k: v for k, v in beside.items() if any(v)}}


def _text(response: Any) -> str:
    if isinstance(response, tuple) and len(response) == 1:
        return response[0].content
    if not isinstance(response, str):
        raise DataError("a response has several turns; judges read one")
    return response


def _below(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix() if file.is_relative_to(folder) else str(file)


def _row(line: Mapping[str, Any], path: Path, place: str, pictures: Path | None = None) -> Row:
    key = "responses" if as_list(line.get("responses")) is not None else "images"
    given = as_list(line.get(key)) or []
    if not given or not all(isinstance(one, str) for one in given):
        raise DataError(
            f"{key} must be a list of texts that is not empty, but is {show(line.get(key))}"
        )
    root = PictureRoot(path.parent) if key == "images" else None
    for found in (root.find(one, absent=True) for one in given if root and one.strip()):
        if isinstance(found, Problem):  # the file may be a stranger's
            raise DataError(f"images {found}")
    about = as_list(line.get("about"))
    if "about" in line and (about is None or len(about) != len(given)):
        raise DataError(f"about must have an entry for each of the {len(given)} {key}")
    human = as_list(line.get("human"))
    if "human" in line and (human is None or len(human) != len(given)):
        raise DataError(f"human must have a number for each of the {len(given)} {key}")
    if human is not None and any(one is not None and number(one) is None for one in human):
        raise DataError(f"human must hold finite numbers or null, but is {show(human)}")
    first: dict[str, int] = {}
    for text in given:
        if text.strip():
            first.setdefault(text, len(first))
    places = tuple(given.index(text) for text in first)
    identity = line.get("id")
    name = Path(place).name if identity is None else str(identity)
    columns = {k: v for k, v in line.items() if k not in ("id", "prompt", key, *JUDGED)}
    if about is not None:
        columns["about"] = [about[place] for place in places]
    drawn = Drawn(
        id=name,
        prompt=line.get("prompt"),
        columns=columns,
        responses=tuple(first) if key == "responses" else None,
        images=tuple(path.parent / one for one in first) if key == "images" else None,
        folder=path.parent if pictures is None or key == "images" else pictures,
        places=places,
        size=len(given),
    )
    same = tuple(first.get(text) for text in given)
    return Row(name, {"id": name, **line}, len(given), drawn if first else None, same)


def judged_line(row: Row, verdict: Verdict, name: str) -> dict[str, Any]:
    """A row with its rewards by judge, `wins` where there are any, and `scores`; null: unjudged."""
    by = verdict.by or {name: verdict.rewards}
    wins = verdict.wins
    return {
        **row.line,
        "rewards": {judge: list(map(_or_null, values)) for judge, values in by.items()},
        **({} if wins is None else {"wins": [list(map(_or_null, own)) for own in wins]}),
        "scores": list(map(_or_null, verdict.rewards)),
    }


def _or_null(value: float) -> float | None:
    return None if math.isnan(value) else value


@dataclass(frozen=True, slots=True)
class Judged:
    """A judged line as selectors read it: a row of K candidates.

    Attributes:
        row: The candidates.
        scores: [K], nan where a response is not judged.
        wins: [K][K] or None; nan where nobody compared two.
        rewards: [K] by judge.
        cut: Whether each response was cut off.
    """

    row: Row
    scores: tuple[float, ...]
    wins: tuple[tuple[float, ...], ...] | None
    rewards: Mapping[str, tuple[float, ...]]
    cut: tuple[bool, ...]


def read_judged(path: Path) -> Iterator[Judged]:
    """The rows of a judged file, in order.

    Raises:
        DataError: A row is not judged, or its numbers do not fit its responses.
    """
    found = False
    for raw in read_rows(path):
        found = True
        try:
            if raw.value is None:
                raise DataError(raw.problem)
            yield _judged(raw.value, path, raw.place)
        except DataError as error:
            raise DataError(f"{raw.place}: {error}") from error
    if not found:
        raise DataError(f"{path}: holds no rows")


def _judged(value: Mapping[str, Any], path: Path, place: str) -> Judged:
    if "scores" not in value or "rewards" not in value:
        raise DataError(
            "has no `rewards` and `scores`; judge the file first with `data score --by`"
        )
    row = _row(_candidates(value), path, place)
    rewards = as_object(value["rewards"])
    if rewards is None:
        raise DataError(f"rewards must be numbers by judge, but is {show(value['rewards'])}")
    wins = value.get("wins")
    about = [as_object(one) or {} for one in as_list(value.get("about")) or [{}] * row.size]
    listed = as_list(value.get("cut")) or [False] * row.size
    if len(listed) != row.size:
        raise DataError(f"cut must have an entry for each of the {row.size} responses")
    return Judged(
        row,
        numbers(value["scores"], row.size, "scores"),
        None if wins is None else matrix(wins, row.size),
        {name: numbers(own, row.size, f"rewards of {name}") for name, own in rewards.items()},
        tuple(bool(one.get("cut") or cut) for one, cut in zip(about, listed, strict=True)),
    )


def numbers(value: Any, size: int, what: str) -> tuple[float, ...]:
    """K numbers of a line, nan for null.

    Raises:
        DataError: Another count, or something that is no finite number.
    """
    items = as_list(value)
    if items is None or len(items) != size:
        raise DataError(
            f"{what} must be a list of {size} numbers, one a response, but is {show(value)}"
        )
    found = [NAN if item is None else number(item) for item in items]
    if None in found:
        raise DataError(f"{what} must hold finite numbers or null, but is {show(value)}")
    return tuple(one for one in found if one is not None)


def matrix(value: Any, size: int) -> tuple[tuple[float, ...], ...]:
    """Win probabilities [K][K] of a line, nan for null.

    Raises:
        DataError: Another shape, what is no probability, or two that do not add to 1.
    """
    lists = as_list(value)
    if lists is None or len(lists) != size:
        raise DataError(f"wins must be {size} lists of {size} numbers, but is {show(value)}")
    wins = tuple(numbers(own, size, "each list of wins") for own in lists)
    for i in range(size):
        for j in range(i):
            p, q = wins[i][j], wins[j][i]
            if math.isnan(p) and math.isnan(q):
                continue
            if not (0.0 <= p <= 1.0 and abs(p + q - 1.0) < 1e-6):
                raise DataError(
                    f"wins[{i}][{j}] and wins[{j}][{i}] must be probabilities that add to 1, but "
                    f"are {p:g} and {q:g}"
                )
    return wins
