"""Spans of a row's candidates as masks over response tokens, and rows that have none."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from mmalign.errors import DataError
from mmalign.text.spans import diff_spans

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mmalign.config import MaskConfig
    from mmalign.data.example import Example
    from mmalign.text.encode import EncodedCandidate

log = logging.getLogger(__name__)


def span_masks(encoded: Sequence[EncodedCandidate], kind: str, min_match: int) -> list[list[bool]]:
    """Which response tokens lie on a span, for each candidate of a row.

    Args:
        encoded: The row's candidates, chosen and rejected first.
        kind: spans, those of the record; diff, what differs between chosen and rejected.
        min_match: diff: tokens in a row that count as equal.

    A further candidate that repeats the chosen or the rejected response (under another clip) has
    that response's spans.
    """
    if kind == "spans":
        known = [item.spans for item in encoded]
    elif len(encoded) < 2:
        raise DataError("text.masks.kind is diff, but a row has one response; use kind: spans")
    else:
        known = list(diff_spans(encoded[0].response, encoded[1].response, min_match))
        known += [[False] * len(item.response) for item in encoded[2:]]
    for index, item in enumerate(encoded[2:], 2):
        if not any(known[index]):
            same = next((i for i in (0, 1) if encoded[i].response == item.response), index)
            known[index] = known[same]
    return known


def with_spans(
    masks: MaskConfig | None,
    examples: Sequence[Example],
    encode: Callable[[Example], Sequence[EncodedCandidate]],
) -> list[Example]:
    """The rows that have a span to learn from; the others are counted in a warning.

    Args:
        masks: The config's `text.masks`.
        examples: All rows.
        encode: To tokens; only called where spans are found by comparing them.

    Raises:
        DataError: None is left.
    """
    if masks is None or masks.kind not in ("spans", "diff") or masks.on_empty == "full":
        return list(examples)

    def has_span(row: Example) -> bool:
        if masks.kind == "spans":
            return any(candidate.spans for candidate in row.candidates)
        return any(map(any, span_masks(encode(row), "diff", masks.min_match)))

    found = [has_span(row) for row in examples]
    kept = [row for row, has in zip(examples, found, strict=True) if has]
    left_out = len(examples) - len(kept)
    if left_out:
        first = examples[found.index(False)].id
        log.warning(
            "%d of %d rows have no span and are left out (the first is %r); "
            "text.masks.on_empty: full scores their whole responses instead",
            left_out, len(examples), first,
        )  # fmt: skip
    if examples and not kept:
        raise DataError(
            f"none of {len(examples)} rows has a span to learn from; give spans_chosen and "
            "spans_rejected, or use text.masks: {kind: diff}"
        )
    return kept
