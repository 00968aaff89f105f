"""The rows of a run on text, all of them encoded once before a model is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmalign.errors import DataError
from mmalign.models.rows import Surveyed
from mmalign.text.cached import cache_folder
from mmalign.text.encode import Encoder
from mmalign.text.limits import model_limits
from mmalign.text.span_masks import with_spans
from mmalign.text.survey import survey
from mmalign.text.survey_cache import SurveyCache
from mmalign.text.survey_lines import lines, problems, require_lesson, require_room
from mmalign.text.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmalign.config import RunConfig
    from mmalign.core import Needs
    from mmalign.data.example import Example
    from mmalign.text.limits import Limits
    from mmalign.text.survey import Found

FOLDER = "surveys"


def survey_parts(config: RunConfig, needs: Needs, parts: Sequence[Sequence[Example]]) -> Surveyed:
    """What training would meet in these rows, and those without problems.

    Args:
        config: The run's configuration.
        needs: Of its objective.
        parts: Rows to train on, rows held out.

    Raises:
        DataError: Rows show something; all pairs are the same on both sides; none has a span.
        ConfigError: The tokenizer or the template cannot do what the config asks.
    """
    # A row stands several times in a part where its source has a weight.
    rows = list({id(row): row for part in parts for row in part}.values())
    refuse_media(rows)
    encoder, limits = Encoder(load_tokenizer(config), config), model_limits(config)
    encoder.notes.quiet = True
    found = _found(config, encoder, rows, limits)
    bad = {id(rows[number]) for number, *_ in found.problems}
    kept = [[row for row in part if id(row) not in bad] for part in parts]
    numbers = {id(row): number for number, row in enumerate(rows)}
    require_lesson(found, [numbers[id(row)] for row in kept[0]], rows)
    if "mismatched" in needs.roles:
        require_room(found, limits)
    told = lines(found, rows, config.data)
    masks = config.text.masks
    learned = [with_spans(masks, part, encoder.encode_example) for part in kept]
    return Surveyed(learned, tuple(told), problems(found, rows))


def refuse_media(rows: Sequence[Example]) -> None:
    """Refuse rows that show or play something, which a model of text would pass over."""
    shown = [row.id for row in rows if row.media or any(c.media for c in row.candidates)]
    if shown:
        raise DataError(
            f"{len(shown)} of {len(rows)} rows have a video, image or audio (the first is "
            f"{shown[0]!r}), which a model of text cannot take. Set modality: video with a "
            "model that can, or remove the columns"
        )


def _found(config: RunConfig, encoder: Encoder, rows: Sequence[Example], limits: Limits) -> Found:
    """What a survey finds, or found when it looked at the same rows under the same settings."""
    cache = SurveyCache(cache_folder(config) / FOLDER, encoder, limits)
    file = cache.file(rows)
    known = cache.get(file)
    if known is None:
        known = survey(encoder, rows, limits)
        cache.put(file, known)
    return known
