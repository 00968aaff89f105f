"""Examples to token ids: exact response masks, one prompt for all sides, padding to [B, K, ...]."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from mmalign.config import RunConfig
from mmalign.core import Needs
from mmalign.data.example import Asked, Candidate, Example, Media, Prompt
from mmalign.errors import ConfigError, DataError, NeedsError
from mmalign.models.batch import Batch
from mmalign.text.frame import Ends, alike
from mmalign.text.masks import EncodedCandidate, mark_ranges, mark_spans, mark_steps, span_masks
from mmalign.text.messages import Notes, PlainText, Response
from mmalign.text.model import stop_ids
from mmalign.text.packing import TextInputs
from mmalign.text.render import ChatTemplate
from mmalign.text.tokenizer import (
    JinjaTemplate,
    Offsets,
    TextTokenizer,
    named,
    require_ids,
    template_file,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Encoded = list[list[EncodedCandidate]]  # by row and candidate
Read = dict[str, Any]  # media that were read, by their key; models of text have none
VERSION = 4  # raise it when the same settings give other tokens: caches depend on it


def collate(
    encoder: Encoder,
    examples: Sequence[Example],
    needs: Needs,
    encode: Callable[[Example], Sequence[EncodedCandidate]],
) -> tuple[Batch[TextInputs], Encoded]:
    """A batch on the CPU: the rated candidates, then the extra roles in the order of `needs`.

    A "mismatched" candidate is the response of the row before under this prompt, tokenized on its
    own: no label of a row depends on the rows beside it.

    Args:
        encoder: Whose pad token, masks and notes are used.
        examples: The rows.
        needs: Of the objective.
        encode: Every candidate of a row, as `Encoder.encode_example`.

    Returns:
        The batch, and the candidates that it was made from.

    Raises:
        NeedsError: when a row lacks a role, or rows differ in their number of candidates.
    """
    rows = [_selected(example, needs) for example in examples]
    encoded = [list(encode(example)) for example in rows]
    labels = [list(example.labels) for example in rows]
    if "mismatched" in needs.roles:
        for index, example in enumerate(rows):
            other = replace(rows[index - 1].candidates[0], prompt=None, role="mismatched")
            encoded[index] += encode(replace(example, candidates=(other,)))
            labels[index].append(0.0)
    sizes = sorted({len(row) for row in encoded})
    if len(sizes) > 1 or sizes[0] < needs.candidates:
        raise NeedsError(
            f"rows {rows[0].id!r} to {rows[-1].id!r} have {sizes} candidates; every row of a run "
            f"needs the same number, at least {needs.candidates}"
        )
    inputs = _inputs(encoder, encoded)
    if "mismatched" in needs.roles and len(rows) == 1:
        why = "alone in its batch: nothing to mismatch"
        encoder.notes.count("without_mismatch", rows[0].id, why, surveyed=False)
        inputs.response_mask[:, -1] = False
    batch = Batch(
        inputs=inputs,
        labels=torch.tensor(labels, dtype=torch.float32),
        row_weight=torch.tensor([example.weight for example in rows], dtype=torch.float32),
        ids=tuple(example.id for example in rows),
    )
    return batch, encoded


def _inputs(encoder: Encoder, encoded: Encoded) -> TextInputs:
    inputs: dict[str, Any] = {}
    for name in ("prompt", "response"):
        ids = [[getattr(item, name) for item in row] for row in encoded]
        inputs[f"{name}_ids"] = _pad(ids, encoder.pad_id)
        # By length and never by id: the pad token may be the end token, which is scored.
        inputs[f"{name}_mask"] = _pad([[[1] * len(i) for i in row] for row in ids], 0).bool()
    if any(item.scored for row in encoded for item in row):
        inputs["response_scored"] = _pad([[item.mask for item in row] for row in encoded], 0).bool()
    if encoder.uses_spans:
        inputs["span_mask"] = _pad([encoder.span_masks(row) for row in encoded], 0).bool()
    if encoder.uses_steps:
        inputs["step_index"] = _pad([[item.steps for item in row] for row in encoded], 0)
    return TextInputs(**inputs)


def _selected(example: Example, needs: Needs) -> Example:
    """The rated candidates and those of the roles asked for, in that order."""
    pairs = list(zip(example.candidates, example.labels, strict=True))
    kept = [pair for pair in pairs if not pair[0].role]
    for role in dict.fromkeys(needs.roles):
        if role == "mismatched":  # made from the batch
            continue
        found = [pair for pair in pairs if pair[0].role == role]
        wanted = needs.roles.count(role)
        if len(found) < wanted:
            raise NeedsError(
                f"row {example.id!r}: the objective needs {wanted} {role!r} response(s), the row "
                f"has {len(found)}; add the field {role!r} to the data"
            )
        kept += found[:wanted]
    candidates, labels = zip(*kept, strict=True)
    return replace(example, candidates=candidates, labels=labels)


def _pad(rows: Sequence[Sequence[Sequence[int]]], value: int) -> Tensor:  # -> [B, K, L]
    length = max(len(item) for row in rows for item in row)
    padded = [[[*item, *[value] * (length - len(item))] for item in row] for row in rows]
    return torch.tensor(padded, dtype=torch.long)


class Encoder:
    """Turns examples into batches for one tokenizer and one config."""

    chat_class: ClassVar[type[ChatTemplate]] = ChatTemplate

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: RunConfig,
        *,
        owner: Any = None,
        plain: PlainText | None = None,
    ) -> None:
        """Check that the tokenizer can do what `data` and `text` of the config ask.

        Args:
            tokenizer: Of the model.
            config: The run's.
            owner: What has the chat template; None: the tokenizer.
            plain: Writes prompts where no chat template is in use; None: as they are.

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
        self._model = config.model
        self.notes = Notes()
        chat = self._chat(tokenizer if owner is None else owner)
        self.render = chat or plain or PlainText()
        for name in ("system_prompt", "template_kwargs"):
            if chat is None and getattr(self.text, name):
                raise ConfigError(
                    f"text.{name} is set, but no chat template is in use (the tokenizer has none, "
                    "or text.chat_template is false). Put the text into the prompts"
                )
        if kind in ("spans", "steps") and not self._tokenize.has_offsets:
            raise ConfigError(
                f"text.masks.kind is {kind!r}, which needs character offsets; "
                f"{type(tokenizer).__name__} has none. Use a fast tokenizer"
            )
        self._embedded: int | None = None

    def use_ids_below(self, embedded: int, key: str = "model.path") -> None:
        """From now on, refuse rows with a token that a model, which embeds so many, lacks.

        A tokenizer may have more tokens than the model embeds: some families share one among models
        of several kinds.

        Raises:
            ConfigError: naming the config's `key`, where every row has such a token.
        """
        largest = max(self.frame_ids, default=0)
        if largest >= embedded:
            raise ConfigError(
                f"{key}: every row is written with {named(self.tokenizer, largest)}, but the model "
                f"embeds {embedded} tokens, 0 to {embedded - 1}: the two do not belong together, "
                "or the tokenizer got tokens that the model did not"
            )
        self._embedded = min(embedded, self._embedded or embedded)
        if self._tokenize.pad_id >= embedded:
            self._tokenize.pad_id = 0  # masked: any token that the model has will do

    def _chat(self, owner: Any) -> ChatTemplate | None:
        """The chat template in use: the owner's, or the config's, which becomes the owner's."""
        given = self.text.chat_template
        if isinstance(given, Path):
            owner.chat_template = template_file(given)  # and is saved beside trained weights
        if given is False or getattr(owner, "chat_template", None) is None:
            return None
        today = self.text.date or datetime.date.today()
        template = JinjaTemplate(owner, self.text.template_kwargs, today)
        return self.chat_class(template, self.text.system_prompt, self._ends, self.notes)

    @cached_property
    def _ends(self) -> Ends:
        return Ends(self.tokenizer, partial(stop_ids, self._model))

    @property
    def counts(self) -> Counter[str]:
        """Rows concerned, by what was done to them; a row counts once however often it is encoded.

        `prompts_cut`, `responses_cut`, `boundary_moved` (prompt tokens merged with a response),
        `prompts_empty`, `without_mismatch`, `without_template` (conversations as transcripts),
        `thoughts_closed` (opened by the prompt, none in the response), `thoughts_after_closed`,
        `thoughts_left_out` (of earlier turns of a response, by the chat template).
        Loader workers keep their own counts; `text.survey` counts all rows of a run.
        """
        return self.notes.counts

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end a response, where generation stops.

        The template's end token, the tokenizer's eos, and what the model's own settings name.
        """
        ids = set(self._ends.stops)
        if self._tokenize.eos_id is not None:
            ids.add(self._tokenize.eos_id)
        return frozenset(ids | self._end_ids(self.render))

    def _end_ids(self, render: ChatTemplate | PlainText) -> set[int]:
        """The token in which a template ends a response."""
        if not isinstance(render, ChatTemplate):
            return set()
        tokens, _ = self._tokenize(render.end(), add_leading=False)
        return set(tokens[-1:]) & self._tokenize.ends

    @cached_property
    def _end_id(self) -> int | None:
        """What ends a response after which no end is written."""
        own, stops = self._tokenize.eos_id, sorted(self._ends.stops)
        if own is not None:
            return own
        if len(stops) == 1:
            name: Any = self.tokenizer.convert_ids_to_tokens(stops[0])
            self.notes.say(
                f"the tokenizer has no end token; the model's, {name}, is scored after responses"
            )
            return stops[0]
        self.notes.say(
            "neither tokenizer nor chat template has an end token, so none is trained after a "
            "response; set eos_token in the tokenizer's files"
        )
        return None

    @property
    def frame_ids(self) -> frozenset[int]:
        """Tokens that stand around every prompt, or end every response."""
        eos = self._tokenize.eos_id
        if not isinstance(self.render, ChatTemplate):
            return frozenset(self._tokenize.leading) | ({eos} if eos is not None else frozenset())
        try:
            text = self.render.context("Hello", "prompt") + self.render.end()
        except DataError:  # the template wants other turns than a question
            return frozenset()
        return frozenset(self._ids(text)[0])

    @property
    def pad_id(self) -> int:
        """Fills padded positions, which are masked."""
        return self._tokenize.pad_id

    def writes_special(self, text: str) -> bool:
        """Whether a special token of the tokenizer is written in a text."""
        return self._ends.first(text) is not None

    def encode_prompt(self, prompt: Prompt | Asked, *, where: str = "prompt") -> list[int]:
        """The context to generate a response from: the one that training scores responses in."""
        where = prompt.place or where if isinstance(prompt, Asked) else where
        ids, _ = self._ids(self.render.context(prompt, where))
        return self._known(self.cut_prompt(self._started(ids, where), where), where)

    def encode_example(
        self, example: Example, read: Read | None = None
    ) -> tuple[EncodedCandidate, ...]:
        """Every candidate of the row, in the row's order; candidates of one context share its ids.

        Args:
            example: The row.
            read: Has the media that were read before, and gets those read now.

        Raises:
            DataError: when a response has no token, the chat template loses a part of it, or media
                cannot be shown.
        """
        read = {} if read is None else read
        groups: dict[tuple[Prompt, Media], list[int]] = {}
        for index, candidate in enumerate(example.candidates):
            prompt = example.prompt if candidate.prompt is None else candidate.prompt
            media = example.media if candidate.media is None else candidate.media
            groups.setdefault((prompt, media), []).append(index)
        encoded: dict[int, EncodedCandidate] = {}
        for (prompt, media), indices in groups.items():
            members = [example.candidates[index] for index in indices]
            if not self.render.is_chat and not isinstance(prompt, str):
                self.notes.count("without_template", example.id)
            items = self._in_context(prompt, media, members, example, read)
            encoded.update(zip(indices, items, strict=True))
        return tuple(encoded[index] for index in range(len(encoded)))

    def _in_context(
        self, prompt: Prompt, media: Media, members: Sequence[Candidate], row: Example, read: Read
    ) -> list[EncodedCandidate]:
        """Candidates of a row under one prompt; models of text pass over `media`."""
        asked = Asked(prompt, row.template) if row.template else prompt
        return self._group(asked, members, row.id, self.render)

    def collate(self, examples: Sequence[Example], needs: Needs) -> Batch[TextInputs]:
        """A batch on the CPU: rated candidates, then the extra roles of `needs`; see `collate`."""
        return collate(self, examples, needs, self.encode_example)[0]

    def fingerprint(self) -> str:
        """Hash of everything that decides the tokens: tokenizer, template, limits, code version."""
        settings: dict[str, Any] = {
            "version": VERSION,
            "tokenizer": self._tokenize.identity(),
            "template": None,
            "train_on": self.text.train_on,
            "limits": [self.data.max_prompt_length, self.data.max_response_length],
            "truncate_prompt": self.data.truncate_prompt,
        }
        if isinstance(self.render, ChatTemplate):
            settings["template"] = self.render.identity()
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
        prompt: Prompt | Asked,
        candidates: Sequence[Candidate],
        row: str,
        render: ChatTemplate | PlainText,
        expand: Callable[[str], str] | None = None,
    ) -> list[EncodedCandidate]:
        """Candidates under one prompt, whose ids are cut to what all of them start with.

        Prompt and response are tokenized as one text. Where the prompt's last tokens merge with a
        response, the responses of all sides start at the first token that any side changed.
        `render` writes them, and `expand` rewrites the context before it is tokenized.
        """
        context, responses = render.responses(
            prompt, candidates, row, last=self.text.train_on == "last"
        )
        if expand is not None:
            context = expand(context)
        alone, _ = self._ids(context)
        joined = [
            self._joined(context, response, candidate.complete, row)
            for response, candidate in zip(responses, candidates, strict=True)
        ]
        shared = min(alike(alone, ids) for ids, _ in joined)
        if shared < len(alone):
            why = "prompt and response merge; responses start early"
            self.notes.count("boundary_moved", row, why)
        prompt_ids = self._known(self.cut_prompt(self._started(alone[:shared], row), row), row)
        encoded: list[EncodedCandidate] = []
        for (ids, offsets), response, candidate in zip(joined, responses, candidates, strict=True):
            stop = shared + self.data.max_response_length
            scored = self._scored(offsets[shared:stop], len(context), response, row)
            if len(ids) == shared or (scored and not any(scored)):
                raise DataError(f"{row}: a response has no token to score; remove the row")
            if len(ids) > stop:
                self.notes.count("responses_cut", row)
            start = len(context) + (response.offset or 0)
            local = [(first - start, last - start) for first, last in offsets[shared:stop]]
            marks = self._marks(local, response, candidate, row)
            answer = self._known(ids[shared:stop], row)
            cut = len(ids) > stop
            encoded.append(EncodedCandidate(prompt_ids, answer, *marks, scored=scored, cut=cut))
        return encoded

    def _scored(self, offsets: Offsets, start: int, response: Response, row: str) -> list[bool]:
        """Which tokens the assistant wrote, of a response of several turns; empty: all of them."""
        if response.scored is None:
            return []
        if not self._tokenize.has_offsets:
            raise DataError(
                f"{row}: the response has several turns, whose tokens are found by character "
                f"offsets; {type(self.tokenizer).__name__} has none. Use a fast tokenizer"
            )
        ranges = [(start + first, start + last) for first, last in response.scored]
        return mark_ranges(offsets, ranges)

    def _joined(
        self, context: str, response: Response, complete: bool, row: str
    ) -> tuple[list[int], Offsets]:
        """Context and response as one token sequence, with the end token of a complete response."""
        if not complete:
            return self._ids(context + response.body)
        text = context + response.body + response.end
        ids, offsets = self._ids(text)
        eos = self._end_id if response.with_eos else None
        if eos is None or ids[-1:] == [eos]:
            return ids, offsets
        return [*ids, eos], [*offsets, (len(text), len(text))]

    def _marks(
        self, offsets: Offsets, response: Response, candidate: Candidate, row: str
    ) -> tuple[list[bool], list[int]]:
        """Spans and steps, from token ranges counted from the first character of the response."""
        of_record = self.masks is not None and self.masks.kind == "spans"
        wants_spans = of_record and bool(candidate.spans)
        if response.offset is None and (wants_spans or self.uses_steps):
            raise DataError(
                f"{row}: the response has several turns, or the chat template rewrites it, so its "
                "spans and steps cannot be placed; set text.chat_template: false"
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
        self.notes.count("prompts_empty", row)
        for start in (self._tokenize.bos_id, self._tokenize.eos_id):
            if start is not None:
                return [start]
        raise DataError(
            f"{row}: the prompt is empty, and the tokenizer has neither a bos nor an eos token to "
            "start from; give a prompt"
        )

    def cut_prompt(self, ids: list[int], row: str) -> list[int]:
        """A prompt at most `data.max_prompt_length` long."""
        limit = self.data.max_prompt_length
        if len(ids) <= limit:
            return ids
        self.notes.count("prompts_cut", row)
        if self.data.truncate_prompt == "keep_start":
            return ids[:limit]
        keeps_bos = ids[0] == self._tokenize.bos_id and limit > 1  # models lean on their bos
        return [ids[0], *ids[len(ids) - limit + 1 :]] if keeps_bos else ids[len(ids) - limit :]

    def _known(self, ids: list[int], row: str) -> list[int]:
        """The ids, all of which the model has, where a model is there to ask."""
        if self._embedded is not None:
            require_ids(ids, self._embedded, self.tokenizer, row)
        return ids
