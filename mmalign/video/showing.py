"""Answers of the policy in the course of a run, with all that a reader needs to judge them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.data.example import as_text
from mmalign.video import strips
from mmalign.video.costs import costs
from mmalign.video.prompt import MARK

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mmalign.config import SampleConfig
    from mmalign.data.example import Asked, Candidate, Example, Media, Picture, Prompt
    from mmalign.text.masks import EncodedCandidate
    from mmalign.video.adapter import VideoAdapter
    from mmalign.video.encode import VideoEncoder
    from mmalign.video.generate import Question
    from mmalign.video.processing import Shown

FRAMES = "samples/frames"
"""Folder of the sheets, inside the run folder; they are the same at every step."""


def write_samples(
    adapter: VideoAdapter,
    prompts: Mapping[str, Question],
    folder: Path,
    step: int,
    options: SampleConfig,
) -> list[dict[str, Any]]:
    """Answer questions, and write a sheet of what each one shows where it is not there yet.

    Args:
        adapter: In evaluation mode.
        prompts: Row id to question.
        folder: The run folder.
        step: Optimiser steps done; the same questions show the same at each.
        options: The config's `sample` section.

    Returns:
        A record a question: `id`, `prompt` in words, `response`; `media` and `frames`, the sheet's
        path inside the run folder; `answers` of the data with their spans; `altered`, the row's
        altered clips (see `_alterations`). What a question has not is left out.
    """
    settings = options.model_dump(exclude={"num_prompts", "prompts"})
    texts = adapter.sample(list(prompts.values()), **settings)
    records: list[dict[str, Any]] = []
    for number, ((row, question), text) in enumerate(zip(prompts.items(), texts, strict=True)):
        words = in_words(question.prompt)
        record: dict[str, Any] = {"id": row, "prompt": words, "response": text}
        if question.media:
            shown = adapter.encoder.reader.show(question.media)
            file = f"{FRAMES}/{number:03d}.webp"
            image = strips.sheet(shown)
            if image is not None and not (folder / file).exists():
                strips.write(image, folder / file)
            about = described(adapter.encoder, question.media, shown, row)
            record |= {"media": about, "frames": file}
        if question.row is not None:
            record["answers"] = _answers(adapter, question.row)
            found = _alterations(adapter, question.row, folder, number)
            record |= {"altered": found} if found else {}
        records.append(record)
    return records


def in_words(prompt: Prompt | Asked) -> str:
    """A prompt's text: marks of media in front are left out, those within it become words."""
    if isinstance(prompt, tuple) and len(prompt) == 1 and prompt[0].role == "user":
        prompt = prompt[0].content
    text = as_text(prompt).strip()
    while (mark := MARK.match(text)) is not None:
        text = text[mark.end() :].lstrip()
    return MARK.sub(r"[\1]", text)


def describe(media: Media, shown: Shown) -> list[dict[str, Any]]:
    """Kind and file name of each medium, and what of it the model gets; seconds of a clip count
    from where it starts."""
    found: list[dict[str, Any]] = []
    for clip, (frames, wave), start in zip(media.videos, shown.clips, shown.starts, strict=True):
        height, width = frames.size or frames.pixels.shape[1:3]
        times = [round(time - start, 3) for time in frames.times]
        about = {"times": times, "width": width, "height": height, "heard": wave is not None}
        found.append({"kind": "video", "file": clip.path.name, **about})
    for picture, image in zip(media.images, shown.images, strict=True):
        about = {"width": image.width, "height": image.height}
        found.append({"kind": "image", "file": _name(picture), **about})
    for sound, wave in zip(media.sounds, shown.sounds, strict=True):
        seconds = round(wave.seconds, 3)
        found.append({"kind": "audio", "file": sound.path.name, "seconds": seconds})
    return found


def described(
    encoder: VideoEncoder, media: Media, shown: Shown, where: str
) -> list[dict[str, Any]]:
    """The same with what each medium becomes in the processor; see `costs`."""
    return [
        about | more
        for about, more in zip(
            describe(media, shown), costs(encoder, media, shown, where), strict=True
        )
    ]


