"""Strict readings of answers, and where published ones differ."""

from __future__ import annotations

import random
import re

import pytest

from mmalign.bench.choice import first_letter, published_letter
from mmalign.bench.hallucination import published_letters
from mmalign.bench.options import mentioned
from mmalign.bench.orders import _published_search, order, published_order
from mmalign.bench.parsers import letter, letters

OPTIONS = ("a cat", "a dog", "two cats", "none")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", "B"),
        ("(b).", "B"),
        ("**B**", "B"),
        ("B. a dog", "B"),
        ("b) a dog", "B"),
        ("The answer is (B)", "B"),
        ("The correct answer is B because it barks", "B"),
        ("Option B is correct", "B"),
        ("Best option:(B", "B"),
        ("It is not (A), the answer is (B)", "B"),
        ("I think it is a dog.", "B"),
        ("I think it is two cats", "C"),  # not the cat in it
        ("The answer is A man", None),
        ("A man walks", None),
        ("(A) or (B)", None),
        ("A, B", None),
        ("AB", None),
        ("The answer is A. The answer is B.", None),
        ("a cat and a dog", None),
        ("E", None),  # of four options
        ("Anything", None),
        ("", None),
    ],
)
def test_a_letter_is_read_only_where_it_stands_as_the_answer(
    text: str, expected: str | None
) -> None:
    assert letter(text, OPTIONS) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("AC", "AC"),
        ("A, C", "AC"),
        ("The answers are A and C.", "AC"),
        ("(A) a cat (C) two cats", "AC"),
        ("A. a cat\nC. two cats", "AC"),
        ("The correct answer is B.", "B"),
        ("a dog and none", "BD"),
        ("A person", ""),
        ("ACE", ""),  # E is no option
    ],
)
def test_sets_of_letters(text: str, expected: str) -> None:
    assert "".join(sorted(letters(text, OPTIONS))) == expected


def test_an_option_that_is_part_of_another_counts_alone_only() -> None:
    assert mentioned("electric bass", ["bass", "electric_bass"]) == [1]
    assert mentioned("bass", ["bass", "electric_bass"]) == [0]


def test_first_letter_reads_t_in_the_answer_is() -> None:
    assert first_letter("The answer is (B)") == "T"
    assert first_letter("(b) a dog") == "B"
    assert first_letter("12") is None


def test_prefixes_without_a_comma_are_not_stripped_in_the_published_video_mme_list() -> None:
    assert letter("Best answer: C", OPTIONS) == "C"
    assert published_letter("Best answer: C") == "B"  # the capital of Best
    assert published_letter("The answer is C") == "C"  # an entry that did not merge
    assert published_letter("The best option is C") == "C"  # not stripped, but without A to D
    assert published_letter("who knows") is None


def test_published_letters_take_articles_for_letters_and_miss_letters_without_a_space() -> None:
    assert published_letters("A person, so C", OPTIONS) == {"A", "C"}
    assert published_letters("AC", OPTIONS) == frozenset()
    assert published_letters("two cats and a dog", OPTIONS) == {"B"}  # the first of A, B, C, D


def test_the_published_pattern_of_orders_is_searched_as_its_regular_expression_does() -> None:
    draw = random.Random(0)
    parts = ("action a", "action b", "a.", "b)", "b", " ", "x", "then", "before", "after", "t", "e")
    found = 0
    for _ in range(3000):
        text = "".join(draw.choices(parts, k=draw.randint(2, 9)))
        for word in ("before", "then", "after"):
            one = r"(action [ab]|[ab][\.\)])"
            told = re.search(rf"{one}[^{word}]+{word}[^action]*?{one}", text)
            expected = (told[1][-1], told[2][-1]) if told else None
            assert _published_search(text, word) == expected
            found += told is not None
    assert found > 50


@pytest.mark.parametrize(
    ("text", "strict", "published"),
    [
        ("AB", "AB", "AB"),
        ("BA.", "BA", None),  # the published code compares the whole text
        ("a", "A", "A"),
        ("Action A happens before Action B.", "AB", "AB"),
        ("Action A, then Action B", "AB", "AB"),
        ("Action B first, Action A second", "BA", "BA"),
        ("Only Action A", "A", "A"),
        # [^after]+ holds no a, f, t, e or r, so "happens " fails: the order of mention wins
        ("Action B happens after Action A", "AB", "BA"),
        ("Action A and Action B happen: first Action A", "AB", "ABA"),
        ("Before Action A, Action B happens", "BA", "AB"),
        ("The order is not clear", None, None),
    ],
)
def test_order_of_two_actions(text: str, strict: str | None, published: str | None) -> None:
    assert order(text) == strict
    assert published_order(text) == published
