"""The rows a run learns from, and how they are shown."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from mmalign.diffusion import pictures
from mmalign.diffusion.batch import caption_of
from mmalign.diffusion.conditioning import load_tokenizers
from mmalign.diffusion.methods import names_of
from mmalign.diffusion.notes import cache_folder, look
from mmalign.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmalign.config import RunConfig
    from mmalign.data.example import Example

log = logging.getLogger("mmalign.data")

_NAMED = 8


def usable(config: RunConfig, examples: Sequence[Example]) -> list[Example]:
    """The rows whose pictures can be decoded and whose captions the model can read to their end.

    Raises:
        DataError: A caption is too long and `diffusion.long_captions` is stop; no row is left; DCPO
            without captions of the pictures.
    """
    rows = list(examples)
    if config.diffusion.estimator.generated:
        rows = _prompts_alone(rows)
    _check_captions(config, rows)
    # What `mmalign cache` has decoded needs no second look.
    has_notes = cache_folder(config).is_dir() and config.diffusion.cache != "off"
    known = partial(look, config) if has_notes else None
    kept, _ = pictures.usable(rows, config.diffusion, known)
    return _readable(config, kept)


def _prompts_alone(examples: list[Example]) -> list[Example]:
    """The rows without their pictures, which are generated in training."""
    with_pictures = sum(any(c.response for c in row.candidates) for row in examples)
    if not with_pictures:
        return examples
    log.warning(
        "the pictures of %d of %d rows are not used: estimator.generated makes others from the "
        "prompts",
        with_pictures,
        len(examples),
    )
    return [
        replace(row, candidates=(replace(row.candidates[0], response=""),), labels=(1.0,))
        for row in examples
    ]


def _check_captions(config: RunConfig, examples: list[Example]) -> None:
    """DCPO is its captions alone: without them it would silently be diffusion_dpo."""
    without = [row for row in examples if all(c.prompt is None for c in row.candidates)]
    if "dcpo" not in names_of(config):
        if len(without) < len(examples):
            log.warning(
                "%d of %d rows have a caption for each picture, under which each is scored, as "
                "objective dcpo does",
                len(examples) - len(without),
                len(examples),
            )
        return
    if not without:
        return
    names = ", ".join(repr(row.id) for row in without[:_NAMED])
    found = (
        f"{len(without)} of {len(examples)} rows have one caption for both pictures "
        f"({names}{', ...' if len(without) > _NAMED else ''})"
    )
    if len(without) == len(examples):
        raise DataError(
            f"objective 'dcpo' scores each picture under its own caption, but {found}. Give "
            "prompt_chosen and prompt_rejected, or use diffusion_dpo"
        )
    log.warning("%s: objective 'dcpo' scores those as diffusion_dpo does", found)


def _readable(config: RunConfig, examples: list[Example]) -> list[Example]:
    """Rows with a longer caption than the model reads are left out, cut, or refused."""
    captions = {caption_of(row, k) for row in examples for k in range(len(row.candidates) or 1)}
    # A caption has no more tokens than bytes, so that short ones need no tokenizer.
    tokenizers = load_tokenizers(config.model.path, config.model.revision)
    doubtful = [text for text in captions if len(text.encode()) + 2 > tokenizers.limit]
    long = {text for text in doubtful if tokenizers.num_tokens(text) > tokenizers.limit}
    if not long:
        return examples
    hit = [
        row
        for row in examples
        if any(caption_of(row, k) in long for k in range(len(row.candidates)))
    ]
    names = ", ".join(repr(row.id) for row in hit[:_NAMED]) + (", ..." if len(hit) > _NAMED else "")
    found = (
        f"{len(hit)} of {len(examples)} rows have a caption of more than {tokenizers.limit} tokens "
        f"({names})"
    )
    choice = config.diffusion.long_captions
    if choice == "stop":
        raise DataError(
            f"{found}, and diffusion.long_captions is stop. Shorten them, or use drop or truncate"
        )
    if choice == "truncate":
        log.warning("%s: the rest of it is not read", found)
        return examples
    if len(hit) == len(examples):
        raise DataError(
            f"{found}: no row is left. Shorten the captions, or set diffusion.long_captions: "
            "truncate"
        )
    log.warning("%s: left out; diffusion.long_captions: truncate keeps them", found)
    out = {row.id for row in hit}
    return [row for row in examples if row.id not in out]


def show_rows(config: RunConfig, examples: Sequence[Example]) -> Any:
    """Captions, files, sizes, crops and labels, for a terminal."""
    from rich.text import Text

    shown = [pictures.describe_row(row, config.diffusion) for row in examples]
    return Text("\n\n".join(shown))
