"""Examples to token ids where prompts show and play: every medium expanded, its run verified."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from mmalign.config import RunConfig
from mmalign.core import Needs
from mmalign.data.example import Asked, Candidate, Example, Media, Message, Prompt, Template
from mmalign.errors import ConfigError, DataError
from mmalign.models.batch import WHOLE, Batch, ModelInputs
from mmalign.text.encode import Encoder, Read, collate
from mmalign.text.masks import EncodedCandidate
from mmalign.text.messages import PlainText
from mmalign.text.packing import TextInputs
from mmalign.text.render import ChatTemplate
from mmalign.text.tokenizer import Offsets
from mmalign.video.clues import CLUE_TOKEN, clue_count, insert_clues
from mmalign.video.model import Encoded, TokenKinds
from mmalign.video.processing import Processed, Processor
from mmalign.video.reader import MediaReader, Prepared

Positions = Callable[[Tensor, Prepared], Tensor | None]
_Named = tuple[str, tuple[int, ...]]  # a context: the key of its media, the ids of its prompt

MARK = re.compile(r"<(video|image|audio)>")
"""What stands in a prompt's text for a clip, an image or a sound."""


def place(prompt: Prompt, media: Media, where: str) -> tuple[Message, ...]:
    """The conversation with a mark for every medium.

    A kind that the prompt does not name stands before the text of the first user turn.

    Raises:
        DataError: The prompt names more or fewer than there are.
    """
    turns = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    named = Counter(mark for turn in turns for mark in MARK.findall(turn.content))
    front = ""
    for kind, items in media.by_kind().items():
        if named[kind] not in (0, len(items)):
            raise DataError(
                f"{where}: the prompt names <{kind}> {named[kind]} times, but the row has "
                f"{len(items)}; name each once, or none"
            )
        front += f"<{kind}>" * (len(items) - named[kind])
    if not front:
        return turns
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None:
        raise DataError(f"{where}: no user turn in the prompt that could show the media")
    shown = replace(turns[first], content=front + turns[first].content)
    return (*turns[:first], shown, *turns[first + 1 :])


class MediaTemplate(ChatTemplate):
    """The processor's chat template; turns are lists of parts."""

    def content(self, text: str) -> Any:
        """A turn's text as the parts that chat templates of processors read."""
        found: list[dict[str, str]] = []
        for index, piece in enumerate(MARK.split(text)):
            if index % 2:
                found.append({"type": piece})
            elif piece.strip():
                # A line break between a mark and the words belongs to the template, not to them.
                found.append({"type": "text", "text": piece.lstrip("\n") if index else piece})
        return found

    def said(self, answer: str) -> Any:
        """An answer as a part, whatever marks it holds."""
        return [{"type": "text", "text": answer}]

    def told(self, turns: Sequence[Message]) -> Sequence[Message]:
        """The turns without the marks, which become tokens of media."""
        return [replace(turn, content=MARK.sub(" ", turn.content)) for turn in turns]


class MarkedText(PlainText):
    """No template: marks become the tokens that the processor replaces."""

    def __init__(self, tokens: dict[str, str]) -> None:
        """`tokens` holds the processor's own token of each kind."""
        self.tokens = tokens

    def context(self, prompt: Prompt | Asked, where: str) -> str:
        """The prompt's text, or the transcript, with the processor's tokens."""
        turns = prompt.prompt if isinstance(prompt, Asked) else prompt
        if isinstance(turns, tuple) and len(turns) == 1 and turns[0].role == "user":
            text = turns[0].content
            prompt = Asked(text, prompt.template) if isinstance(prompt, Asked) else text
        return MARK.sub(lambda mark: self._token(mark[1], where), super().context(prompt, where))

    def _opens(self, prompt: Prompt | Asked, context: str) -> bool:
        return False  # the words of an answer stand as the record has them

    def _token(self, kind: str, where: str) -> str:
        if kind not in self.tokens:
            raise ConfigError(
                f"{where}: the prompt has <{kind}>, which the model's processor does not know; it "
                f"takes {', '.join(self.tokens) or 'text only'}"
            )
        return self.tokens[kind]


