"""Encoded rows to one batch: extra roles, mismatched answers, padding to [B, K, ...]."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from mmalign.errors import NeedsError
from mmalign.models.adapter import Batch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from mmalign.core import Needs
    from mmalign.data.example import Example
    from mmalign.text.encode import EncodedCandidate, Encoder


def collate(encoder: Encoder, examples: Sequence[Example], needs: Needs) -> Batch:
    """A batch on the CPU: the rated candidates, then the extra roles in the order of `needs`.

    Inputs, right-padded to the longest of the batch:
        prompt_ids, prompt_mask: [B, K, P]
        response_ids, response_mask: [B, K, L]; True on every token, end included.
        response_scored: [B, K, L] bool, only where answers of several turns have tokens that the
            assistant did not write, or that it is not trained on.
        span_mask (text.masks.kind spans, diff): [B, K, L] bool.
        step_index (text.masks.kind steps): [B, K, L] long; 0 is no step.
        context_index: [B, K] long, only where prompts show something.

    A "mismatched" candidate is the response of the row before under this prompt, tokenised on its
    own: no label of a row depends on the rows beside it.

    Raises:
        NeedsError: when a row lacks a role, or rows differ in their number of candidates.
    """
    rows = [_selected(example, needs) for example in examples]
    encoded = [list(encoder.encode_example(example)) for example in rows]
    labels = [list(example.labels) for example in rows]
    if "mismatched" in needs.roles:
        for index, example in enumerate(rows):
            other = replace(rows[index - 1].candidates[0], prompt=None, role="mismatched")
            encoded[index] += encoder.encode_example(replace(example, candidates=(other,)))
            labels[index].append(0.0)
    sizes = sorted({len(row) for row in encoded})
    if len(sizes) > 1 or sizes[0] < needs.candidates:
        raise NeedsError(
            f"rows {rows[0].id!r} to {rows[-1].id!r} have {sizes} candidates; every row of a run "
            f"needs the same number, at least {needs.candidates}"
        )
    inputs = _inputs(encoder, encoded)
    if "mismatched" in needs.roles and len(rows) == 1:
        why = "alone in its batch: nothing to mismatch"
        encoder.notes.count("without_mismatch", rows[0].id, why, surveyed=False)
        inputs["response_mask"][:, -1] = False
    return Batch(
        inputs=inputs,
        labels=torch.tensor(labels, dtype=torch.float32),
        row_weight=torch.tensor([example.weight for example in rows], dtype=torch.float32),
        ids=tuple(example.id for example in rows),
    )


def _inputs(encoder: Encoder, encoded: Sequence[Sequence[EncodedCandidate]]) -> dict[str, Tensor]:
    inputs: dict[str, Tensor] = {}
    for name in ("prompt", "response"):
        ids = [[getattr(item, name) for item in row] for row in encoded]
        inputs[f"{name}_ids"] = _pad(ids, encoder.pad_id)
        # By length and never by id: the pad token may be the end token, which is scored.
        inputs[f"{name}_mask"] = _pad([[[1] * len(i) for i in row] for row in ids], 0).bool()
    if any(item.scored for row in encoded for item in row):
        inputs["response_scored"] = _pad([[item.mask for item in row] for row in encoded], 0).bool()
    if encoder.uses_spans:
        inputs["span_mask"] = _pad([encoder.span_masks(row) for row in encoded], 0).bool()
    if encoder.uses_steps:
        inputs["step_index"] = _pad([[item.steps for item in row] for row in encoded], 0)
    if any(item.context for row in encoded for item in row):
        contexts = [[item.context for item in row] for row in encoded]
        inputs["context_index"] = torch.tensor(contexts, dtype=torch.long)
    return inputs


def _selected(example: Example, needs: Needs) -> Example:
    """The rated candidates and those of the roles asked for, in that order."""
    pairs = list(zip(example.candidates, example.labels, strict=True))
    kept = [pair for pair in pairs if not pair[0].role]
    for role in dict.fromkeys(needs.roles):
        if role == "mismatched":  # made from the batch
            continue
        found = [pair for pair in pairs if pair[0].role == role]
        wanted = needs.roles.count(role)
        if len(found) < wanted:
            raise NeedsError(
                f"row {example.id!r}: the objective needs {wanted} {role!r} response(s), the row "
                f"has {len(found)}; add the field {role!r} to the data"
            )
        kept += found[:wanted]
    candidates, labels = zip(*kept, strict=True)
    return replace(example, candidates=candidates, labels=labels)


def _pad(rows: Sequence[Sequence[Sequence[int]]], value: int) -> Tensor:  # -> [B, K, L]
    length = max(len(item) for row in rows for item in row)
    padded = [[[*item, *[value] * (length - len(item))] for item in row] for row in rows]
    return torch.tensor(padded, dtype=torch.long)
