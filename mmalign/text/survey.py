"""Every row encoded once before a model is loaded, to find what training would meet later on."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from mmalign.data.doubts import special_mark, special_mark_of
from mmalign.data.example import as_text
from mmalign.data.fields import Problem
from mmalign.data.jobs import track
from mmalign.data.records import ProblemList, Record
from mmalign.errors import ConfigError, DataError
from mmalign.models.adapter import Surveyed
from mmalign.safe import replacing
from mmalign.text.cache import cache_folder
from mmalign.text.encode import Encoder
from mmalign.text.masks import with_spans
from mmalign.text.model import Limits, model_limits
from mmalign.text.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
    from pathlib import Path

    from mmalign.config import DataConfig, RunConfig
    from mmalign.core import Needs
    from mmalign.data.example import Candidate, Example, Prompt
    from mmalign.text.masks import EncodedCandidate


NAMED = 3  # first rows that are kept by number, of everything that is only counted

_CHUNK = 128  # rows between two looks at how far it is
_FEW = 1000  # rows that are not worth further processes
_MOST_WORKERS = 16
_VALUES = re.compile(r"'[^']*'|\"[^\"]*\"|\d[\d,.]*")


@dataclass(slots=True)
class Found:
    """What a survey found. Rows are numbers of the list that was surveyed.

    Attributes:
        rows, responses, pairs: How many were looked at and can be encoded.
        counts: By name, how many rows or responses something was done to.
        first: By name, the first rows of those.
        sentences: By name, what it means; of names that have one.
        said: Sentences about all rows.
        equal: Pairs whose two sides are the same tokens.
        problems: Rows that cannot be trained on: number, what is wrong, what was found.
        longest: The most tokens of a prompt, and of a response.
        refused: What is wrong with the config rather than with a row; "" for nothing.
    """

    rows: int = 0
    responses: int = 0
    pairs: int = 0
    counts: Counter[str] = field(default_factory=Counter[str])
    first: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    sentences: dict[str, str] = field(default_factory=dict[str, str])
    said: list[str] = field(default_factory=list[str])
    equal: list[int] = field(default_factory=list[int])
    problems: list[tuple[int, str, str]] = field(default_factory=list[tuple[int, str, str]])
    longest: tuple[int, int] = (0, 0)
    refused: str = ""

    def count(self, name: str, row: int, sentence: str = "", times: int = 1) -> None:
        """Note that something was done to a row, or to several of its responses."""
        self.counts[name] += times
        first = self.first.setdefault(name, [])
        if len(first) < NAMED:
            first.append(row)
        if sentence:
            self.sentences.setdefault(name, sentence)

    def among(self, rows: Sequence[int]) -> Found:
        """What was found in one row, as what is found in rows like it, whose numbers are given."""
        times = len(rows)
        return replace(
            self,
            rows=self.rows * times,
            responses=self.responses * times,
            pairs=self.pairs * times,
            counts=Counter({name: count * times for name, count in self.counts.items()}),
            first={name: list(rows[:NAMED]) for name in self.first},
            equal=list(rows) if self.equal else [],
            problems=[(row, *problem[1:]) for problem in self.problems for row in rows],
        )

    def add(self, other: Found) -> None:
        """Take in what was found among other rows."""
        for name in ("rows", "responses", "pairs"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.counts.update(other.counts)
        for name, rows in other.first.items():
            self.first[name] = sorted(self.first.get(name, []) + rows)[:NAMED]
        self.sentences = {**other.sentences, **self.sentences}
        self.said += [sentence for sentence in other.said if sentence not in self.said]
        self.equal += other.equal
        self.problems += other.problems
        self.longest = (
            max(self.longest[0], other.longest[0]),
            max(self.longest[1], other.longest[1]),
        )
        self.refused = self.refused or other.refused


def survey(
    encoder: Encoder,
    rows: Sequence[Example],
    limits: Limits | None = None,
    keys: Sequence[Hashable] | None = None,
) -> Found:
    """Encode every row, on all processors where there are many; a bar shows how far it is.

    Args:
        encoder: Used for nothing else: what it noted is lost.
        rows: Any number, each of them once.
        limits: Of the models that will score the rows.
        keys: Of each row; of those with equal keys, which must have equal tokens, one is encoded.

    Raises:
        ConfigError: Something is wrong that no row can help.
    """
    limits = limits or Limits()
    if limits.embedded is not None:
        encoder.use_ids_below(limits.embedded)
    alike: dict[Hashable, list[int]] = {}
    for number in range(len(rows)):
        alike.setdefault(number if keys is None else keys[number], []).append(number)
    chunks = _Chunks(encoder, rows, list(alike.values()), limits)
    found = Found()
    for part in track(
        _looked_at(chunks), "checking rows", total=len(alike), unit="rows", size=_CHUNK
    ):
        found.add(part)
        if found.refused:
            raise ConfigError(found.refused)
    found.equal.sort()
    found.problems.sort()
    found.said = list(dict.fromkeys((*encoder.notes.said, *found.said)))
    return found


@dataclass(frozen=True, slots=True)
class _Chunks:
    """Parts of the rows, each with what is found in it; a map-style dataset."""

    encoder: Encoder
    rows: Sequence[Example]
    alike: Sequence[Sequence[int]]  # numbers of rows with the same tokens
    limits: Limits

    def __len__(self) -> int:
        return -(-len(self.alike) // _CHUNK)

    def __getitem__(self, index: int) -> Found:
        found = Found()
        for numbers in self.alike[index * _CHUNK : (index + 1) * _CHUNK]:
            one = Found()
            try:
                self._look(one, numbers[0], self.rows[numbers[0]])
                found.add(one.among(numbers))
            except ConfigError as error:
                found.refused = str(error)
                break
        found.said = list(self.encoder.notes.said)
        return found

    def _look(self, found: Found, number: int, row: Example) -> None:
        notes = self.encoder.notes
        notes.rows.clear()
        try:
            encoded = self.encoder.encode_example(row)
        except DataError as error:
            found.problems.append((number, str(error).removeprefix(f"{row.id}: "), ""))
            return
        longest = max(len(item.prompt) + len(item.response) - 1 for item in encoded)
        limit = self.limits.positions
        if limit is not None and longest > limit:
            found.problems.append((number, too_long(limit), f"this one has {longest:,}"))
            return
        found.rows += 1
        found.longest = (
            max(found.longest[0], *(len(item.prompt) for item in encoded)),
            max(found.longest[1], *(len(item.response) for item in encoded)),
        )
        for name in notes.rows:
            if name != "responses_cut":
                found.count(name, number, notes.sentences.get(name, ""))
        self._look_at_responses(found, number, row, encoded)

    def _look_at_responses(
        self, found: Found, number: int, row: Example, encoded: Sequence[EncodedCandidate]
    ) -> None:
        found.responses += len(encoded)
        cut = [c for c, item in zip(row.candidates, encoded, strict=True) if item.cut]
        if cut:
            found.count("responses_cut", number, times=len(cut))
            lost = sum(candidate.complete for candidate in cut)
            if lost:
                found.count("ends_lost", number, times=lost)
        special = sum(map(self._writes_special, row.candidates))
        if special:
            found.count("special_tokens", number, times=special)
        if self.encoder.render.is_chat and any(map(self._is_rendered, _asked(row.prompt))):
            found.count("prompts_rendered", number)
        if row.kind == "pair":
            found.pairs += 1
            first, second = encoded[:2]
            if first.response == second.response and first.prompt == second.prompt:
                found.equal.append(number)

    def _writes_special(self, candidate: Candidate) -> bool:
        """Whether the response itself holds a special token; well-known ones are named before."""
        text = as_text(candidate.response)
        return self.encoder.writes_special(text) and not special_mark(candidate)

    def _is_rendered(self, text: str) -> bool:
        """Whether a prompt's own words hold the marks of a template."""
        return self.encoder.writes_special(text) or bool(special_mark_of(text))


