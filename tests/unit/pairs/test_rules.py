"""What is wrong and what is vague by rule, on sentences made for it."""

from __future__ import annotations

import pytest

from mmalign.pairs.judge import consistency, judge, most_agreed, options_of, vagueness

LISTED = "What is seen?\n(A) a dog\n(B) a cat\n(C) two cats"
IN_LINE = "What is seen? (A) a dog (B) a cat (C) two cats"

# answer, truth, question, outcome, rule
VERDICTS = [
    ("B", "(B) a cat", LISTED, "right", "option"),
    ("The answer is (C).", "B", LISTED, "wrong", "option"),
    ("a dog", "B", LISTED, "wrong", "option"),
    ("two cats", "two cats", LISTED, "right", "option"),
    ("A.", "B", IN_LINE, "wrong", "option"),
    ("An animal", "B", IN_LINE, "undecided", "option"),
    ("A or B", "B", LISTED, "undecided", "option"),
    ("Yes.", "No, it is not.", "", "wrong", "yes-no"),
    ("NO!", "no", "", "right", "yes-no"),
    ("There is a cat", "Yes", "", "undecided", "yes-no"),
    ("No man is there", "No", "", "undecided", "yes-no"),
    ("Yes, it moves left.", "yes , it moves right .", "", "wrong", "contradiction"),
    ("Yes", "Yes, a man", "", "right", "yes-no"),
    ("two", "2", "", "right", "number"),
    ("There are three of them.", "Two", "", "wrong", "number"),
    ("2 or 3", "2", "", "undecided", "number"),
    ("many", "2", "", "undecided", "number"),
    ("It is 2.5 m long", "2.5", "", "right", "number"),
    ("The man throws a blue ball.", "The man throws a red ball.", "", "wrong", "contradiction"),
    ("Three men walk.", "Two men walk.", "", "wrong", "contradiction"),
    ("2 men walk.", "Two men walk.", "", "right", "content"),
    ("The man is running.", "The man is not running.", "", "wrong", "contradiction"),
    ("He isn't holding a cup.", "He's holding a cup.", "", "wrong", "contradiction"),
    ("The woman opens the door", "The woman closes the door", "", "wrong", "contradiction"),
    ("The MAN throws a Red ball!", "the man throws a red ball", "", "right", "content"),
    ("He throws balls", "he is throwing a ball", "", "right", "content"),
    ("A person tosses a ball.", "The man throws a ball", "", "right", "content"),
    ("A man in a kitchen cooks an egg", "A man cooks in a kitchen", "", "right", "content"),
    ("A man.", "A man cooks in a kitchen", "", "undecided", "content"),
    ("A dog walks slowly in the park", "The dog runs in the park", "", "undecided", "content"),
    ("A child kicks a can", "The man throws a ball", "", "wrong", "content"),
    ("cello", "violin", "", "wrong", "content"),
    ("It is a violin, I think", "violin", "", "right", "content"),
    ("", "A man", "", "undecided", "empty"),
    (" ... ", "A man", "", "undecided", "empty"),
    ("A green tree and the red car", "A red car and a blue bus", "", "undecided", "content"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "truth", "question", "outcome", "rule"), VERDICTS)
def test_verdicts(answer: str, truth: str, question: str, outcome: str, rule: str) -> None:
    told = judge(answer, truth, question)
    assert (told.outcome, told.rule) == (outcome, rule)


@pytest.mark.parametrize(
    "truth", [truth for _, truth, question, *_ in VERDICTS if not question and truth != "No"]
)
def test_the_truth_itself_is_never_wrong(truth: str) -> None:
    assert judge(truth, truth).outcome == "right"
    assert judge(truth.upper(), truth).outcome == "right"


def test_a_synonym_that_is_not_known_is_another_word() -> None:
    """The limit of the rule: both may be true. A lower likeness takes back such verdicts."""
    answer, truth = "A gymnast vaults", "A sportsman jumps"
    assert judge(answer, truth).outcome == "wrong"
    assert judge(answer, truth, least_likeness=0.0).outcome == "undecided"


def test_options_are_found_by_their_letters_in_order() -> None:
    assert options_of(LISTED) == options_of(IN_LINE) == ["a dog", "a cat", "two cats"]
    assert options_of("A. yes\nB. no") == ["yes", "no"]
    assert options_of("Which? (A)  a dog,; (B) a (very) big, old cat ,\n(C)two") == [
        "a dog",
        "a (very) big, old cat",
        "two",
    ]
    assert options_of("Which? (A), (B)\n; (C) ,") == [",", ";", ","]
    assert options_of("Is it (B) or (C)?") == options_of("What does it do?") == []


VAGUE = [
    ("A man plays some kind of instrument.", 0.7, "some kind of; names nothing"),
    ("The violin.", 0.3, "says little"),
    ("A man plays the violin.", 0.0, ""),
    ("Something.", 1.0, "something; says little; names nothing"),
    ("It is hard to tell what he plays.", 0.9, "cannot tell: hard to tell"),
    ("Maybe a violin, it seems a man plays it", 0.4, "hedges: maybe, seems"),
    ("A man plays the piano.", 0.3, "names nothing"),
    (
        "Various things and other sounds can be heard, etc.",
        1.0,
        "various things, other sounds, etc",
    ),
    ("", 1.0, "says nothing"),
]


@pytest.mark.parametrize(("answer", "score", "said"), VAGUE)
def test_vagueness(answer: str, score: float, said: str) -> None:
    found = vagueness(answer, "A man plays the violin.", "What does the man play?")
    assert found.score == pytest.approx(score), found
    for part in said.split("; "):
        assert part in found.reason


def test_words_of_the_true_answer_are_not_vague() -> None:
    assert vagueness("Someone may sing", "Someone may sing in May").score == 0.0
    assert vagueness("Someone sings", "A woman sings").score == 0.4


def test_each_clue_is_missed_on_its_own() -> None:
    clues = {"video clue": "a red car in the rain", "audio clue": "a horn and thunder"}
    question = "What is going on with the car?"
    found = vagueness("The horn is loud", "A horn in the rain", question, clues)
    assert found.reasons == ("names nothing that the video clue does",)
    assert vagueness("The car is loud", "", question, clues).score == 0.6
    assert vagueness("It rains, and a horn is heard", "", question, clues).score == 0.0


def test_answers_that_agree_are_consistent() -> None:
    assert consistency(["a dog", "the dogs", "dog!"]) == 1.0
    assert consistency(["a dog", "a cat", "a cow"]) == 0.0
    assert consistency(["a dog"]) == 1.0
    said = ["a red car", "a blue car", "some kind of car", "the red car"]
    found = [vagueness(text) for text in said]
    assert said[most_agreed(said, found)] == "a red car"
