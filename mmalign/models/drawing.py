"""Seeds of drawn answers: one an answer, so that no answer depends on those drawn beside it."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence


def answer_seeds(seed: int, asked: Sequence[Hashable]) -> list[int]:
    """A 63-bit seed for the answer to each question of a whole list.

    It follows from the run's seed, from the question as its `repr` says it, and from how often the
    same question came before in the list: not from the question's place, nor from batches. So the
    samples of every step of a run, and of `mmalign sample` on its weights, draw alike.
    """
    before: Counter[Hashable] = Counter()
    seeds: list[int] = []
    for question in asked:
        key = repr((int(seed), question, before[question])).encode("utf-8", "surrogatepass")
        seeds.append(int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1)
        before[question] += 1
    return seeds
