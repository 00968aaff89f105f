"""Every row encoded once before a model is loaded, to find what training would meet later on."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from pydantic import TypeAdapter
from torch.utils.data import DataLoader

from mmalign.config import DataConfig, RunConfig
from mmalign.core import Needs
from mmalign.data.doubts import special_mark, special_mark_of
from mmalign.data.example import Candidate, Example, Media, Message, Prompt, as_text
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
from mmalign.text.packing import num_tokens
from mmalign.text.tokenizer import load_tokenizer

NAMED = 3  # first rows that are kept by number, of everything that is only counted

_CHUNK = 128  # rows between two looks at how far it is
_FEW = 1000  # rows that are not worth further processes
_MOST_WORKERS = 16
_VALUES = re.compile(r"'[^']*'|\"[^\"]*\"|\d[\d,.]*")
FOLDER = "surveys"  # in the cache folder; a second start reads what surveys found
VERSION = 4  # raise it when the same rows and settings give other findings


@dataclass(slots=True)
class Found:
    """What a survey found. Rows are numbers of the list that was surveyed.

    Attributes:
        rows, responses, pairs: How many were looked at and can be encoded.
        counts: By name, how many rows or responses something was done to.
        first: By name, the first rows of those.
        sentences: By name, what it means; of names that have one.
        said: Sentences about all rows.
        equal: Pairs whose two sides are the same tokens, and show the same.
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

    def count(self, name: str, rows: Sequence[int], sentence: str = "", times: int = 1) -> None:
        """Note that something was done to rows, or to several responses of each."""
        self.counts[name] += times * len(rows)
        self.first[name] = sorted([*self.first.get(name, []), *rows])[:NAMED]
        if sentence:
            self.sentences.setdefault(name, sentence)

    def refuse(self, rows: Sequence[int], what: str, size: int, more: str = "") -> None:
        """Note that rows are too large; `more` says of what, beside what the file has of them."""
        self.problems += [(number, what, f"this one has {size:,}{more}") for number in rows]

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
        self.stretch(*other.longest)
        self.refused = self.refused or other.refused

    def stretch(self, prompt: int, response: int) -> None:
        """Note tokens of a prompt and of a response."""
        self.longest = (max(self.longest[0], prompt), max(self.longest[1], response))


Whole = Callable[[Example], Example]
"""A row to the one that is trained on, with the candidates that the adapter adds at its end."""


