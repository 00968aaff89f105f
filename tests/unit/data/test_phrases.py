"""Spans of pairs by rule, and the words they are made of."""

from __future__ import annotations

import pytest

from mmalign.data.words import content, differing_phrases, likeness, polarity, stem, words

CASES = {
    "one word": ("The man throws a ball.", "The man kicks a ball.", ["throws"], ["kicks"]),
    "articles join": (
        "A man throws a ball.", "A man kicks the box.", ["throws a ball"], ["kicks the box"],
    ),
    "too far apart to join": (
        "The cat sleeps near the old man on a red mat.",
        "The dog sleeps near the old man on a blue mat.",
        ["cat", "red"], ["dog", "blue"],
    ),
    "no joining over a comma": (
        "A red car, in the town.", "A red bus, in a city.", ["car", "town"], ["bus", "city"],
    ),
    "border words go": ("It is the violin.", "It was of a piano.", ["violin"], ["piano"]),
    "only border words differ": ("The dog is here.", "The dog was here.", ["is"], ["was"]),
    "insertion": ("The dog runs.", "The dog runs quickly away.", [], []),
    "leading insertion": ("A dog runs.", "In the park a dog runs.", [], []),
    "denial": ("The man is not running.", "The man is running.", ["not running"], ["running"]),
    "denial at the end": ("He sings, she does not.", "He sings, she does.", ["not"], ["does"]),
    "denial in a word": ("It isn't red.", "It is red.", ["isn't"], ["is"]),
    "denial beside a change": ("He never runs.", "He walks.", ["never runs"], ["walks"]),
    "yes and no alone": ("Yes, the man runs.", "no , a woman walks", ["Yes"], ["no"]),
    "both yes": ("Yes, it is red.", "Yes, it is blue.", ["red"], ["blue"]),
    "a no that denies": ("Yes.", "No man is there.", ["Yes"], ["No man"]),
    "numbers in words": ("Two dogs run.", "2 dogs run!", [], []),
    "numbers": ("There are 3 dogs.", "There are two dogs.", ["3"], ["two"]),
    "decimals": ("It takes 2.5 s.", "It takes 2.6 s.", ["2.5"], ["2.6"]),
    "case and marks": ("The Red car!", "the red car", [], []),
    "colours spelt in two ways": ("A gray cat.", "A grey cat.", [], []),
    "all of it": ("Violin.", "a piano", ["Violin"], ["piano"]),
    "hyphens": ("A left-handed man.", "A right-handed man.", ["left-handed"], ["right-handed"]),
    "letters": ("(A) dog", "(B) cat", ["A", "dog"], ["B", "cat"]),
    "accents": ("Une fée danse.", "Une fe\u0301e chante.", ["danse"], ["chante"]),
    "no words": ("...", "The dog.", [], []),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_spans(name: str) -> None:
    chosen, rejected, ours, theirs = CASES[name]
    left, right = differing_phrases(chosen, rejected)
    assert [chosen[a:b] for a, b in left] == ours
    assert [rejected[a:b] for a, b in right] == theirs


@pytest.mark.parametrize("name", CASES)
def test_spans_are_the_same_from_the_other_side(name: str) -> None:
    """Whole words, in order, as many on either side."""
    chosen, rejected, *_ = CASES[name]
    left, right = differing_phrases(chosen, rejected)
    assert differing_phrases(rejected, chosen) == (right, left)
    assert len(left) == len(right)
    for text, spans in ((chosen, left), (rejected, right)):
        bounds = [end for span in spans for end in span]
        assert bounds == sorted(set(bounds))
        starts, ends = {w.start for w in words(text)}, {w.end for w in words(text)}
        assert {a for a, _ in spans} <= starts
        assert {b for _, b in spans} <= ends


@pytest.mark.parametrize(
    ("forms", "expected"),
    [
        ("ride rides riding", "rid"),
        ("run runs running", "run"),
        ("stop stops stopped stopping", "stop"),
        ("carry carries carrying carried", "carri"),
        ("watch watches watching", "watch"),
        ("dress dresses dressing", "dress"),
        ("fall falls falling", "fall"),
    ],
)
def test_forms_of_a_word_have_one_stem(forms: str, expected: str) -> None:
    assert {stem(form) for form in forms.split()} == {expected}


def test_short_words_keep_what_looks_like_an_ending() -> None:
    assert [stem(w) for w in ("red", "king", "bus", "bed", "string", "glass")] == [
        "red", "king", "bus", "bed", "string", "glass",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes.", "yes"),
        ("yes it does", "yes"),
        ("No, it is a dog", "no"),
        ("no , it is", "no"),
        ('"No"', "no"),
        ("Answer: yes", "yes"),
        ("The answer is no.", "no"),
        ("No man is there", ""),
        ("There is no man", ""),
        ("Nothing", ""),
        ("yesterday", ""),
        ("", ""),
    ],
)
def test_a_yes_or_no_stands_at_the_beginning(text: str, expected: str) -> None:
    assert polarity(text)[0] == expected


def test_content_leaves_out_what_says_nothing_and_marks_what_is_denied() -> None:
    assert content("No, the two Men aren't riding a bike!") == ["2", "men", "not-rid", "bik"]


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("A dog runs", "The dogs are running", 1.0),
        ("A dog runs", "A cat runs", 0.5),
        ("A man runs", "A person runs", 1.0),
        ("A dog", "a violin", 0.0),
        ("", "a violin", 0.0),
        ("it is", "It is.", 1.0),
    ],
)
def test_likeness(one: str, other: str, expected: float) -> None:
    assert likeness(one, other) == likeness(other, one) == expected
