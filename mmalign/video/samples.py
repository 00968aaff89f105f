"""Answers of the policy during training, with sheets of what it was shown and played."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mmalign.config import SampleConfig
from mmalign.data.example import Asked, Candidate, Example, Media, Prompt, as_text
from mmalign.data.sheet import arranged, fitted
from mmalign.safe import replacing
from mmalign.text.masks import EncodedCandidate
from mmalign.video.adapter import VideoAdapter
from mmalign.video.encode import MARK, VideoEncoder, token_counts
from mmalign.video.generate import Question
from mmalign.video.processing import KINDS, DecodedMedia
from mmalign.video.sizes import Wave

_WIDTH = 1000  # of a sheet
_COLUMNS = 8
_SMALL, _LARGE = 64, 152  # sides between which frames are shown
_MOST = 64  # frames of a clip; more are shown in part
_GAP, _LINE, _CURVE = 6, 16, 44
_PAPER, _INK, _SOUND = "#16191f", "#c6ccd8", "#6fb1f2"
_MOST_BYTES = 250_000
_TRIES = ((82, 1.0), (60, 1.0), (40, 0.7), (25, 0.5))  # quality, share of the size; noise is last


def sheet(shown: DecodedMedia) -> Image.Image | None:
    """All media of a prompt, below each other; None where there are none."""
    blocks: list[Image.Image] = []
    several = len(shown.clips) + len(shown.sounds) > 1
    clips = zip(shown.clips, shown.starts, strict=True)
    for number, ((frames, wave), start) in enumerate(clips, 1):
        places = _places(len(frames.pixels), _MOST)
        name = f"video {number}" if several else ""
        if len(places) < len(frames.pixels):
            name = f"{name or 'video'}: {len(places)} of its {len(frames.pixels)} frames"
        if name:
            blocks.append(_words(name))
        pictures = [Image.fromarray(frames.pixels[i]) for i in places]
        blocks.append(_grid(pictures, [f"{frames.times[i] - start:.2f} s" for i in places]))
        if wave is not None:
            blocks.append(_curve(wave, "its sound", blocks[-1].width))
    if shown.images:
        names = [f"image {i}" if len(shown.images) > 1 else "" for i in range(1, _MOST + 1)]
        pictures = list(shown.images)[:_MOST]
        blocks.append(_grid(pictures, names[: len(pictures)]))
    for number, wave in enumerate(shown.sounds, 1):
        blocks.append(_curve(wave, f"sound {number}" if several else "sound"))
    return _stacked(blocks) if blocks else None


def compared(own: DecodedMedia, perturbed: DecodedMedia) -> Image.Image:
    """What is perturbed of a prompt's media, as it is and below it as it was made."""
    blocks: list[Image.Image] = []
    before, after = _first_sound(own), _first_sound(perturbed)
    moved = before and after and not np.array_equal(before.samples, after.samples)
    for name, shown, wave in (("as it is", own, before), ("altered", perturbed, after)):
        blocks.append(_words(name))
        if shown.clips:
            pixels = shown.clips[0][0].pixels
            pictures = [Image.fromarray(pixels[i]) for i in _places(len(pixels), _COLUMNS)]
        else:
            pictures = list(shown.images)[:1]
        if pictures:
            blocks.append(_grid(pictures, [""] * len(pictures)))
        if wave is not None and moved:
            blocks.append(_curve(wave, "sound", blocks[-1].width if pictures else _WIDTH))
    return _stacked(blocks)


def write(image: Image.Image, path: Path) -> None:
    """Write a WebP file of at most 250 kB, complete or not at all; of less size if it must be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        for quality, share in _TRIES:
            size = (round(image.width * share), round(image.height * share))
            smaller = image if share == 1.0 else image.resize(size, Image.Resampling.LANCZOS)
            smaller.save(temporary, format="WEBP", quality=quality)
            if temporary.stat().st_size <= _MOST_BYTES:
                break


def _places(count: int, most: int) -> list[int]:
    """At most `most` of `count` numbers, evenly spread, both ends among them."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()


