"""The rows of a run that can be learned from."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from mmalign.errors import DataError
from mmalign.text.cache import cache_folder
from mmalign.text.encode import Encoder
from mmalign.text.masks import with_spans
from mmalign.video.check_journal import FILE
from mmalign.video.checks import usable_rows
from mmalign.video.processing import Processor, load_processor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmalign.config import RunConfig
    from mmalign.data.example import Example

log = logging.getLogger(__name__)


def usable_parts(config: RunConfig, parts: Sequence[Sequence[Example]]) -> list[list[Example]]:
    """The rows whose media can be decoded and, where only spans are scored, that have one.

    Args:
        config: The run's configuration.
        parts: Rows to train on, rows held out; files of both are looked at and named once.
    """
    processor = load_processor(config)
    wrapped = Processor(processor, config)
    usable = usable_rows(
        taken(parts, wrapped),
        config.video,
        hears=wrapped.hears_clips,
        journal=cache_folder(config) / FILE,
        longest=wrapped.longest_sound,
    )
    # What differs between two answers is found without anything shown: nothing is decoded.
    words = config.text.model_copy(update={"chat_template": False, "system_prompt": None})
    encoder = Encoder(processor.tokenizer, config.model_copy(update={"text": words}))
    return [with_spans(config.text.masks, rows, encoder.encode_example) for rows in usable]


def taken(parts: Sequence[Sequence[Example]], processor: Processor) -> list[list[Example]]:
    """The rows with nothing but media of kinds that the model takes; others are counted.

    Raises:
        DataError: There are others, and `video.bad_media` is stop, or no row of the first part is
            left.
    """

    def foreign(row: Example) -> set[str]:
        shown = [row.media, *(c.media for c in row.candidates if c.media is not None)]
        kinds = {"video" for media in shown if media.videos}
        kinds |= {"image" for media in shown if media.images}
        kinds |= {"audio" for media in shown if media.sounds}
        return kinds - set(processor.tokens)

    found = [(row, kinds) for part in parts for row in part if (kinds := foreign(row))]
    if not found:
        return [list(part) for part in parts]
    kept = [[row for row in part if not foreign(row)] for part in parts]
    row, kinds = found[0]
    said = (
        f"{len(found)} of {sum(map(len, parts))} rows have {' and '.join(sorted(kinds))} "
        f"(the first is {row.id!r}), which {type(processor.inner).__name__} does not take"
    )
    if processor.video.bad_media == "stop" or not kept[0]:
        raise DataError(f"{said}. Take them out, or use a model that does")
    log.warning("%s; they are left out", said)
    return kept
