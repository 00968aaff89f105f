"""Examples to token ids: exact response masks, one prompt for all sides, padding to [B, K, ...]."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmalign.errors import ConfigError, DataError
from mmalign.text.batch import collate
from mmalign.text.positions import mark_spans, mark_steps
from mmalign.text.render import ChatTemplate, PlainText
from mmalign.text.span_masks import span_masks
from mmalign.text.tokenizer import TextTokenizer, load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Sequence

    from rich.console import Group
    from transformers import PreTrainedTokenizerBase

    from mmalign.config import RunConfig
    from mmalign.core import Needs
    from mmalign.data.example import Candidate, Example, Prompt
    from mmalign.models.adapter import Batch
    from mmalign.text.render import Response
    from mmalign.text.tokenizer import Offsets

__all__ = ["EncodedCandidate", "Encoder", "load_tokenizer"]

log = logging.getLogger(__name__)

VERSION = 2  # raise it when the same settings give other tokens: caches depend on it


@dataclass(frozen=True, slots=True)
class EncodedCandidate:
    """Token ids of one (context, response) pair; every response token is scored."""

    prompt: list[int]  # P  at least one token
    response: list[int]  # L  at least one token; ends in the end token when nothing was cut
    spans: list[bool]  # L  True on tokens that overlap a span of the record
    steps: list[int]  # L  reasoning step, from 1; 0 outside of every step
    context: int = 0  # number of what the prompt shows, where it is more than text


class Encoder:
    """Turns examples into batches for one tokenizer and one config."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: RunConfig) -> None:
        """Check that the tokenizer can do what `data` and `text` of the config ask.

        Raises:
            ConfigError: when it cannot.
        """
        self.tokenizer = tokenizer
        self.data = config.data
        self.text = config.text
        self.masks = config.text.masks
        kind = self.masks.kind if self.masks else None
        self.uses_spans, self.uses_steps = kind in ("spans", "diff"), kind == "steps"
        self._tokenize = TextTokenizer(tokenizer)
        self.render = self._renderer()
        if kind in ("spans", "steps") and not self._tokenize.has_offsets:
            raise ConfigError(
                f"text.masks.kind is {kind!r}, which needs character offsets; "
                f"{type(tokenizer).__name__} has none. Use a fast tokenizer"
            )
        self._rows: dict[str, set[Hashable]] = {}

    def _renderer(self) -> ChatTemplate | PlainText:
        chat, plain = self._renderers()
        if self.text.chat_template and chat is not None:
            return chat
        if self.text.system_prompt is not None:
            raise ConfigError(
                "text.system_prompt is set, but no chat template is in use (the tokenizer has "
                "none, or text.chat_template is false). Put the text into the prompts"
            )
        return plain

    def _renderers(self) -> tuple[ChatTemplate | None, PlainText]:
        """The chat template, where there is one, and what stands in for it."""
        chat = None
        if self.tokenizer.chat_template is not None:
            chat = ChatTemplate(self.tokenizer, self.text.system_prompt)
        return chat, PlainText()

    @property
    def counts(self) -> Counter[str]:
        """Rows concerned, by what was done to them; a row counts once however often it is encoded.

        `prompts_cut`, `responses_cut`, `boundary_moved` (prompt tokens merged with a response),
        `prompts_empty`, `without_mismatch`, `without_end`. Loader workers keep their own counts;
        `survey` fills those of this process.
        """
        return Counter({name: len(rows) for name, rows in self._rows.items()})

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end an answer, where generation stops: eos, and the template's end token."""
        ids, _ = self._tokenize(self.render.end(), add_leading=False)
        found = next((token for token in ids if token in self._tokenize.ends), None)
        return frozenset(t for t in (found, self._tokenize.eos_id) if t is not None)

    @property
    def pad_id(self) -> int:
        """Fills padded positions, which are masked."""
        return self._tokenize.pad_id

    def survey(self, examples: Iterable[Example]) -> Counter[str]:
        """Encode every example once, for the counts and for errors before the first step."""
        for example in examples:
            self.encode_example(example)
        return self.counts

    def encode_prompt(self, prompt: Prompt, *, where: str = "prompt") -> list[int]:
        """The context to generate an answer from: the one that training scores answers in."""
        ids, _ = self._ids(self.render.context(prompt, where))
        return self._cut_prompt(self._started(ids, where), where)

    def encode_example(self, example: Example) -> tuple[EncodedCandidate, ...]:
        """Every candidate of the row, in the row's order; candidates of one prompt share its ids.

        Raises:
            DataError: when a response has no token, or the chat template loses a part of it.
        """
        groups: dict[Prompt, list[int]] = {}
        for index, candidate in enumerate(example.candidates):
            prompt = example.prompt if candidate.prompt is None else candidate.prompt
            groups.setdefault(prompt, []).append(index)
        encoded: dict[int, EncodedCandidate] = {}
        for prompt, indices in groups.items():
            members = [example.candidates[index] for index in indices]
            encoded.update(zip(indices, self._group(prompt, members, example.id), strict=True))
        return tuple(encoded[index] for index in range(len(encoded)))

    def collate(self, examples: Sequence[Example], needs: Needs) -> Batch:
        """A batch on the CPU: rated candidates, then the extra roles of `needs`; see `batch`."""
        return collate(self, examples, needs)

    def show(self, examples: Iterable[Example]) -> Group:
        """What the model will see of these rows, masks coloured; print it on a rich console."""
        from mmalign.text.show import show

        return show(self, examples)

    def fingerprint(self) -> str:
        """Hash of everything that decides the tokens: tokenizer, template, limits, code version."""
        settings = {
            "version": VERSION,
            "tokenizer": self._tokenize.identity(),
            "template": self.tokenizer.chat_template if self.render.is_chat else None,
            "system_prompt": self.text.system_prompt,
            "limits": [self.data.max_prompt_length, self.data.max_response_length],
            "truncate_prompt": self.data.truncate_prompt,
        }
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def span_masks(self, encoded: Sequence[EncodedCandidate]) -> list[list[bool]]:
        """Which response tokens of a row's candidates lie on a span; see `text.masks`."""
        assert self.masks is not None
        masks = span_masks(encoded, self.masks.kind, self.masks.min_match)
        if self.masks.on_empty == "full" and not any(map(any, masks)):
            return [[True] * len(item.response) for item in encoded]
        return masks

    def _group(
        self,
        prompt: Prompt,
        candidates: Sequence[Candidate],
        row: str,
        expand: Callable[[str], str] | None = None,
    ) -> list[EncodedCandidate]:
        """Candidates under one prompt, whose ids are cut to what all of them start with.

        Prompt and response are tokenised as one text. Where the prompt's last tokens merge with a
        response, the responses of all sides start at the first token that any side changed.
        `expand` rewrites the context before it is tokenised.
        """
        context, responses = self.render.responses(prompt, candidates, row)
        if expand is not None:
            context = expand(context)
        alone, _ = self._ids(context)
        joined = [
            self._joined(context, response, candidate.complete, row)
            for response, candidate in zip(responses, candidates, strict=True)
        ]
        shared = min(_common_prefix(alone, ids) for ids, _ in joined)
        if shared < len(alone):
            self.count("boundary_moved", row, "prompt and response merge; responses start early")
        prompt_ids = self._cut_prompt(self._started(alone[:shared], row), row)
        encoded: list[EncodedCandidate] = []
        for (ids, offsets), response, candidate in zip(joined, responses, candidates, strict=True):
            stop = shared + self.data.max_response_length
            if len(ids) == shared:
                raise DataError(f"{row}: a response has no token to score; remove the row")
            if len(ids) > stop:
                self.count("responses_cut", row)
            start = len(context) + (response.offset or 0)
            local = [(first - start, last - start) for first, last in offsets[shared:stop]]
            marks = self._marks(local, response, candidate, row)
            encoded.append(EncodedCandidate(prompt_ids, ids[shared:stop], *marks))
        return encoded

    def _joined(
        self, context: str, response: Response, complete: bool, row: str
    ) -> tuple[list[int], Offsets]:
        """Context and response as one token sequence, with the end token of a complete response."""
        text = context + response.body
        if not complete:
            return self._ids(text)
        ids, offsets = self._ids(text + response.end)
        if not self.render.is_chat:
            eos = self._tokenize.eos_id
            if eos is None or ids[-1:] == [eos]:
                return ids, offsets
            return [*ids, eos], [*offsets, (len(text), len(text))]
        # What a template writes after the end token (a line break) is never generated: not scored.
        for index, (token, (start, _)) in enumerate(zip(ids, offsets, strict=True)):
            if start >= len(text) and token in self._tokenize.ends:
                return ids[: index + 1], offsets[: index + 1]
        self.count("without_end", row, "the chat template has no end token after an answer")
        return ids, offsets

    def _marks(
        self, offsets: Offsets, response: Response, candidate: Candidate, row: str
    ) -> tuple[list[bool], list[int]]:
        """Spans and steps, from token ranges counted from the first character of the answer."""
        wants_spans = self.uses_spans and bool(candidate.spans)
        wants_spans &= self.masks is not None and self.masks.kind == "spans"
        if response.offset is None and (wants_spans or self.uses_steps):
            raise DataError(
                f"{row}: the chat template rewrites the response, so its spans and steps cannot be "
                "placed; set text.chat_template: false"
            )
        spans = mark_spans(offsets, candidate.spans if wants_spans else ())
        if not self.uses_steps:
            return spans, [0] * len(offsets)
        return spans, mark_steps(offsets, candidate.steps, response.answer)

    def _ids(self, text: str) -> tuple[list[int], Offsets]:
        # A template writes its own bos where the model wants one; plain text gets the tokenizer's.
        return self._tokenize(text, add_leading=not self.render.is_chat)

    def _started(self, ids: list[int], row: str) -> list[int]:
        """At least one token, since the first response token is predicted from the one before."""
        if ids:
            return ids
        self.count("prompts_empty", row)
        for start in (self._tokenize.bos_id, self._tokenize.eos_id):
            if start is not None:
                return [start]
        raise DataError(
            f"{row}: the prompt is empty, and the tokenizer has neither a bos nor an eos token to "
            "start from; give a prompt"
        )

    def _cut_prompt(self, ids: list[int], row: str) -> list[int]:
        limit = self.data.max_prompt_length
        if len(ids) <= limit:
            return ids
        self.count("prompts_cut", row)
        if self.data.truncate_prompt == "keep_start":
            return ids[:limit]
        keeps_bos = ids[0] == self._tokenize.bos_id and limit > 1  # models lean on their bos
        return [ids[0], *ids[len(ids) - limit + 1 :]] if keeps_bos else ids[len(ids) - limit :]

    def count(self, name: str, row: str, warning: str = "") -> None:
        """Note that something was done to a row; a warning is logged the first time."""
        if warning and name not in self._rows:
            log.warning("row %r: %s (said once; counted in %s)", row, warning, name)
        self._rows.setdefault(name, set()).add(row)


def _common_prefix(first: list[int], second: list[int]) -> int:
    for index, (left, right) in enumerate(zip(first, second, strict=False)):
        if left != right:
            return index
    return min(len(first), len(second))