def _asked(prompt: Prompt) -> list[str]:
    """What the user says in a prompt."""
    if isinstance(prompt, str):
        return [prompt]
    return [turn.content for turn in prompt if turn.role == "user"]


def too_long(limit: int) -> str:
    """What is wrong with a row beyond the model's positions."""
    return (
        f"rows must have at most {limit:,} tokens, as many as the model has positions (lower "
        f"data.max_prompt_length and data.max_response_length to {limit:,} together)"
    )


def _looked_at(chunks: _Chunks) -> Iterator[Found]:
    workers = min(len(os.sched_getaffinity(0)), _MOST_WORKERS) if sys.platform == "linux" else 1
    if len(chunks.alike) < _FEW or workers < 2:
        yield from (chunks[index] for index in range(len(chunks)))
        return
    import torch
    from torch.utils.data import DataLoader

    options: dict[str, Any] = {
        "batch_size": None,
        "num_workers": workers,
        "collate_fn": _same,
        "multiprocessing_context": "fork",  # the rows need not travel
        "generator": torch.Generator().manual_seed(0),  # the run's own stream stays where it is
    }
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else tokenizers warns of the fork
    try:
        yield from DataLoader(chunks, **options)  # type: ignore[arg-type]
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _same(part: Found) -> Found:
    return part


