"""Letters as a person reads them: marked, cued, in front, denied, in other languages."""

from __future__ import annotations

import pytest

from mmalign.bench.parsers import letter, letters

OPTIONS = ("a red car", "a blue bus", "a green bike", "a white van")

MARKED = [
    ("<think>It may be A or C. The answer is A?</think>\n\nThe correct option is **D**.", "D"),
    ("The bus passes. A? No, it is B.</think>B", "B"),  # the prompt held the opening tag
    ("<think>Surely (A)", None),  # a thought that never ends
    ("<thinking>A</thinking><answer> (C) a green bike </answer>", "C"),
    ("<think>one <think> two </think> A</think> B", "B"),
    ("\u25c1think\u25b7A or B\u25c1/think\u25b7B", "B"),
    ("<|channel|>analysis<|message|>A?<|end|><|channel|>final<|message|>C<|return|>", "C"),
    ("<answer>\nB. a blue bus\n</answer><|endoftext|>", "B"),
    ("<answer>A</answer>\n<answer>B</answer>", None),
    ("<answer>B", "B"),
    ("C</answer>", "C"),
    ("I like A. <answer>a green bike</answer>", "C"),
    ("\\boxed{\\text{D}}", "D"),
    ("Surely A, so \\boxed{B}", "B"),
    ("The final answer is $\\boxed{\\textbf{(B)}}$.", "B"),
    ("\x08oxed{B}", "B"),  # what JSON makes of one backslash
    ("<|begin_of_box|>C<|end_of_box|>", "C"),
    ('{"reason": "A is not there", "answer": "C"}', "C"),
    ("```\nB\n```", "B"),
    ("B<|im_end|>\n<|im_start|>user\nA", "B"),
    ("<|im_start|>assistant\nC<|im_end|>", "C"),
    ("B###Human: A", "B"),
    ("\uff22\u3002", "B"),  # full width
    ("\uff08\uff22\uff09", "B"),
]
CUED = [
    ("I first thought A. Final answer: C", "C"),
    ("The answer is A. On second look the final answer is B.", "B"),
    ("Reasoning: A shows a car. B shows a bus.\nAnswer: B", "B"),
    ("Looking at the clip, the best answer is:\n(B) a blue bus", "B"),
    ("### Answer\nB", "B"),
    ("**Final Answer**: **(B)**", "B"),
    ("Answer: b", "B"),
    ("I'd go with B.", "B"),
    ("I would go with option (c).", "C"),
    ("Therefore, B", "B"),
    ("(C) is the correct choice because the bike is green", "C"),
    ("A is the best answer.", "A"),
    ("Option A is wrong, B is correct", "B"),
    ("It can't be A or C, so it is D.", "D"),
    ("I rule out A and C. B", "B"),
    ("The answer isn't A but D", "D"),
    ("B rather than A", "B"),
    ("Answer: B (not A)", "B"),
    ("Maybe B", "B"),
    ("I'm not sure, but B", "B"),
    ("The answer is a", "A"),
    ("The answer is a blue bus", "B"),
    ("Given the options, the answer to the question is B.", "B"),
    ("The answer is most likely B", "B"),
    ("B\n\nExplanation: (A) is wrong as the car is gone and (C) shows a bike.", "B"),
    ("A. a red car\nB. a blue bus\nC. a green bike\nD. a white van\n\nAnswer: D", "D"),
    ("Let's think. Option A: the car is not seen. Option B: it is. The answer is B.", "B"),
]
SAID = [
    ("The blue bus.", "B"),
    ("white van", "D"),
    ("A white van drives by.", "D"),
    ("red cars", "A"),
    ("It is not the red car, it is the white van.", "D"),
    ("There is no bus, only a green bike", "C"),
    ("a red car\n\nThe car passes a blue bus.", "A"),
    ("The blue bus passes. Answer: a red car", "A"),
]
NONE = [
    "The answer cannot be A.",
    "Not B.",
    "Neither A nor B",
    "Either A or B",
    "A or B, probably B",
    "A/B",
    "A & B",
    "A B C D",
    "A. B. C. D. A. B. C. D.",
    "A) a red car B) a blue bus",
    "B.\nA.",
    "Both A and C are correct",
    "The answer could be A or B",
    "The answer is B or maybe C",
    "B then C",
    "I am not sure whether it is B",
    "All of the above",
    "N/A",
    "?",
    "F",
    "The answer is E",
    "D. a red car",
    "The answer is C. a white van",
    "a red car and a blue bus",
    "A person walks.",
    "A lot happens.",
    "At 5 a.m. in the U.S.",
    "Person B enters",
    "It is 20 C warm",
    "First I see A, then B, and finally C happens.",
    "<answer>unknown</answer> or B",
]
TONGUES = [
    ("答案：C", "C"),
    ("正确答案是D。", "D"),
    ("应该选择B选项", "B"),
    ("我选C", "C"),
    ("不是A，而是B", "B"),
    ("因此，答案为（D）", "D"),
    ("B是正确的", "B"),
    ("A和B", None),
    ("不选A", None),
    ("La respuesta correcta es la C", "C"),
    ("Respuesta: (D)", "D"),
    ("No es A, sino C", "C"),
    ("Elijo B porque hay un autobús", "B"),
    ("A o B", None),
    ("La bonne réponse est C.", "C"),
    ("Réponse\u00a0: B", "B"),
    ("Ce n'est pas A mais B", "B"),
    ("L'option C", "C"),
    ("A ou B", None),
    ("Die richtige Antwort ist D", "D"),
    ("Die richtige Antwort lautet B.", "B"),
    ("Nicht A, sondern C", "C"),
    ("B ist richtig.", "B"),
    ("A oder B", None),
]


@pytest.mark.parametrize(("text", "expected"), [*MARKED, *CUED, *SAID, *TONGUES])
def test_a_letter_is_read_as_a_person_reads_it(text: str, expected: str | None) -> None:
    assert letter(text, OPTIONS) == expected


@pytest.mark.parametrize("text", NONE)
def test_what_gives_no_letter_is_not_read(text: str) -> None:
    assert letter(text, OPTIONS) is None


def test_options_of_yes_and_no_are_read_as_yes_or_no() -> None:
    assert letter("Yes, there is no car.", ("yes", "no", "not sure")) == "A"
    assert letter("not sure", ("yes", "no", "not sure")) == "C"
    assert letter("Yes and no.", ("yes", "no", "not sure")) is None


def test_endings_and_articles_count_where_options_differ_by_them() -> None:
    assert letter("the cats", ("a cat", "two cats")) == "A"
    assert letter("cats", ("cat", "cats")) == "B"
    assert letter("He is sitting down", ("sits down", "stands up")) == "A"
    assert letter("the dog", ("a dog", "the dog")) == "B"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>A, B, D</think>AC", "AC"),
        ("<answer>A, C</answer>", "AC"),
        ("The correct answers are:\nA. a red car\nC. a green bike", "AC"),
        ("答案：A、C", "AC"),
        ("A and C, not B", "AC"),
        ("B is wrong; A and D", "AD"),
        ("A or C", ""),  # which of them?
        ("A. a blue bus\nC. a green bike", ""),  # the bus is B
        ("The DAB dance", ""),
        ("", ""),
    ],
)
def test_sets_of_letters_as_a_person_reads_them(text: str, expected: str) -> None:
    assert "".join(sorted(letters(text, OPTIONS))) == expected
