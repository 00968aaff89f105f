"""Answers about what is shown, for reports, benchmarks and new pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmalign.data.example import Asked, Example, Media, Prompt
from mmalign.errors import DataError
from mmalign.models.adapter import Generated, answer_seeds
from mmalign.text.draw import complete
from mmalign.text.generate import left_padded, written
from mmalign.text.model import causal_model
from mmalign.video.clues import CluePart, placed
from mmalign.video.encode import VideoEncoder
from mmalign.video.model import encode, in_precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, repr=False)
class Question:
    """What a model is asked.

    Attributes:
        prompt: In words.
        media: The images, videos and audio it is about.
        row: Where it comes from, for reports; questions are the same whatever row asks them.
    """

    prompt: Prompt | Asked
    media: Media = field(default_factory=Media)
    row: Example | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        """What is asked, with the names of files: seeds of answers follow from it."""
        media = self.media
        shown = [
            replace(item, path=Path(item.path.name))
            for item in (*media.videos, *media.images, *media.sounds)
        ]
        return f"Question({self.prompt!r}, {shown!r}, {media.change!r})"


def generate(
    model: nn.Module,
    encoder: VideoEncoder,
    questions: Sequence[Question],
    *,
    seeds: Sequence[int] | None = None,
    **options: Any,
) -> list[str]:
    """One answer a question; `seeds` has one each, None: those of `answer_seeds` for seed 0."""
    seeds = answer_seeds(0, questions) if seeds is None else seeds
    found = respond(model, encoder, questions, 1, seeds=[[seed] for seed in seeds], **options)
    return [answer.response for [answer] in found]


def respond(
    model: nn.Module,
    encoder: VideoEncoder,
    questions: Sequence[Question],
    num: int,
    *,
    seeds: Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    batch_size: int | None = None,
    clues: CluePart | None = None,
) -> list[list[Generated]]:
    """Answers in the context that training scores them in; a clip is decoded once for all of them.

    Answers whose media have tensors of the same shape are drawn in one left-padded batch.

    Args:
        model: In evaluation mode.
        encoder: The prompts' encoder.
        questions: What to answer.
        num: Answers a question.
        seeds: `num` a question.
        max_new_tokens: Tokens at most, the end token included.
        temperature: 0 takes the most likely token each time.
        top_p: Sample from the smallest set of tokens with this probability.
        batch_size: Answers at one time; None: all.
        clues: The clue aggregator of a model that has one.

    Returns:
        `num` a question, the text as `written` gives it.
    """
    answers: list[list[Any]] = [[None] * num for _ in questions]
    inner = causal_model(model)
    encoded = [_context(encoder, question, i) for i, question in enumerate(questions)]
    for group in _groups(encoded):
        places = [(i, k) for i in group for k in range(num)]
        size = batch_size or len(places)
        for part in (places[start : start + size] for start in range(0, len(places), size)):
            rows = [encoded[i] for i, _ in part]
            with torch.no_grad(), _clued(clues, inner, rows, encoder):
                made = complete(
                    model,
                    _inputs(rows, encoder, inner.dtype),
                    ends=encoder.end_ids,
                    pad=encoder.pad_id,
                    seeds=[seeds[i][k] for i, k in part],
                    max_new_tokens=max_new_tokens,
                    temperature=temperature,
                    top_p=top_p,
                )
            for (i, k), found in zip(part, made, strict=True):
                text = written(encoder, encoded[i][0], found.tokens)
                answers[i][k] = Generated(text, len(found.tokens), found.cut, found.logp)
    return answers


def _inputs(
    rows: Sequence[tuple[list[int], dict[str, Tensor]]], encoder: VideoEncoder, dtype: torch.dtype
) -> dict[str, Any]:
    """What the model takes for contexts that share a batch."""
    ids, mask = left_padded([ids for ids, _ in rows], encoder.pad_id)
    parts = [tensors for _, tensors in rows]
    media = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    uses_audio = media.pop("audio_in_video", None) is not None
    types = encoder.processor.token_types(ids) if media else {}
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, **types}
    inputs |= {name: in_precision(tensor, dtype) for name, tensor in media.items()}
    return {**inputs, "use_audio_in_video": True} if uses_audio else inputs


def _context(
    encoder: VideoEncoder, question: Question, number: int
) -> tuple[list[int], dict[str, Tensor]]:
    if not isinstance(question, Question):
        raise DataError(f"question {number + 1}: is no question with media, but {question!r}")
    where = f"question {number + 1}" if question.row is None else question.row.id
    ids, prepared = encoder.encode_question(question.prompt, question.media, where)
    if prepared is None:
        return ids, {}
    tensors = prepared.processed.tensors
    of_text = {k for k in tensors if k.endswith("token_type_ids")} | {"input_ids", "attention_mask"}
    return ids, {k: v for k, v in tensors.items() if k not in of_text}


@contextmanager
def _clued(
    clues: CluePart | None,
    model: PreTrainedModel,
    rows: Sequence[tuple[list[int], dict[str, Tensor]]],
    encoder: VideoEncoder,
) -> Iterator[None]:
    """Generation with the clues of all rows, made from each one's own media."""
    if clues is None or not rows[0][1]:
        yield
        return
    made: list[Tensor] = []
    for ids, tensors in rows:
        shown = torch.tensor([i for i in ids if i in encoder.shown_ids], device=model.device)
        moved = {k: v.to(model.device) for k, v in tensors.items()}
        given = {**moved, "input_ids": shown[None]}
        encoded = encode(model, given, encoder.shown_ids, encoder.kinds)
        made.append(clues(model, encoded, ids))
    with placed(model.get_input_embeddings(), clues.clue_id, torch.cat(made)):
        yield


def _groups(encoded: Sequence[tuple[list[int], dict[str, Tensor]]]) -> list[list[int]]:
    """Questions that can share a batch: the same tensors, alike but for their first axis."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, (_, tensors) in enumerate(encoded):
        shape = tuple(sorted((name, *tensor.shape[1:]) for name, tensor in tensors.items()))
        groups.setdefault(shape, []).append(i)
    return list(groups.values())
