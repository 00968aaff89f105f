"""The rows of a run that can be learned from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmalign.text.cached import cache_folder
from mmalign.text.encode import Encoder
from mmalign.text.span_masks import with_spans
from mmalign.video.check_journal import FILE
from mmalign.video.checks import usable_rows
from mmalign.video.processing import Processor, load_processor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmalign.config import RunConfig
    from mmalign.data.example import Example


def usable_parts(config: RunConfig, parts: Sequence[Sequence[Example]]) -> list[list[Example]]:
    """The rows whose media can be decoded and, where only spans are scored, that have one.

    Args:
        config: The run's configuration.
        parts: Rows to train on, rows held out; files of both are looked at and named once.
    """
    processor = load_processor(config)
    wrapped = Processor(processor, config)
    heard = wrapped.plays and config.video.sound == "auto"
    taken = [wrapped.takes(part) for part in parts]
    usable = usable_rows(taken, config.video, hears=heard, journal=cache_folder(config) / FILE)
    # What differs between two answers is found without anything shown: nothing is decoded.
    words = config.text.model_copy(update={"chat_template": False, "system_prompt": None})
    encoder = Encoder(processor.tokenizer, config.model_copy(update={"text": words}))
    return [with_spans(config.text.masks, rows, encoder.encode_example) for rows in usable]
