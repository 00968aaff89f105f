"""The rows of a run with media, all looked at before a model is loaded: files, sizes, tokens."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from mmalign.config import RunConfig
from mmalign.core import Needs
from mmalign.data.example import Clip, Example, Media
from mmalign.data.opening import amount
from mmalign.errors import ConfigError, DataError
from mmalign.models.adapter import Surveyed
from mmalign.text.cache import cache_folder
from mmalign.text.masks import with_spans
from mmalign.text.model import Limits, model_limits
from mmalign.text.survey import Found, findings, lines, problems, require_lesson, too_long
from mmalign.video.augment import seed_for
from mmalign.video.candidates import Perturbation
from mmalign.video.checks import FILE, MediaReport, check_media, keep_usable, leave_out, uses_of
from mmalign.video.encode import VideoEncoder, token_counts
from mmalign.video.processing import Processor, load_processor
from mmalign.video.reader import PlannedReader

log = logging.getLogger(__name__)

_MUCH = 200 * 2**20  # bytes of the frames of one clip


def taken(parts: Sequence[Sequence[Example]], processor: Processor) -> list[list[Example]]:
    """The rows with nothing but media of kinds that the model takes; others are counted.

    Raises:
        DataError: There are others, and `video.bad_media` is stop, or no row of the first part is
            left.
    """

    def foreign(row: Example) -> set[str]:
        shown = (media.by_kind() for media in shown_by(row))
        return {kind for media in shown for kind in media if media[kind]} - set(processor.tokens)

    found = {id(row): (row, kinds) for part in parts for row in part if (kinds := foreign(row))}
    kept = [[row for row in part if id(row) not in found] for part in parts]
    if not found:
        return kept
    row, kinds = next(iter(found.values()))
    said = (
        f"{len(found)} of {sum(map(len, parts))} rows have {' and '.join(sorted(kinds))} "
        f"(the first is {row.id!r}), which {type(processor.inner).__name__} does not take"
    )
    if processor.video.bad_media == "stop" or not kept[0]:
        raise DataError(f"{said}. Take them out, or use a model that does")
    log.warning("%s; they are left out", said)
    return kept


def survey_parts(config: RunConfig, needs: Needs, parts: Sequence[Sequence[Example]]) -> Surveyed:
    """What training would meet in these rows, and those without problems: `Tools.survey`.

    Raises:
        DataError: A file cannot be used and `video.bad_media` is stop; no row is left; all pairs
            are the same on both sides; none has a span.
        ConfigError: Processor, tokenizer or template cannot do what the config asks.
    """
    processor = Processor(load_processor(config), config)
    uses_audio = processor.uses_clip_audio
    possible = taken(parts, processor)
    report = look_at(config, processor, possible)
    kept = keep_usable(possible, report, config.video, uses_audio=uses_audio)
    reader = PlannedReader(processor, config, report.seen)
    encoder = counting_encoder(config, reader)
    kept = _fitting(kept, reader)
    donors = tuple(dict.fromkeys(clip for row in kept[0] for clip in row.media.videos))
    alter = Perturbation(config.video, uses_audio, donors, report.seen)
    kept, bare = _perturbable(kept, alter, needs.roles)
    rows = list({id(row): row for part in kept for row in part}.values())
    limits = replace(model_limits(config), embedded=None)
    added = () if limits.together is None else alter.roles(needs.roles)

    def decides(row: Example) -> tuple[Any, ...]:
        media = (row.media, *(c.media for c in row.candidates))
        return added, *(item and reader.tokens(item) for item in media)

    def whole(row: Example) -> Example:
        return row if id(row) in bare else alter(row, needs.roles, seed_for(0, row.id, 0, 0))

    found = findings(config, encoder, rows, limits, decides, whole)
    found.problems += [(number, bare[id(row)], "") for number, row in enumerate(rows)
                       if id(row) in bare]  # fmt: skip
    kept = _within(kept, rows, found, limits, encoder)
    bad = {id(rows[number]) for number, *_ in found.problems}
    kept = [[row for row in part if id(row) not in bad] for part in kept]
    numbers = {id(row): number for number, row in enumerate(rows)}
    require_lesson(found, [numbers[id(row)] for row in kept[0]], rows)
    told = [*lines(found, rows, config.data), *_large_clips(kept, processor, report)]
    learned = [with_spans(config.text.masks, part, encoder.encode_example) for part in kept]
    return Surveyed(learned, tuple(told), problems(found, rows))


def look_at(
    config: RunConfig, processor: Processor, parts: Sequence[Sequence[Example]]
) -> MediaReport:
    """What is known of the media of rows; what no run found whole before is decoded."""
    return check_media(
        [row for part in parts for row in part],
        config.video,
        uses_audio=processor.uses_clip_audio,
        journal=cache_folder(config) / FILE,
        longest=processor.longest_sound,
    )


def counting_encoder(config: RunConfig, reader: PlannedReader) -> VideoEncoder:
    """An encoder that needs no pixels of what its reader knows."""
    encoder = VideoEncoder.without_model(reader.processor, config, reader)
    encoder.notes.quiet = True
    return encoder


def shown_by(row: Example) -> Iterable[Media]:
    """What the prompts of a row and of its candidates show, each once."""
    media = (row.media, *(c.media for c in row.candidates if c.media is not None))
    return dict.fromkeys(item for item in media if item)


def _fitting(parts: list[list[Example]], reader: PlannedReader) -> list[list[Example]]:
    """The rows whose media the processor takes."""

    @cache
    def fault(media: Media) -> str:
        try:
            reader.tokens(media)
        except DataError as error:
            return f"{_files(media)}: {str(error).removeprefix(': ')}"
        return ""

    rows = {id(row): row for part in parts for row in part}
    found = {key: next(filter(None, map(fault, shown_by(row))), "") for key, row in rows.items()}
    return leave_out(parts, {key: text for key, text in found.items() if text}, reader.video)


def _perturbable(
    parts: list[list[Example]], alter: Perturbation, roles: Sequence[str]
) -> tuple[list[list[Example]], dict[int, str]]:
    """The rows whose media can be perturbed as the objective asks, and by id() what others lack."""
    faults: dict[int, str] = {}
    bare: dict[int, str] = {}
    for row in {id(row): row for part in parts for row in part}.values():
        try:
            alter(row, roles, seed_for(0, row.id, 0, 0))
        except DataError as error:
            bare[id(row)] = str(error).removeprefix(f"{row.id}: ")
        except ConfigError as error:
            faults[id(row)] = f"{_files(row.media)}: {error}"
    return leave_out(parts, faults, alter.video), bare


def _large_clips(
    parts: Sequence[Sequence[Example]], processor: Processor, report: MediaReport
) -> list[str]:
    """A sentence where clips take much memory, since the processor wants frames so large."""
    found: list[tuple[int, str]] = []
    heard = processor.uses_clip_audio
    for use in {use for part in parts for row in part for use in uses_of(row, uses_audio=heard)}:
        clip, seen = use[0], report.seen.get(use)
        if seen is None or not isinstance(clip, Clip):
            continue
        count = len(seen.indices)
        height, width = processor.sizes.decoded(count, *seen.size, clip.max_pixels)
        shown = f"{count} frames of {width} x {height} of {clip.path}"
        found.append((3 * count * height * width, shown))
    much = sum(size > _MUCH for size, _ in found)
    if not much:
        return []
    most, shown = max(found)
    name = type(processor.inner).__name__
    return [
        f"{much:,} of {len(found):,} clips are read at a size that takes up to {amount(most)} "
        f"of memory each, as {name} takes them ({shown}); fewer frames, a smaller "
        "video.frame_pixels where the processor has one, or smaller files take less"
    ]


def _within(
    parts: list[list[Example]],
    rows: Sequence[Example],
    found: Found,
    limits: Limits,
    encoder: VideoEncoder,
) -> list[list[Example]]:
    """The rows with media that are not beyond the model's positions; others stay problems."""
    if limits.positions is None:
        return parts
    faults: dict[int, str] = {}
    for item in list(found.problems):
        number, what, value = item
        if what != too_long(limits.positions):
            continue
        row = rows[number]
        counts: dict[Media, int] = {}  # with the tokens around and between media
        for media in shown_by(row):
            processed = encoder.reader.prepare(media, row.id).processed
            counts[media] = sum(map(sum, token_counts(encoder, processed).values()))
        if not counts:
            continue
        media, count = max(counts.items(), key=lambda pair: pair[1])
        if int(re.sub(r"\D", "", value)) - count > limits.positions:
            continue  # its words alone are too many
        found.problems.remove(item)
        faults[id(row)] = (
            f"{_files(media)}: takes {count:,} tokens, with which a row is beyond the model's "
            f"{limits.positions:,} positions ({value}); lower video.num_frames, max_frames or "
            "frame_pixels"
        )
    return leave_out(parts, faults, encoder.reader.video)


def _files(media: Media) -> str:
    return ", ".join(dict.fromkeys(map(str, media.files())))
