"""Every row encoded once before a model is loaded, to find what training would meet later on."""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mmalign.data.example import as_text
from mmalign.data.progress import track
from mmalign.data.written import special_mark, special_mark_of
from mmalign.errors import ConfigError, DataError
from mmalign.text.limits import Limits

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mmalign.data.example import Candidate, Example, Prompt
    from mmalign.text.encode import EncodedCandidate, Encoder

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

    def add(self, other: Found) -> None:
        """Take in what was found among later rows."""
        for name in ("rows", "responses", "pairs"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.counts.update(other.counts)
        for name, rows in other.first.items():
            self.first[name] = (self.first.get(name, []) + rows)[:NAMED]
        self.sentences = {**other.sentences, **self.sentences}
        self.said += [sentence for sentence in other.said if sentence not in self.said]
        self.equal += other.equal
        self.problems += other.problems
        self.longest = (
            max(self.longest[0], other.longest[0]),
            max(self.longest[1], other.longest[1]),
        )
        self.refused = self.refused or other.refused


def survey(encoder: Encoder, rows: Sequence[Example], limits: Limits | None = None) -> Found:
    """Encode every row, on all processors where there are many; a bar shows how far it is.

    Args:
        encoder: Used for nothing else: what it noted is lost.
        rows: Any number, each of them once.
        limits: Of the models that will score the rows.

    Raises:
        ConfigError: Something is wrong that no row can help.
    """
    limits = limits or Limits()
    if limits.embedded is not None:
        encoder.use_ids_below(limits.embedded)
    chunks = _Chunks(encoder, rows, limits)
    found = Found()
    for part in track(
        _looked_at(chunks), "checking rows", total=len(rows), unit="rows", size=_CHUNK
    ):
        found.add(part)
        if found.refused:
            raise ConfigError(found.refused)
    found.said = list(dict.fromkeys((*encoder.notes.said, *found.said)))
    return found


@dataclass(frozen=True, slots=True)
class _Chunks:
    """Parts of the rows, each with what is found in it; a map-style dataset."""

    encoder: Encoder
    rows: Sequence[Example]
    limits: Limits

    def __len__(self) -> int:
        return -(-len(self.rows) // _CHUNK)

    def __getitem__(self, index: int) -> Found:
        found = Found()
        for number in range(index * _CHUNK, min((index + 1) * _CHUNK, len(self.rows))):
            try:
                self._look(found, number, self.rows[number])
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
        """Whether the answer's own words hold a special token; well-known ones are named before."""
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


def kind_of(problem: str) -> str:
    """What problems of one kind have in common: the message without its values."""
    return _VALUES.sub("...", problem)


def _looked_at(chunks: _Chunks) -> Iterator[Found]:
    workers = min(len(os.sched_getaffinity(0)), _MOST_WORKERS) if sys.platform == "linux" else 1
    if len(chunks.rows) < _FEW or workers < 2:
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
