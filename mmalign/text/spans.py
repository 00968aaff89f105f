"""What differs between the two responses of a pair, token by token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmalign.data.blocks import matching_blocks

if TYPE_CHECKING:
    from collections.abc import Sequence


def diff_spans(
    chosen_ids: Sequence[int], rejected_ids: Sequence[int], min_match: int = 3
) -> tuple[list[bool], list[bool]]:
    """Marks the tokens of two responses that stand in each other's place: RRPO's diff route.

    Between two stretches of equal tokens lies what was replaced. It is a span where both sides
    have tokens; what only one side has is none, since it has nothing to be compared with. So a
    pair that differs by insertions alone has no span.

    Args:
        chosen_ids: Token ids of the chosen response.
        rejected_ids: Token ids of the rejected response.
        min_match: Tokens in a row that count as equal; shorter stretches, also those at the
            beginning and the end, belong to the spans around them. The released loss uses 1, its
            library 3.

    Returns:
        One mark a token for each side, True in spans.

    Source: Sarkar et al. 2025, arXiv:2504.12083, released code of VideoChat2.
    Departs: only responses are compared. The release compares whole label rows, where ignored
        positions match each other and lengthen what is equal at the beginning and the end; with a
        minimum above 1 it finds fewer spans there. No token is junk for being frequent, which
        difflib assumes of responses above 200 tokens.
    """
    equal = matching_blocks(chosen_ids, rejected_ids, min_match)
    chosen, rejected = [False] * len(chosen_ids), [False] * len(rejected_ids)
    i = j = 0
    for end_i, end_j, size in [*equal, (len(chosen_ids), len(rejected_ids), 0)]:
        if end_i > i and end_j > j:
            chosen[i:end_i] = [True] * (end_i - i)
            rejected[j:end_j] = [True] * (end_j - j)
        i, j = end_i + size, end_j + size
    return chosen, rejected