@dataclass(frozen=True, slots=True)
class MediaInputs(ModelInputs):
    """The media of a context.

    Attributes:
        tensors: What the processor made of them; of encoded ones, `input_ids` of placeholders.
        features: What the language model takes for them, where that is known.
        key: Under which their features are kept; empty for media that do not come again.
        written: The `input_ids` as Python numbers.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict["str", "Tensor"], metadata=WHOLE)
    features: Encoded | None = None
    key: str = ""
    written: list[int] = field(default_factory=list["int"])

    @classmethod
    def of(cls, prepared: Prepared) -> Self:
        """As a batch carries them."""
        tensors = prepared.processed.tensors
        written = tensors["input_ids"].flatten().tolist()
        if prepared.encoded is not None:
            given = {"input_ids": tensors["input_ids"]}
            return cls(given, prepared.encoded, written=written)
        key = "" if prepared.operation else prepared.key
        return cls(dict(tensors), key=key, written=written)


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoInputs(TextInputs):
    """Tokens of a batch and the media that their prompts show.

    Attributes:
        context_media: The media that context c shows, counted from 1; 0 for none.
        context_operation: [C] long, how they are perturbed; see `mmalign.video.candidates`.
        positions: Context to [3, P] of the tokens of its prompt, for models that count so.
        media: All media of the batch.
    """

    context_media: tuple[int, ...]
    context_operation: Tensor = field(metadata=WHOLE)
    positions: dict[int, Tensor] = field(metadata=WHOLE)
    media: tuple[MediaInputs, ...]

    def of_candidates(self, facts: Tensor) -> Tensor:  # [B, K]
        """What is known of contexts [C], for each candidate."""
        assert self.context_index is not None
        return facts[self.context_index]


class VideoEncoder(Encoder):
    """Turns examples into batches for one processor and one config."""

    chat_class = MediaTemplate

    def __init__(
        self,
        processor: Processor,
        config: RunConfig,
        reader: MediaReader,
        positions: Positions | None = None,
        num_clues: Callable[[bool, bool], int] | None = None,
        shown_ids: frozenset[int] | None = None,
    ) -> None:
        """Check what `data`, `text` and `video` of the config ask.

        Args:
            processor: Of the model.
            config: The run's.
            reader: Decodes and processes media.
            positions: Positions of a prompt's ids [P] that shows something; None where no model is
                there to count them.
            num_clues: Clue tokens of a prompt that is seen, and heard; None for a model without.
            shown_ids: Tokens in whose place features stand, where the model is there to ask; they
                may be others than the text of a prompt has.
        """
        self.processor, self.kinds = processor, TokenKinds(processor.token_types)
        super().__init__(
            processor.tokenizer, config, owner=processor.inner, plain=MarkedText(processor.tokens)
        )
        own = processor.leading()
        self._tokenize.leading = self._tokenize.leading if own is None else own
        self.reader, self.positions, self.num_clues = reader, positions, num_clues
        written = frozenset(processor.token_ids.values())
        self.shown_ids = written if shown_ids is None else shown_ids
        self.media_ids = self.shown_ids | written
        if num_clues is not None:
            self.media_ids |= {processor.tokenizer.convert_tokens_to_ids(CLUE_TOKEN)}

    @classmethod
    def without_model(
        cls, processor: Processor, config: RunConfig, reader: MediaReader
    ) -> VideoEncoder:
        """One that writes the rows of a run as ever, but has no model to ask for positions."""
        count = None
        if config.video.clues is not None:
            processor.tokenizer.add_tokens([CLUE_TOKEN], special_tokens=True)
            count = clue_count(config.video.clues)
        return cls(processor, config, reader, num_clues=count)

    def _ids(self, text: str) -> tuple[list[int], Offsets]:
        # Processors put their bos before a chat template's text too, where it does not write one.
        return self._tokenize(text, add_leading=True)

    def _in_context(
        self, prompt: Prompt, media: Media, members: Sequence[Candidate], row: Example, read: Read
    ) -> list[EncodedCandidate]:
        placed, expand, shown = self._placed(prompt, media, row.id, read)
        asked = Asked(placed, row.template) if row.template else placed
        items = self._group(asked, members, row.id, self.renderer(media), expand)
        if any(self.media_ids & set(item.response) for item in items):
            raise DataError(
                f"{row.id}: a response writes one of the model's own tokens for media "
                f"({', '.join(self.processor.tokens.values())}); change the text"
            )
        return [replace(item, context=shown) for item in items]

    def encode_question(
        self, prompt: Prompt | Asked, media: Media, where: str
    ) -> tuple[list[int], Prepared | None]:
        """The context to generate an answer from, and what it shows, pixels and all."""
        row = Template()
        if isinstance(prompt, Asked):
            prompt, row = prompt.prompt, prompt.template
        known: dict[str, Prepared] = {}
        if media:
            key = self.reader.key(media)
            known[key] = self.reader.prepare(media, where, key=key, pixels=True)
        placed, expand, shown = self._placed(prompt, media, where, known)
        text = self.renderer(media).context(Asked(placed, row), where)
        ids, _ = self._ids(expand(text))
        ids = self._known(self.cut_prompt(self._started(ids, where), where), where)
        return ids, shown

    def collate(self, examples: Sequence[Example], needs: Needs) -> Batch[VideoInputs]:
        """A batch on the CPU."""
        encode = partial(self.encode_example, read={})
        batch, encoded = collate(self, examples, needs, encode)
        contexts: dict[_Named, Prepared] = {}
        for item in chain.from_iterable(encoded):
            if item.context is not None:
                contexts.setdefault(_name(item), item.context)
        numbers = {name: number for number, name in enumerate(contexts, 1)}
        index = [[numbers.get(_name(item), 0) for item in row] for row in encoded]
        text = {item.name: getattr(batch.inputs, item.name) for item in fields(batch.inputs)}
        text["context_index"] = torch.tensor(index, dtype=torch.long)
        inputs = VideoInputs(**text, **self._media_inputs(contexts))
        return Batch(inputs, batch.labels, batch.row_weight, batch.ids)

    def fingerprint(self) -> str:
        """Hash of everything that decides tokens and features."""
        found = f"{super().fingerprint()}-{self.reader.key(Media())}"
        if not isinstance(self._clip_render, ChatTemplate) or self._clip_render is self.render:
            return found
        own = json.dumps(self._clip_render.identity(), sort_keys=True)
        return f"{found}-{hashlib.sha256(own.encode()).hexdigest()}"

    def _placed(
        self, prompt: Prompt, media: Media, where: str, known: dict[str, Prepared]
    ) -> tuple[Prompt, Callable[[str], str], Prepared | None]:
        """The prompt with its marks, how its text is expanded, and what it shows."""
        if not media:
            place(prompt, media, where)  # refuses marks of what is not there
            return prompt, partial(self._bare, where=where), None
        key = self.reader.key(media)
        if key not in known:
            known[key] = self.reader.prepare(media, where, key=key)
        prepared = known[key]
        counts = {kind: len(items) for kind, items in media.by_kind().items()}

        def expand(text: str) -> str:
            if CLUE_TOKEN in text and self.num_clues is not None:
                raise DataError(f"{where}: the prompt's text writes the model's own {CLUE_TOKEN}")
            for kind, token in self.processor.tokens.items():
                if text.count(token) != counts[kind]:
                    raise DataError(
                        f"{where}: the prompt's text has {token} {text.count(token)} times, but "
                        f"{counts[kind]} of kind {kind} are shown; the chat template leaves "
                        "media out, or the text itself writes the token"
                    )
            if self.num_clues is not None:
                heard = bool(media.sounds) or self.reader.uses_clip_audio(media)
                count = self.num_clues(bool(media.videos or media.images), heard)
                text = insert_clues(text, count, self.processor.tokens.values())
            return self.processor.expand(text, prepared.processed)

        return place(prompt, media, where), expand, prepared

    def renderer(self, media: Media) -> ChatTemplate | PlainText:
        """What writes a prompt that shows these media."""
        return self._clip_render if media.videos else self.render

    @cached_property
    def _clip_render(self) -> ChatTemplate | PlainText:
        """By a template of the processor's own for clips, unless the config gives one."""
        if not self.render.is_chat or isinstance(self.text.chat_template, Path):
            return self.render
        owner = copy(self.processor.inner)
        owner.chat_template = self.processor.clip_template()
        return self._chat(owner) or self.render

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end an answer, after a clip as well."""
        return super().end_ids | self._end_ids(self._clip_render)

    def _bare(self, text: str, where: str) -> str:
        """The text of a prompt that shows nothing."""
        for token in self.processor.tokens.values():
            if token in text:
                raise DataError(
                    f"{where}: the prompt's text writes the model's own {token}, but nothing is "
                    "shown; give the media, or change the text"
                )
        return text

    def _media_inputs(self, contexts: Mapping[_Named, Prepared]) -> dict[str, Any]:
        """Fields of `VideoInputs` that belong to the contexts of a batch."""
        media = {prepared.key: prepared for prepared in contexts.values()}
        places = {key: number for number, key in enumerate(media, 1)}
        shown = [0, *(places[key] for key, _ in contexts)]
        done = [0, *(prepared.operation for prepared in contexts.values())]
        positions: dict[int, Tensor] = {}
        if self.positions is not None:
            for number, (key, ids) in enumerate(contexts, 1):
                counted = self.positions(torch.tensor(ids), media[key])
                if counted is not None:
                    positions[number] = counted
        return {
            "context_media": tuple(shown),
            "context_operation": torch.tensor(done, dtype=torch.long),
            "positions": positions,
            "media": tuple(map(MediaInputs.of, media.values())),
        }

    def cut_prompt(self, ids: list[int], row: str) -> list[int]:
        """The words of a prompt cut to `data.max_prompt_length`; media are never cut into."""
        shown = [i for i, token in enumerate(ids) if token in self.media_ids]
        excess = len(ids) - len(shown) - self.data.max_prompt_length
        if not shown:
            return super().cut_prompt(ids, row)
        if excess <= 0:
            return ids
        start = shown[-1] + 1
        while start < len(ids) and ids[start] in self._tokenize.ends:
            start += 1  # the marker behind the media
        if len(ids) - start <= excess:
            raise DataError(
                f"{row}: the prompt has {len(ids) - len(shown)} tokens beside its media, "
                f"{excess} more than data.max_prompt_length, and only {len(ids) - start} of them "
                "follow the media, where they can be cut; raise it, or shorten the prompt"
            )
        self.notes.count("prompts_cut", row)
        if self.data.truncate_prompt == "keep_start":
            return ids[: len(ids) - excess]
        return ids[:start] + ids[start + excess :]


def _name(item: EncodedCandidate) -> _Named:
    return ("" if item.context is None else item.context.key, tuple(item.prompt))


def token_counts(encoder: VideoEncoder, processed: Processed) -> dict[str, list[int]]:
    """By kind, the tokens that stand for each medium, with those around and between them."""

    def count(text: str) -> int:
        return len(encoder.tokenizer(text, add_special_tokens=False)["input_ids"])

    return {kind: [count(t) for t in texts] for kind, texts in processed.replacements.items()}