def _grid(images: Sequence[Image.Image], labels: Sequence[str]) -> Image.Image:
    """Images in rows of eight, or of as many as fit, each over its label."""
    side = min(_LARGE, (_WIDTH + _GAP) // min(len(images), _COLUMNS) - _GAP)
    pictures = [fitted(image, _SMALL, side) for image in images]
    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    columns = max(1, (_WIDTH + _GAP) // (width + _GAP))
    line = _LINE if any(labels) else 0
    cells: list[Image.Image] = []
    for picture, label in zip(pictures, labels, strict=True):
        cell = Image.new("RGB", (width, height + line), _PAPER)
        cell.paste(picture, (0, 0))
        ImageDraw.Draw(cell).text((0, height + 1), label, font=_font(), fill=_INK)
        cells.append(cell)
    return arranged(cells, min(_COLUMNS, columns), gap=_GAP, margin=0, paper=_PAPER)


def _first_sound(shown: DecodedMedia) -> Wave | None:
    return shown.clips[0][1] if shown.clips else next(iter(shown.sounds), None)


def _curve(wave: Wave, name: str, width: int = _WIDTH) -> Image.Image:
    """The loudest of each column of pixels, around a middle line."""
    block = Image.new("RGB", (max(width, _LARGE), _CURVE + _LINE), _PAPER)
    draw = ImageDraw.Draw(block)
    middle = _CURVE // 2
    for column, part in enumerate(np.array_split(np.abs(wave.samples), block.width)):
        reach = round(float(part.max(initial=0.0)) * (middle - 1))
        draw.line([(column, middle - reach), (column, middle + reach)], fill=_SOUND)
    draw.text((0, _CURVE + 1), f"{name}, {wave.seconds:.1f} s", font=_font(), fill=_INK)
    return block


def _words(text: str) -> Image.Image:
    block = Image.new("RGB", (round(_font().getlength(text)) + 2, _LINE), _PAPER)
    ImageDraw.Draw(block).text((0, 1), text, font=_font(), fill=_INK)
    return block


def _stacked(blocks: Sequence[Image.Image]) -> Image.Image:
    return arranged(blocks, 1, gap=_GAP, margin=_GAP, paper=_PAPER)


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(12)


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
        step: Optimizer steps done; the same questions show the same at each.
        options: The config's `sample` section.

    Returns:
        A record a question: `id`, `prompt` in words, `response`; `media` and `frames`, the sheet's
        path inside the run folder; `answers` of the data with their spans; `altered`, the row's
        perturbed clips (see `_perturbations`). What a question has not is left out.
    """
    settings = options.model_dump(exclude={"num_prompts", "prompts"})
    texts = adapter.sample(list(prompts.values()), **settings)
    records: list[dict[str, Any]] = []
    for number, ((row, question), text) in enumerate(zip(prompts.items(), texts, strict=True)):
        words = in_words(question.prompt)
        record: dict[str, Any] = {"id": row, "prompt": words, "response": text}
        if question.media:
            shown = adapter.encoder.reader.decode(question.media)
            file = f"{FRAMES}/{number:03d}.webp"
            image = sheet(shown)
            if image is not None and not (folder / file).exists():
                write(image, folder / file)
            about = described(adapter.encoder, question.media, shown, row)
            record |= {"media": about, "frames": file}
        if question.row is not None:
            record["answers"] = _answers(adapter, question.row)
            found = _perturbations(adapter, question.row, folder, number)
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


def describe(media: Media, shown: DecodedMedia) -> list[dict[str, Any]]:
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
        name = str(replace(picture, path=Path(picture.path.name)))
        found.append({"kind": "image", "file": name, **about})
    for sound, wave in zip(media.sounds, shown.sounds, strict=True):
        seconds = round(wave.seconds, 3)
        found.append({"kind": "audio", "file": sound.path.name, "seconds": seconds})
    return found


def described(
    encoder: VideoEncoder, media: Media, shown: DecodedMedia, where: str
) -> list[dict[str, Any]]:
    """The same with what each medium becomes in the processor.

    Args:
        encoder: Of the model.
        media: By reference.
        shown: The same, decoded.
        where: The row, for messages.

    Returns:
        Of each also `tokens`, and `shown`, width and height after the processor, of clips and of
        images that it brings to one size.
    """
    processor = encoder.processor
    counts = token_counts(encoder, encoder.reader.prepare(media, where).processed)
    sizes = [
        *(processor.sizes.of(frames) for frames, _ in shown.clips),
        *(processor.image_sizes.only(1, image.height, image.width) for image in shown.images),
        *(None for _ in shown.sounds),
    ]
    tokens = [count for kind in KINDS for count in counts.get(kind, ())]
    return [
        about | {"tokens": count} | ({"shown": [*size[::-1]]} if size else {})
        for about, count, size in zip(describe(media, shown), tokens, sizes, strict=True)
    ]


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
    rated = row.candidates[: row.num_rated]
    parts = zip(encoded, encoder.span_masks(encoded), rated, strict=False)
    return [_ranges(encoder.tokenizer, *part) for part in parts]


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


def _perturbations(
    adapter: VideoAdapter, row: Example, folder: Path, number: int
) -> list[dict[str, Any]]:
    """The row's perturbed clips, the same ones at every step.

    Returns:
        A record each: `role`, `operation` and what was drawn for it, `frames`, a sheet of the clip
        above its perturbed self. Of PaMi's choice also `close`, `far` (nats) and `weight`.
    """
    full = adapter.perturbed(row)
    added = {c.media: c.role for c in reversed(full.candidates[len(row.candidates) :])}
    reader = adapter.encoder.reader
    found: list[dict[str, Any]] = []
    for media, role in reversed(added.items()):
        if media is None or media.change is None:
            continue
        file = f"{FRAMES}/{number:03d}-{len(found)}.webp"
        perturbed = reader.decode(media)
        if not (folder / file).exists():
            own = reader.decode(media.unchanged())
            write(compared(own, perturbed), folder / file)
        found.append({"role": role, **perturbed.note, "frames": file})
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
