"""Which tokens of a pair differ: golden cases of the release, and what a reader would expect."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import pytest
from goldens import load

from mmalign.text.masks import diff_spans

GOLDEN = load("video")


def numbered(marks: list[bool]) -> list[int]:
    """Marks as span ids: 1, 2, ... in order, 0 outside. Two spans never touch."""
    ids: list[int] = []
    count = 0
    for inside, run in groupby(marks):
        count += inside
        ids += [count * inside for _ in run]
    return ids


@pytest.mark.parametrize("case", GOLDEN["diff_spans"], ids=lambda case: str(case["min_match_size"]))
def test_golden(case: dict[str, Any]) -> None:
    marks = diff_spans(case["a"], case["b"], case["min_match_size"])
    assert [numbered(side) for side in marks] == [case["span_ids_a"], case["span_ids_b"]]


DIFFED = [case for case in GOLDEN["rrpo"] if "diff" in case["name"]]


@pytest.mark.parametrize("case", DIFFED, ids=lambda case: case["name"])
def test_the_spans_of_a_golden_run_come_from_its_labels(case: dict[str, Any]) -> None:
    """The run's span ids from whole label rows, as released, and from the responses alone."""
    labels, ids = case["inputs"]["labels"], case["inputs"]["span_ids"]
    half = len(labels) // 2
    for row in range(half):
        pair = labels[row], labels[row + half]
        expected = [ids[row], ids[row + half]]
        assert [numbered(side) for side in diff_spans(*pair, min_match=1)] == expected
        responses = [[token for token in side if token != -100] for side in pair]
        marks = diff_spans(*responses, min_match=1)
        for side, label, span in zip(marks, pair, expected, strict=True):
            scored = [i for token, i in zip(label, span, strict=True) if token != -100]
            assert numbered(side) == scored


def test_what_was_replaced_is_a_span_and_what_was_added_is_none() -> None:
    chosen, rejected = [1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 9, 9, 5, 6, 7]
    assert diff_spans(chosen, rejected) == (
        [i == 3 for i in range(7)],
        [i in (3, 4) for i in range(8)],
    )
    longer = [*chosen, 8, 8, 8]
    assert diff_spans(chosen, longer) == ([False] * 7, [False] * 10)
    assert diff_spans(chosen, chosen) == ([False] * 7, [False] * 7)


def test_short_matches_belong_to_the_span_around_them() -> None:
    chosen, rejected = [1, 5, 2, 7, 7, 7], [3, 5, 4, 7, 7, 7]
    assert diff_spans(chosen, rejected, 1)[0] == [True, False, True, False, False, False]
    assert diff_spans(chosen, rejected, 2)[0] == [True, True, True, False, False, False]
    assert diff_spans([1, 2], [1, 3], 3) == ([True, True], [True, True])


def test_frequent_tokens_still_align_in_long_responses() -> None:
    """difflib's own heuristic would drop every token that is frequent above 200 tokens."""
    chosen = [token for i in range(150) for token in (7, i % 4)]
    rejected = [*chosen]
    chosen[100] = 99
    rejected[100] = 98
    marks = diff_spans(chosen, rejected)
    assert [side.index(True) for side in marks] == [100, 100]
    assert [sum(side) for side in marks] == [1, 1]


def test_an_empty_side_has_no_span() -> None:
    assert diff_spans([], [1, 2]) == ([], [False, False])