def _name(picture: Picture) -> str:
    return str(replace(picture, path=Path(picture.path.name)))


def _answers(adapter: VideoAdapter, row: Example) -> list[dict[str, Any]]:
    """The rated answers of a row: `name`, `text`, and the `spans` that the loss reads, if any."""
    rated = row.candidates[: row.num_rated]
    masks = adapter.config.text.masks
    spans = [list(candidate.spans) for candidate in rated]
    if masks is not None and masks.kind == "diff" and len(rated) > 1:
        spans = _differing(adapter, row)
    return [
        {"name": name, "text": as_text(candidate.response), "spans": marked}
        for name, candidate, marked in zip(_names(row), rated, spans, strict=True)
    ]


def _names(row: Example) -> list[str]:
    labels = row.labels[: row.num_rated]
    if row.kind == "pair" and not row.is_tie:
        best = max(range(len(labels)), key=labels.__getitem__)
        return ["Chosen" if i == best else "Rejected" for i in range(len(labels))]
    if row.kind == "plain":
        return ["Answer of the data"] * len(labels)
    if row.kind == "unpaired":
        return ["Desirable" if label > 0 else "Undesirable" for label in labels]
    return [f"Label {label:g}" for label in labels]


def _differing(adapter: VideoAdapter, row: Example) -> list[list[tuple[int, int]]]:
    """Character ranges of the tokens in which the answers differ."""
    encoder = adapter.encoder
    encoded = encoder.encode_example(row)
    masks = encoder.span_masks(encoded)
    return [
        _ranges(encoder.tokenizer, item, mask, candidate)
        for item, mask, candidate in list(zip(encoded, masks, row.candidates, strict=True))[
            : row.num_rated
        ]
    ]


def _ranges(
    tokenizer: Any, item: EncodedCandidate, mask: Sequence[bool], candidate: Candidate
) -> list[tuple[int, int]]:
    """Runs of marked tokens as character ranges of the answer, without spaces at their ends."""
    text = as_text(candidate.response)
    ends = [len(tokenizer.decode(item.response[:i])) for i in range(len(item.response) + 1)]
    found: list[tuple[int, int]] = []
    for start, end, marked in zip(ends, ends[1:], mask, strict=False):
        if not marked:
            continue
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], min(end, len(text)))
        elif start < len(text):
            found.append((start, min(end, len(text))))
    bare = [(end - len(text[start:end].lstrip()), end) for start, end in found]
    return [(start, end) for start, end in bare if start < end]


def _alterations(
    adapter: VideoAdapter, row: Example, folder: Path, number: int
) -> list[dict[str, Any]]:
    """The row's altered clips, the same ones at every step.

    Returns:
        A record each: `role`, `operation` and what was drawn for it, `frames`, a sheet of the clip
        above its altered self. Of PaMi's choice also `close`, `far` (nats) and `weight`.
    """
    full = adapter.altered(row)
    added = {c.media: c.role for c in reversed(full.candidates[len(row.candidates) :])}
    reader = adapter.encoder.reader
    found: list[dict[str, Any]] = []
    for media, role in reversed(added.items()):
        if media is None or media.change is None:
            continue
        file = f"{FRAMES}/{number:03d}-{len(found)}.webp"
        altered = reader.show(media)
        if not (folder / file).exists():
            own = reader.show(media.unchanged())
            strips.write(strips.compared(own, altered), folder / file)
        note = reader.notes[reader.key(media)]
        found.append({"role": role, **note, "frames": file})
    if "augmented" in adapter.needs.roles:
        device = next(adapter.policy.parameters()).device
        choice = adapter.choose(adapter.collate([row]).to(device))
        scores = zip(
            choice.close[0].tolist(), choice.far[0].tolist(), choice.weights[0].tolist(),
            strict=True,
        )  # fmt: skip
        clips = [record for record in found if record["role"] == "augmented"]
        for record, (close, far, weight) in zip(clips, scores, strict=True):
            record |= {"close": close, "far": far, "weight": weight}
    return found