VERSION = 2  # raise it when the same rows and settings give other findings


class SurveyCache:
    """A folder with one small file for each set of rows under each set of settings."""

    def __init__(self, folder: Path, encoder: Encoder, limits: Limits) -> None:
        """`folder` is made when it is first written to."""
        self.folder = folder
        masks = encoder.masks and encoder.masks.model_dump(mode="json")  # spans can be at fault too
        self._settings = [VERSION, encoder.fingerprint(), asdict(limits), masks]

    def file(self, keys: Iterable[bytes]) -> Path:
        """Where what is found in rows with these keys lies."""
        digest = hashlib.sha256(json.dumps(self._settings).encode())
        for key in keys:
            digest.update(key)
        return self.folder / f"{digest.hexdigest()[:40]}.json"

    @staticmethod
    def get(file: Path) -> Found | None:
        """What was found; None where nobody looked yet, or the file is damaged."""
        try:
            value: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            if value.keys() != {item.name for item in fields(Found)}:
                return None
            value["counts"] = Counter(value["counts"])
            value["problems"] = [
                (int(n), str(what), str(found)) for n, what, found in value["problems"]
            ]
            value["longest"] = tuple(value["longest"])
            return Found(**value)
        except (OSError, ValueError, TypeError, AttributeError):
            return None

    @staticmethod
    def put(file: Path, found: Found) -> None:
        """Keep it; where that cannot be written, the next start looks again."""
        value = {item.name: getattr(found, item.name) for item in fields(found)}
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(file, several=True) as partial:
                partial.write_text(json.dumps(value), encoding="utf-8")


def findings(
    config: RunConfig,
    encoder: Encoder,
    rows: Sequence[Example],
    limits: Limits,
    about: Callable[[Example], Hashable] | None = None,
) -> Found:
    """What a survey finds, or found when it looked at the same rows under the same settings.

    Args:
        config: The run's configuration.
        encoder: As `survey` takes it.
        rows: Any number, each of them once.
        limits: Of the models that will score the rows.
        about: What besides its words decides a row's tokens; its `repr` tells them apart.
    """
    keys = [repr((_content(row), about and about(row))).encode() for row in rows]
    cache = SurveyCache(cache_folder(config) / FOLDER, encoder, limits)
    file = cache.file(keys)
    known = cache.get(file)
    if known is None:
        known = survey(encoder, rows, limits, keys)
        cache.put(file, known)
    return known


def _content(row: Example) -> tuple[Any, ...]:
    """All words that decide the row's tokens."""
    answers = [(c.response, c.prompt, c.spans, c.steps, c.complete, c.role) for c in row.candidates]
    return row.prompt, row.template.tools, row.template.options, row.kind, answers


_OWN_WORDS = frozenset({"prompts_cut", "responses_cut", "ends_lost", "special_tokens"})


def lines(found: Found, rows: Sequence[Example], data: DataConfig) -> list[str]:
    """One sentence for each thing that was done to rows; none where nothing was.

    Args:
        found: By the survey.
        rows: What was surveyed.
        data: The limits, which are named.
    """
    told: list[str] = []

    def tell(name: str, sentence: str) -> None:
        told.append(f"{sentence}; {_first(found.first[name], found.counts[name], rows)}")

    if count := found.counts["prompts_cut"]:
        kept = "start" if data.truncate_prompt == "keep_start" else "end"
        tell(
            "prompts_cut",
            f"{_of(count, found.rows)} prompts cut at {data.max_prompt_length:,} tokens "
            f"(data.max_prompt_length), of which the {kept} is kept",
        )
    if count := found.counts["responses_cut"]:
        lost = found.counts["ends_lost"]
        tell(
            "responses_cut",
            f"{_of(count, found.responses)} responses cut at {data.max_response_length:,} tokens "
            "(data.max_response_length)" + (f"; {lost:,} lost their end" if lost else ""),
        )
    if count := found.counts["special_tokens"]:
        tell(
            "special_tokens",
            f"{_of(count, found.responses)} responses have a special token of this tokenizer "
            "written in their text, and learn it as such",
        )
    if found.equal:
        told.append(
            f"{_of(len(found.equal), found.pairs)} pairs have the same tokens on both sides, of "
            f"which nothing is learned; {_first(found.equal, len(found.equal), rows)}"
        )
    for name in found.counts:
        if name not in _OWN_WORDS:
            sentence = found.sentences.get(name) or _SENTENCES.get(name, name.replace("_", " "))
            tell(name, f"{_of(found.counts[name], found.rows)} rows: {sentence}")
    return [*told, *found.said]


