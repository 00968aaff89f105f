"""Examples to token ids where prompts show and play: every medium expanded, its run verified."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import TemplateError

from mmalign.data.example import Asked, Media, Template
from mmalign.errors import ConfigError, DataError
from mmalign.text.encode import Encoder
from mmalign.text.model import FAULTS
from mmalign.video import candidates
from mmalign.video.clue_part import CLUE_TOKEN, insert_clues
from mmalign.video.model import TokenKinds
from mmalign.video.processing import MarkedText, MediaTemplate, place

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from mmalign.config import RunConfig
    from mmalign.core import Needs
    from mmalign.data.example import Example, Prompt
    from mmalign.models.adapter import Batch
    from mmalign.text.masks import EncodedCandidate
    from mmalign.text.messages import PlainText
    from mmalign.text.render import ChatTemplate
    from mmalign.text.tokenizer import Offsets
    from mmalign.video.processing import Processed, Processor, Shown
    from mmalign.video.reader import MediaReader, Prepared


# Examples to token ids where prompts show and play: every medium expanded, its run verified.

if TYPE_CHECKING:
    Positions = Callable[[Tensor, Prepared], Tensor | None]


class VideoEncoder(Encoder):
    """Turns examples into batches for one processor and one config.

    Inputs of a batch beside those of a text batch, all of them `whole`:
        context_media: [C] long, the media that context c shows, counted from 1; 0 for none.
        context_operation: [C] long, how they are altered; see `mmalign.video.candidates`.
        positions/C: [3, P] of the tokens of a context's prompt, for models that count so.
        media/M/NAME: what the processor made of media M, where they must be encoded.
        media/M/tokens, media/M/deep/LAYER: [n, D], their features, where they are known.
        media/M/key: the media's identity, as bytes, where features are to be kept.
    """

    def __init__(
        self,
        processor: Processor,
        config: RunConfig,
        reader: MediaReader,
        positions: Positions,
        num_clues: Callable[[bool, bool], int] | None = None,
        shown_ids: frozenset[int] | None = None,
    ) -> None:
        """Check what `data`, `text` and `video` of the config ask.

        Args:
            processor: Of the model.
            config: The run's.
            reader: Decodes and processes media.
            positions: Positions of a prompt's ids [P] that shows something.
            num_clues: Clue tokens of a prompt that is seen, and heard; None for a model without.
            shown_ids: Tokens in whose place features stand, where the model is there to ask; they
                may be others than the text of a prompt has.
        """
        self.processor, self.kinds = processor, TokenKinds(processor.token_types)
        super().__init__(processor.tokenizer, config)
        own = processor.leading()
        self._tokenize.leading = self._tokenize.leading if own is None else own
        self.reader, self.positions, self.num_clues = reader, positions, num_clues
        written = frozenset(processor.token_ids.values())
        self.shown_ids = written if shown_ids is None else shown_ids
        self.media_ids = self.shown_ids | written
        if num_clues is not None:
            self.media_ids |= {processor.tokenizer.convert_tokens_to_ids(CLUE_TOKEN)}
        self._contexts: dict[tuple[str, tuple[int, ...]], int] = {}
        self._prepared: dict[str, Prepared] = {}
        self._operations: dict[str, int] = {}

    def _renderers(self) -> tuple[ChatTemplate | None, PlainText]:
        plain = MarkedText(self.processor.tokens)
        template = self._template(self.processor.inner)
        if template is None:
            return None, plain
        return MediaTemplate(template, self.text.system_prompt, self._ends, self.notes), plain

    def _ids(self, text: str) -> tuple[list[int], Offsets]:
        # Processors put their bos before a chat template's text too, where it does not write one.
        return self._tokenize(text, add_leading=True)

    def encode_example(self, example: Example) -> tuple[EncodedCandidate, ...]:
        """Every candidate of the row, in the row's order; candidates of one context share its ids.

        Raises:
            DataError: when a response has no token, or media cannot be shown.
        """
        groups: dict[tuple[Prompt, Media], list[int]] = {}
        for index, candidate in enumerate(example.candidates):
            prompt = example.prompt if candidate.prompt is None else candidate.prompt
            media = example.media if candidate.media is None else candidate.media
            groups.setdefault((prompt, media), []).append(index)
        encoded: dict[int, EncodedCandidate] = {}
        for (prompt, media), indices in groups.items():
            members = [example.candidates[index] for index in indices]
            placed, expand, key = self._placed(prompt, media, example.id)
            asked = Asked(placed, example.template) if example.template else placed
            if not self.render.is_chat and not isinstance(prompt, str):
                self.count("without_template", example.id)
            for index, item in zip(
                indices, self._group(asked, members, example.id, expand), strict=True
            ):
                if self.media_ids & set(item.response):
                    raise DataError(
                        f"{example.id}: a response writes one of the model's own tokens for media "
                        f"({', '.join(self.processor.tokens.values())}); change the text"
                    )
                encoded[index] = replace(item, context=self._context(key, item.prompt))
        return tuple(encoded[index] for index in range(len(encoded)))

    def encode_question(
        self, prompt: Prompt | Asked, media: Media, where: str
    ) -> tuple[list[int], Prepared | None]:
        """The context to generate an answer from, and what it shows, pixels and all."""
        words, row = (
            (prompt.prompt, prompt.template) if isinstance(prompt, Asked) else (prompt, Template())
        )
        self._prepared = {}
        if media:
            key = self.reader.key(media)
            self._prepared[key] = self.reader.prepare(media, where, key=key, pixels=True)
        placed, expand, key = self._placed(words, media, where)
        ids, _ = self._ids(expand(self.render.context(Asked(placed, row), where)))
        ids = self._known(self._cut_prompt(self._started(ids, where), where), where)
        return ids, self._prepared.get(key)

    def collate(self, examples: Sequence[Example], needs: Needs) -> Batch:
        """A batch on the CPU; see the class for its inputs."""
        self._contexts, self._prepared, self._operations = {}, {}, {}
        batch = super().collate(examples, needs)
        whole = self._media_inputs()
        inputs = {**batch.inputs, **whole}
        if "context_index" not in inputs:
            inputs["context_index"] = torch.zeros(batch.labels.shape, dtype=torch.long)
        return replace(batch, inputs=inputs, whole=frozenset(whole))

    def fingerprint(self) -> str:
        """Hash of everything that decides tokens and features."""
        return f"{super().fingerprint()}-{self.reader.key(Media())}"

    def _placed(
        self, prompt: Prompt, media: Media, where: str
    ) -> tuple[Prompt, Callable[[str], str], str]:
        """The prompt with its marks, how its text is expanded, and the key of its media."""
        if not media:
            place(prompt, media, where)  # refuses marks of what is not there
            return prompt, partial(self._bare, where=where), ""
        if media.videos and not self._writes_clips:
            raise ConfigError(
                f"model.path: {type(self.processor.inner).__name__} writes prompts with clips by a "
                "template of its own and not by the model's chat template; give the one that is "
                "meant as text.chat_template"
            )
        key = self.reader.key(media)
        if key not in self._prepared:
            self._prepared[key] = self.reader.prepare(media, where, key=key)
        self._operations[key] = candidates.number(media.change)
        prepared = self._prepared[key]
        counts = {"video": media.videos, "image": media.images, "audio": media.sounds}

        def expand(text: str) -> str:
            if CLUE_TOKEN in text and self.num_clues is not None:
                raise DataError(f"{where}: the prompt's text writes the model's own {CLUE_TOKEN}")
            for kind, token in self.processor.tokens.items():
                if text.count(token) != len(counts[kind]):
                    raise DataError(
                        f"{where}: the prompt's text has {token} {text.count(token)} times, but "
                        f"{len(counts[kind])} of kind {kind} are shown; the chat template leaves "
                        "media out, or the text itself writes the token"
                    )
            if self.num_clues is not None:
                text = self._with_clues(text, media)
            return self.processor.expand(text, prepared.processed)

        return place(prompt, media, where), expand, key

    @cached_property
    def _writes_clips(self) -> bool:
        """Whether the chat template in use is the one by which the processor writes clips."""
        inner: Any = self.processor.inner
        own = getattr(inner, "chat_template", None)
        if not self.render.is_chat or isinstance(self.text.chat_template, Path):
            return True
        turns = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "a"}]}]
        try:
            texts = {
                inner.apply_chat_template(turns, tokenize=False, chat_template=template)
                for template in (None, own)
            }
        except (*FAULTS, TemplateError):  # rows say what it cannot write
            return True
        return len(texts) == 1

    def _bare(self, text: str, where: str) -> str:
        """The text of a prompt that shows nothing."""
        for token in self.processor.tokens.values():
            if token in text:
                raise DataError(
                    f"{where}: the prompt's text writes the model's own {token}, but nothing is "
                    "shown; give the media, or change the text"
                )
        return text

    def _with_clues(self, text: str, media: Media) -> str:
        """Clue tokens before the first medium."""
        assert self.num_clues is not None
        heard = bool(media.sounds) or self.reader.hears_clip(media)
        count = self.num_clues(bool(media.videos or media.images), heard)
        return insert_clues(text, count, self.processor.tokens.values())

    def _context(self, key: str, prompt: list[int]) -> int:
        """The number of a context, from 1; 0 for one of text alone."""
        if not key:
            return 0
        return self._contexts.setdefault((key, tuple(prompt)), len(self._contexts) + 1)

    def _media_inputs(self) -> dict[str, Tensor]:
        keys = list(dict.fromkeys(key for key, _ in self._contexts))
        shown = [0, *(keys.index(key) + 1 for key, _ in self._contexts)]
        done = [0, *(self._operations[key] for key, _ in self._contexts)]
        inputs: dict[str, Tensor] = {
            "context_media": torch.tensor(shown, dtype=torch.long),
            "context_operation": torch.tensor(done, dtype=torch.long),
        }
        for (key, ids), number in self._contexts.items():
            positions = self.positions(torch.tensor(ids), self._prepared[key])
            if positions is not None:
                inputs[f"positions/{number}"] = positions
        for number, key in enumerate(keys, 1):
            for name, tensor in media_tensors(self._prepared[key]).items():
                inputs[f"media/{number}/{name}"] = tensor
        return inputs

    def cut_prompt(self, ids: list[int], row: str) -> list[int]:
        """Cut the words of a prompt to `data.max_prompt_length`; media are never cut into."""
        return self._cut_prompt(ids, row)

    def _cut_prompt(self, ids: list[int], row: str) -> list[int]:
        shown = [i for i, token in enumerate(ids) if token in self.media_ids]
        excess = len(ids) - len(shown) - self.data.max_prompt_length
        if not shown:
            return super()._cut_prompt(ids, row)
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
        self.count("prompts_cut", row)
        if self.data.truncate_prompt == "keep_start":
            return ids[: len(ids) - excess]
        return ids[:start] + ids[start + excess :]


def media_tensors(prepared: Prepared) -> dict[str, Any]:
    """What a batch carries of the media of a prompt."""
    encoded = prepared.encoded
    if encoded is not None:
        return encoded.named()
    if not prepared.recurs:
        return dict(prepared.processed.tensors)
    key = torch.frombuffer(bytearray(bytes.fromhex(prepared.key)), dtype=torch.uint8)
    return {"key": key, **prepared.processed.tensors}


# What media become in the model's processor: sizes of frames and pictures, tokens of a prompt.


def token_counts(encoder: VideoEncoder, processed: Processed) -> dict[str, list[int]]:
    """By kind, the tokens that stand for each medium, with those around and between them."""

    def count(text: str) -> int:
        return len(encoder.tokenizer(text, add_special_tokens=False)["input_ids"])

    return {kind: [count(t) for t in texts] for kind, texts in processed.replacements.items()}


def costs(encoder: VideoEncoder, media: Media, shown: Shown, where: str) -> list[dict[str, Any]]:
    """What each medium becomes, in the order videos, images, sounds.

    Args:
        encoder: Of the model.
        media: By reference.
        shown: The same, decoded.
        where: The row, for messages.

    Returns:
        `shown`, width and height after the processor, of clips and of pictures that it brings to
        one size; `tokens`.
    """
    processor = encoder.processor
    counts = token_counts(encoder, encoder.reader.prepare(media, where).processed)
    found: list[dict[str, Any]] = []
    for (frames, _), tokens in zip(shown.clips, counts.get("video", ()), strict=True):
        count, height, width = frames.pixels.shape[:3]
        size = processor.sizes.size(count, height, width, frames.area)
        found.append({"tokens": tokens} | ({"shown": [*size[::-1]]} if size else {}))
    for image, tokens in zip(shown.images, counts.get("image", ()), strict=True):
        size = processor.image_sizes.only(1, image.height, image.width)
        found.append({"tokens": tokens} | ({"shown": [*size[::-1]]} if size else {}))
    found += [{"tokens": tokens} for tokens in counts.get("audio", ())]
    return found
