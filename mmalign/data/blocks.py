"""The stretches that two sequences have in common, found in about n log n steps."""

from __future__ import annotations

from bisect import bisect_left
from difflib import SequenceMatcher
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence

    from numpy.typing import NDArray

    Ints = NDArray[np.int64]

Block = tuple[int, int, int]
"""a[i : i + size] equals b[j : j + size]: (i, j, size)."""

Opcode = tuple[str, int, int, int, int]
"""a[i:k] is replaced, deleted, inserted or equal: (what, i, k, j, m), as b[j:m]."""

_SMALL = 128 * 128
"""Items of `a` times items of `b` up to which difflib's own search is the faster one."""


def matching_blocks(a: Sequence[Hashable], b: Sequence[Hashable], least: int = 1) -> list[Block]:
    """Common stretches in order: the longest, then the longest on either side of it, and so on.

    Of several of one length that is taken which begins first in `a`, then in `b`. These are the
    blocks of difflib's `SequenceMatcher(None, a, b, autojunk=False)`, without its last, which is
    empty. difflib looks at all equal items of `b` for every item of `a`, once a block; here all
    stretches of one length are compared at once, by numbers that equal stretches share.

    Args:
        a: Items that a dictionary can hold.
        b: The same.
        least: Items of the shortest stretch that counts.

    Source: Ratcliff and Metzener 1988, Pattern Matching: the Gestalt Approach; numbers of stretches
        by doubling as in Karp, Miller and Rosenberg 1972.
    """
    least = max(least, 1)
    numbers: dict[Hashable, int] = {}
    items = [numbers.setdefault(item, len(numbers)) for side in (a, b) for item in side]
    stretches = _Stretches(items)
    found: list[Block] = []
    left = [(0, len(a), len(a), len(items), len(items))]  # ranges of items, and the longest length
    while left:
        i, i_end, j, j_end, most = left.pop()
        if min(i_end - i, j_end - j, most) < least:
            continue
        if (i_end - i) * (j_end - j) <= _SMALL:
            small = SequenceMatcher(None, items[i:i_end], items[j:j_end], autojunk=False)
            found += [(i + x, j + y, n) for x, y, n in small.get_matching_blocks() if n >= least]
            continue
        for x, y, size in stretches.longest(i, i_end, j, j_end, least, most):
            if size:
                found.append((x, y, size))
            most = size - 1 if size else most
            left.append((i, x, j, y, most))
            i, j = x + size, y + size
    return sorted((i, j - len(a), size) for i, j, size in found)


def opcodes(a: Sequence[Hashable], b: Sequence[Hashable]) -> Iterator[Opcode]:
    """What turns `a` into `b`, as difflib's `get_opcodes` says it."""
    i = j = 0
    for x, y, size in [*matching_blocks(a, b), (len(a), len(b), 0)]:
        if i < x or j < y:
            yield "replace" if i < x and j < y else "delete" if i < x else "insert", i, x, j, y
        i, j = x + size, y + size
        if size:
            yield "equal", x, i, y, j


class _Stretches:
    """Numbers that stretches of the items share if they are equal."""

    def __init__(self, items: Sequence[int]) -> None:
        self._of_length_two_to_the = [np.asarray(items, dtype=np.int64)]
        self._num_items = len(items)

    def _numbers(self, start: int, end: int, size: int) -> Ints:
        """A number for each stretch of `size` items within [start, end)."""
        known, level = self._of_length_two_to_the, size.bit_length() - 1
        while len(known) <= level:
            last, half = known[-1], 1 << (len(known) - 1)
            pairs = last[:-half] * self._num_items + last[half:]
            known.append(np.unique(pairs, return_inverse=True)[1])
        rest, stop = size - (1 << level), end - size + 1
        front, back = known[level][start:stop], known[level][start + rest : stop + rest]
        return front * self._num_items + back

    def longest(self, i: int, i_end: int, j: int, j_end: int, least: int, most: int) -> list[Block]:
        """The longest stretches that two ranges share, each behind the last, then the ends.

        The list is empty where no shared stretch has `least` items.
        """

        def shared(size: int) -> Ints:
            ours, theirs = self._numbers(i, i_end, size), self._numbers(j, j_end, size)
            return np.intersect1d(ours, theirs)

        if not len(common := shared(least)):
            return []
        low, above = least, min(most, i_end - i, j_end - j) + 1
        step = 1
        while above - low > 1:  # what is shared is mostly short: steps double until one is too far
            size = min(low + step, (low + above) // 2) if step else (low + above) // 2
            if len(tried := shared(size)):
                low, common, step = size, tried, 2 * step
            else:
                above, step = size, 0
        return [*self._in_order(i, i_end, j, j_end, low, common), (i_end, j_end, 0)]

    def _in_order(
        self, i: int, i_end: int, j: int, j_end: int, size: int, common: Ints
    ) -> list[Block]:
        ours, theirs = self._numbers(i, i_end, size), self._numbers(j, j_end, size)
        places: dict[int, list[int]] = {}
        for at in np.flatnonzero(np.isin(theirs, common)).tolist():
            places.setdefault(int(theirs[at]), []).append(j + at)
        found: list[Block] = []
        free_i, free_j = i, j
        for at in np.flatnonzero(np.isin(ours, common)).tolist():
            if i + at < free_i:
                continue
            known = places[int(ours[at])]
            place = bisect_left(known, free_j)
            if place < len(known):
                found.append((i + at, known[place], size))
                free_i, free_j = i + at + size, known[place] + size
        return found
