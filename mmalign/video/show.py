"""What a model will see of rows, for a terminal: media with their times, context, scored tokens."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Group
from rich.text import Text

from mmalign.core import presets
from mmalign.text.tools import CONTEXT, counted, legend, response
from mmalign.video.augment import seed_for
from mmalign.video.candidates import Corruptor
from mmalign.video.clue_hook import CLUE_TOKEN
from mmalign.video.clues import ClueAggregator
from mmalign.video.encode import VideoEncoder
from mmalign.video.features import FeatureStore
from mmalign.video.processing import Processor, load_processor
from mmalign.video.reader import MediaReader
from mmalign.video.showing import described

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from mmalign.config import ClueSpec, RunConfig
    from mmalign.data.example import Example, Media

_MEDIA, _CUT = "cyan", "yellow"
_MOST_TIMES = 12


def show_rows(config: RunConfig, examples: Sequence[Example]) -> Group:
    """Rows as training will encode them, with their answers under altered clips; no weights.

    Clips that an alteration takes from are those of the rows shown.
    """
    processor = Processor(load_processor(config), config)
    count = None
    if config.video.clues is not None:
        processor.tokenizer.add_tokens([CLUE_TOKEN], special_tokens=True)
        count = clue_count(config.video.clues)
    reader = MediaReader(processor, config, FeatureStore(0))
    encoder = VideoEncoder(processor, config, reader, lambda ids, prepared: None, count)
    roles = presets.from_config(config.objective).needs.roles
    clips = dict.fromkeys(clip for row in examples for clip in row.media.videos)
    alter = Corruptor(config.video, processor.hears_clips, tuple(clips))
    blocks = [legend()]
    for row in examples:
        blocks += _row(encoder, alter(row, roles, seed_for(0, row.id, 0, 0)))
    return Group(*blocks, *counted(encoder))


def _row(encoder: VideoEncoder, row: Example) -> Iterator[Text]:
    yield Text(f"\n{row.id}  {row.kind}, weight {row.weight:g}", "bold")
    encoded = encoder.encode_example(row)
    masks = encoder.span_masks(encoded) if encoder.uses_spans else [item.spans for item in encoded]
    seen: object = None
    for item, spans, candidate, label in zip(
        encoded, masks, row.candidates, row.labels, strict=True
    ):
        media = row.media if candidate.media is None else candidate.media
        if seen != (media, item.prompt):
            seen = (media, item.prompt)
            yield from _media(encoder, media, row.id)
            yield _context(encoder, item.prompt)
        name = candidate.role or f"label {label:g}"
        head = f"[{name}] {len(item.prompt):,} + {len(item.response)} tokens: "
        item = replace(item, spans=spans)
        yield Text(head, "bold") + response(encoder.tokenizer, encoder.end_ids, item)


def _media(encoder: VideoEncoder, media: Media, where: str) -> Iterator[Text]:
    """A line for each medium, and one for what was done to them or left out."""
    reader, video = encoder.reader, encoder.reader.video
    for about in described(encoder, media, reader.show(media), where):
        line = f"{about['kind']} {about['file']}: "
        at = " at {} x {}".format(*about["shown"]) if "shown" in about else ""
        cost = f"shown{at} in {about['tokens']:,} tokens"
        if about["kind"] == "audio":
            yield Text(f"{line}{about['seconds']:.2f} s, in {about['tokens']:,} tokens", _MEDIA)
            continue
        size = f"{about['width']} x {about['height']}"
        if about["kind"] == "image":
            yield Text(f"{line}{size}, {cost}", _MEDIA)
            continue
        times: list[float] = about["times"]
        heard = "with its sound" if about["heard"] else "without sound"
        number = f"{len(times)} frame{'' if len(times) == 1 else 's'}"
        yield Text(f"{line}{number} of {size} at {_seconds(times)}, {heard}, {cost}", _MEDIA)
        rate = (len(times) - 1) / (times[-1] - times[0]) if times[-1] > times[0] else None
        if video.fps and rate and len(times) == video.max_frames and rate < 0.95 * video.fps:
            yield Text(
                f"cut: {rate:.2g} frames a second and not {video.fps:g}, since video.max_frames is "
                f"{video.max_frames}",
                _CUT,
            )
    if media.change is not None:
        note = dict(reader.notes[reader.key(media)])
        name, changed = note.pop("operation"), note.pop("changed")
        drawn = "; ".join(f"{key} {value}" for key, value in note.items())
        nothing = "" if changed else ", which changes nothing"
        yield Text(f"altered: {name}{nothing}{f' ({drawn})' if drawn else ''}", _CUT)


def _seconds(times: Sequence[float]) -> str:
    """The times of frames; of many only the first and the last ones."""
    shown = [f"{time:.2f}" for time in times]
    if len(shown) > _MOST_TIMES:
        half = _MOST_TIMES // 2
        shown = [*shown[:half], "...", *shown[-half:]]
    return f"{' '.join(shown)} s"


def _context(encoder: VideoEncoder, ids: Sequence[int]) -> Text:
    """The prompt, each run of tokens that stand for media as one and how many there are."""
    parts: list[str] = []
    for medium, run in groupby(ids, lambda token: token if token in encoder.media_ids else None):
        tokens = list(run)
        if medium is None:
            parts.append(str(encoder.tokenizer.decode(tokens)))
        else:
            name = str(encoder.tokenizer.convert_ids_to_tokens(medium))
            parts.append(f"{name} x {len(tokens):,} " if len(tokens) > 1 else name)
    return Text("".join(parts), CONTEXT)


def clue_count(spec: ClueSpec) -> Callable[[bool, bool], int]:
    """Clue tokens of a prompt; widths do not matter to their number."""
    if spec.path is not None:
        return ClueAggregator.load(spec.path).num_clue_tokens
    made = ClueAggregator(
        8, 8, 8, num_queries=spec.num_queries, width=8, num_layers=1, cross_every=1, num_heads=1,
        use_global=spec.use_global,
    )  # fmt: skip
    return made.num_clue_tokens