def survey(
    encoder: Encoder,
    rows: Sequence[Example],
    limits: Limits,
    keys: Sequence[Hashable],
    whole: Whole | None = None,
) -> Found:
    """Encode every row, on all processors where there are many; a bar shows how far it is.

    Args:
        encoder: Used for nothing else: what it noted is lost.
        rows: Any number, each of them once.
        limits: Of the models that will score the rows.
        keys: Of each row; of those with equal keys, which must have equal tokens, one is encoded.
        whole: For the tokens of a row together; None: nothing is added to rows.

    Raises:
        ConfigError: Something is wrong that no row can help.
    """
    if limits.embedded is not None:
        encoder.use_ids_below(limits.embedded)
    alike: dict[Hashable, list[int]] = {}
    for number, key in enumerate(keys):
        alike.setdefault(key, []).append(number)
    chunks = _Chunks(encoder, rows, list(alike.values()), limits, whole)
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
    whole: Whole | None

    def __len__(self) -> int:
        return -(-len(self.alike) // _CHUNK)

    def __getitem__(self, index: int) -> Found:
        found = Found()
        for numbers in self.alike[index * _CHUNK : (index + 1) * _CHUNK]:
            try:
                self._look(found, numbers, self.rows[numbers[0]])
            except ConfigError as error:
                found.refused = str(error)
                break
        found.said = list(self.encoder.notes.said)
        return found

    def _look(self, found: Found, numbers: Sequence[int], row: Example) -> None:
        """Encode a row, for all that have its tokens."""
        notes = self.encoder.notes
        notes.rows.clear()
        limit = self.limits.together
        whole = row if limit is None or self.whole is None else self.whole(row)
        try:
            every = self.encoder.encode_example(whole)
        except DataError as error:
            what = str(error).removeprefix(f"{row.id}: ")
            found.problems += [(number, what, "") for number in numbers]
            return
        encoded, shown = every[: len(row.candidates)], _shown(whole)
        longest = max(len(item.prompt) + len(item.response) - 1 for item in encoded)
        if (most := self.limits.positions) is not None and longest > most:
            found.refuse(numbers, too_long(most), longest)
            return
        if limit is not None:
            contexts = [(shown.index(media), tuple(item.prompt))
                        for media, item in zip(shown, every, strict=True)]  # fmt: skip
            answers = (tuple(item.response) for item in every)
            together = num_tokens([*zip(contexts, answers, strict=True)])
            if together > limit:
                more = " with the candidates that the objective adds" if whole is not row else ""
                found.refuse(numbers, _too_many(limit), together, more)
                return
        found.rows += len(numbers)
        found.responses += len(encoded) * len(numbers)
        for item in encoded:
            found.stretch(len(item.prompt), len(item.response))
        for name in notes.rows:
            if name != "responses_cut":
                found.count(name, numbers, notes.sentences.get(name, ""))
        cut = [c for c, item in zip(row.candidates, encoded, strict=True) if item.cut]
        marked = {
            "responses_cut": len(cut),
            "ends_lost": sum(candidate.complete for candidate in cut),
            "special_tokens": sum(map(self._writes_special, row.candidates)),
            "prompts_rendered": self.encoder.render.is_chat and self._is_rendered(row.prompt),
        }
        for name, times in marked.items():
            if times:
                found.count(name, numbers, times=times)
        if row.kind == "pair":
            found.pairs += len(numbers)
            first, second = encoded[:2]
            if (first.prompt, first.response) == (second.prompt, second.response) and (
                shown[0] == shown[1]
            ):
                found.equal += numbers

    def _writes_special(self, candidate: Candidate) -> bool:
        """Whether the response itself holds a special token; well-known ones are named before."""
        text = as_text(candidate.response)
        return self.encoder.writes_special(text) and not special_mark(candidate)

    def _is_rendered(self, prompt: Prompt) -> bool:
        """Whether what the user says in a prompt holds the marks of a template."""
        turns = [Message("user", prompt)] if isinstance(prompt, str) else prompt
        said = (turn.content for turn in turns if turn.role == "user")
        return any(self.encoder.writes_special(t) or special_mark_of(t) for t in said)


def _too_many(limit: int) -> str:
    return (
        f"rows must have at most {limit:,} tokens, a prompt counted once, as many as "
        "train.tokens_per_batch lets pass at a time"
    )


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
    options: dict[str, Any] = {
        "batch_size": None,
        "num_workers": workers,
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


def findings(
    config: RunConfig,
    encoder: Encoder,
    rows: Sequence[Example],
    limits: Limits,
    about: Callable[[Example], Hashable] | None = None,
    whole: Whole | None = None,
) -> Found:
    """What a survey finds, or found when it looked at the same rows under the same settings.

    Args:
        config: The run's configuration.
        encoder: As `survey` takes it.
        rows: Any number, each of them once.
        limits: Of the models that will score the rows.
        about: What besides its words decides a row's tokens, and those of what `whole` adds; its
            `repr` tells them apart.
        whole: As `survey` takes it.
    """
    looked_at = track(rows, "looking for rows that are known", total=len(rows))
    decides = ((_content(row), about and about(row)) for row in looked_at)
    keys = [hashlib.sha256(repr(what).encode()).digest() for what in decides]
    masks = encoder.masks and encoder.masks.model_dump(mode="json")  # spans can be at fault too
    settings = [VERSION, encoder.fingerprint(), asdict(limits), masks]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for key in keys:
        digest.update(key)
    file = cache_folder(config) / FOLDER / f"{digest.hexdigest()[:40]}.json"
    as_json = TypeAdapter(Found)
    with suppress(OSError, ValueError):  # nobody looked yet, or the file is damaged
        known = as_json.validate_json(file.read_bytes())
        if known.rows or known.problems:  # as any survey has
            return known
    found = survey(encoder, rows, limits, keys, whole)
    with suppress(OSError):  # the next start looks again
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file, several=True) as partial:
            partial.write_bytes(as_json.dump_json(found))
    return found


def _content(row: Example) -> tuple[Any, ...]:
    """All words that decide the row's tokens, and which candidates show the same."""
    answers = [(c.response, c.prompt, c.spans, c.steps, c.complete, c.role) for c in row.candidates]
    shown = _shown(row)
    alike = list(map(shown.index, shown))
    return row.prompt, row.template.tools, row.template.options, row.kind, answers, alike


def _shown(row: Example) -> list[Media]:
    """What each candidate is about."""
    return [row.media if c.media is None else c.media for c in row.candidates]


def lines(found: Found, rows: Sequence[Example], data: DataConfig) -> list[str]:
    """One sentence for each thing that was done to rows; none where nothing was.

    Args:
        found: By the survey.
        rows: What was surveyed.
        data: The limits, which are named.
    """
    told: list[str] = []

    def tell(name: str, total: int, what: str) -> None:
        count = found.counts[name]
        told.append(f"{_of(count, total)} {what}; {_first(found.first[name], count, rows)}")

    kept, lost = data.truncate_prompt.removeprefix("keep_"), found.counts["ends_lost"]
    own = {
        "prompts_cut": (
            found.rows,
            f"prompts cut at {data.max_prompt_length:,} tokens (data.max_prompt_length), of which "
            f"the {kept} is kept",
        ),
        "responses_cut": (
            found.responses,
            f"responses cut at {data.max_response_length:,} tokens (data.max_response_length)"
            + (f"; {lost:,} lost their end" if lost else ""),
        ),
        "special_tokens": (
            found.responses,
            "responses have a special token of this tokenizer written in their text, and learn it "
            "as such",
        ),
    }
    for name, (total, what) in own.items():
        if found.counts[name]:
            tell(name, total, what)
    if found.equal:
        told.append(
            f"{_of(len(found.equal), found.pairs)} pairs have the same tokens on both sides, of "
            f"which nothing is learned; {_first(found.equal, len(found.equal), rows)}"
        )
    for name in found.counts:
        if name in own or name == "ends_lost":
            continue
        sentence = found.sentences.get(name) or _SENTENCES.get(name, name.replace("_", " "))
        tell(name, found.rows, f"rows: {sentence}")
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
    shown = [rows[number] for number in dict.fromkeys(numbers[:NAMED])]
    named = [row.id if row.id == row.place else repr(row.id) for row in shown]
    if len(named) == 1:
        return f"the row is {named[0]}" if count == 1 else f"the first row is {named[0]}"
    return f"the first rows are {', '.join(named[:-1])} and {named[-1]}"


def survey_parts(config: RunConfig, needs: Needs, parts: Sequence[Sequence[Example]]) -> Surveyed:
    """What training would meet in these rows, and those without problems: `Tools.survey`.

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
