"""Common stretches of two sequences: difflib's, found in less time."""

from __future__ import annotations

import random
import time
from difflib import SequenceMatcher

import pytest

from mmalign.data import words as blocks
from mmalign.data.turns import _BEGIN
from mmalign.data.words import differing_phrases
from mmalign.text.masks import diff_spans


def altered(a: list[int], kinds: int, draw: random.Random) -> list[int]:
    b = a[:]
    for _ in range(draw.randint(0, 6)):
        at = draw.randrange(len(b) + 1)
        b[at : at + draw.randint(0, 3)] = draw.choices(range(kinds), k=draw.randint(0, 3))
    return b


@pytest.mark.runs
@pytest.mark.parametrize("small", [0, 16, 128 * 128])
def test_blocks_and_opcodes_are_those_of_difflib(
    small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "_SMALL", small)
    draw = random.Random(small)
    for number in range(300):
        kinds = draw.choice([1, 2, 3, 20])
        a, b = (draw.choices(range(kinds), k=draw.randint(0, 40)) for _ in range(2))
        b = altered(a, kinds, draw) if number % 2 else b
        least = draw.choice([1, 2, 3])
        match = SequenceMatcher(None, a, b, autojunk=False)
        expected = [tuple(m) for m in match.get_matching_blocks() if m.size >= least]
        assert blocks.matching_blocks(a, b, least) == expected
        assert list(blocks.opcodes(a, b)) == [tuple(code) for code in match.get_opcodes()]


def seconds(work: object, *given: object) -> float:
    assert callable(work)
    start = time.process_time()
    work(*given)
    return time.process_time() - start


@pytest.mark.slow
@pytest.mark.parametrize("least", [1, 3])
def test_time_grows_little_more_than_the_length(least: int) -> None:
    """8 times the words take about 8 to 12 times as long; difflib would take 64 times."""
    draw = random.Random(0)
    weights = [1 / (k + 1) for k in range(3000)]
    pairs = [
        [draw.choices(range(3000), weights, k=size) for _ in range(2)] for size in (2_000, 16_000)
    ]
    tries = ([seconds(diff_spans, *pair, least) for pair in pairs] for _ in range(5))
    assert any(long < 30 * short for short, long in tries)


def test_a_cell_of_blanks_is_passed_over_once() -> None:
    start = time.process_time()
    assert not _BEGIN.match(" " * 200_000 + "!")
    assert _BEGIN.match(" \n array([ {")
    assert time.process_time() - start < 1


@pytest.mark.slow
def test_what_repeats_or_is_rare_takes_no_longer() -> None:
    rare = [[v for k in range(4000) for v in (0, 10 + k + side * 10_000)] for side in (0, 1)]
    for a, b in (([1] * 8000, [1] * 7999), ([1, 2] * 4000, [2, 1] * 4000), tuple(rare)):
        assert any(seconds(blocks.matching_blocks, a, b) < 0.5 for _ in range(5))
    words = " ".join(f"the {k}" for k in range(3000))
    assert any(seconds(differing_phrases, words, words[::-1]) < 1.5 for _ in range(5))