_SENTENCES = {
    "prompts_empty": "the prompt is empty, so the response follows the tokenizer's first token",
    "prompts_rendered": "the prompt has special tokens written in its text, and the chat template "
    "writes its own around it; give the words alone, or set text.chat_template: false",
    "without_template": "the prompt is a conversation, but no chat template is in use; it is "
    "written as a transcript of Human and Assistant",
}


def problems(found: Found, rows: Sequence[Example]) -> ProblemList:
    """The rows that cannot be trained on, grouped by what is wrong with them."""
    result = ProblemList()
    for number, what, value in found.problems:
        row = rows[number]
        record = Record(row.place or row.id, row.id, "", None)
        kind = _VALUES.sub("...", what)  # what problems of one kind have in common
        group = result.groups.setdefault(kind, [])
        group.append((record, Problem(what, value)))
    return result


def require_lesson(found: Found, train: Sequence[int], rows: Sequence[Example]) -> None:
    """Refuse pairs that are all the same on both sides.

    Raises:
        DataError: naming what can be done.
    """
    equal = set(found.equal)
    if not equal or any(number not in equal for number in train):
        return
    longer = " or raise data.max_response_length" if found.counts["responses_cut"] else ""
    raise DataError(
        f"all {len(train):,} pairs to train on have the same tokens on both sides (the first is "
        f"{rows[train[0]].id!r}), so there is nothing to learn; give other pairs{longer}"
    )


def require_room(found: Found, limits: Limits) -> None:
    """Refuse rows whose prompts, under the responses of other rows, are beyond the positions.

    Raises:
        ConfigError: naming the limits to lower.
    """
    prompt, response = found.longest
    limit = limits.positions
    if limit is not None and prompt + response - 1 > limit:
        raise ConfigError(
            f"the objective scores responses under the prompts of other rows: the longest prompt "
            f"({prompt:,} tokens) and the longest response ({response:,}) are beyond the model's "
            f"{limit:,} positions. Lower data.max_prompt_length and data.max_response_length to "
            f"{limit:,} together"
        )


def _of(count: int, total: int) -> str:
    return f"all {total:,}" if count == total else f"{count:,} of {total:,}"


def _first(numbers: Sequence[int], count: int, rows: Sequence[Example]) -> str:
    named = [_name(rows[number]) for number in dict.fromkeys(numbers[:NAMED])]
    if len(named) == 1:
        return f"the row is {named[0]}" if count == 1 else f"the first row is {named[0]}"
    return f"the first rows are {', '.join(named[:-1])} and {named[-1]}"


def _name(row: Example) -> str:
    """Its id, or where it stands where it has none."""
    return row.id if row.id == row.place else repr(row.id)


FOLDER = "surveys"


def survey_parts(config: RunConfig, needs: Needs, parts: Sequence[Sequence[Example]]) -> Surveyed:
    """What training would meet in these rows, and those without problems.

    Args:
        config: The run's configuration.
        needs: Of its objective.
        parts: Rows to train on, rows held out.

    Raises:
        DataError: Rows show something; all pairs are the same on both sides; none has a span.
        ConfigError: The tokenizer or the template cannot do what the config asks.
    """
    # A row stands several times in a part where its source has a weight.
    rows = list({id(row): row for part in parts for row in part}.values())
    refuse_media(rows)
    encoder, limits = Encoder(load_tokenizer(config), config), model_limits(config)
    encoder.notes.quiet = True
    found = findings(config, encoder, rows, limits)
    bad = {id(rows[number]) for number, *_ in found.problems}
    kept = [[row for row in part if id(row) not in bad] for part in parts]
    numbers = {id(row): number for number, row in enumerate(rows)}
    require_lesson(found, [numbers[id(row)] for row in kept[0]], rows)
    if "mismatched" in needs.roles:
        require_room(found, limits)
    told = lines(found, rows, config.data)
    masks = config.text.masks
    learned = [with_spans(masks, part, encoder.encode_example) for part in kept]
    return Surveyed(learned, tuple(told), problems(found, rows))


def refuse_media(rows: Sequence[Example]) -> None:
    """Refuse rows that show or play something, which a model of text would pass over."""
    shown = [row.id for row in rows if row.media or any(c.media for c in row.candidates)]
    if shown:
        raise DataError(
            f"{len(shown)} of {len(rows)} rows have a video, image or audio (the first is "
            f"{shown[0]!r}), which a model of text cannot take. Set modality: video with a "
            "model that can, or remove the columns"
        )
