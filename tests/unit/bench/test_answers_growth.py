"""Readings pass over an answer once: what is repeated in it costs its length and no more."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from mmalign.bench import BENCHMARKS, find
from mmalign.bench.base import Benchmark, Prediction

REPEATED = (
    *("A. B. C. D. ", "(A) ", "A, ", "A and ", "not A ", "a.", "AB ", "A-"),
    *("the answer is ", "from a to b ", "scene  change ", "a man ", "a man is not ", "yes or no "),
    *(
        "action a ",
        "action a. then ",
        "a.action b ",
        "A->",
        "--",
        "<think>",
        "</think>",
        "<answer>",
        "\\boxed{",
    ),
    *("答案是", "不是", " ", "\n", " \n", "\t", "(", "<", "*", "# ", "'s ", "l'", "_", "1", "a"),
)
FEW = ("A. B. C. D. ", "not A ", "a.", "from a to b ", "<answer>", "-", " \n")
SHORT, LONG = 500, 8_000


def judged(kind: Benchmark, text: str, legacy: bool) -> float:
    """Seconds of the processor."""
    meta = {"side": "basic", "lines": ["Sentence A: a man", "Sentence B: a dog"]}
    answer = {"tempcompass-caption-matching": "Sentence A: a man", "vidhalluc-sth": "yes"}
    row = Prediction(
        "1", kind.name, "t", text, answer.get(kind.name, "A"), ("a man", "a dog"), "p",
        meta | {"locations": "from a to b."},
    )  # fmt: skip
    start = time.process_time()
    kind.tally([row], legacy)
    return time.process_time() - start


@pytest.mark.runs
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("names", "units"),
    [
        (("tvbench", "vidhalluc-tsh", "vidhalluc-sth", "videohallucer"), FEW),
        pytest.param(tuple(BENCHMARKS), REPEATED, marks=pytest.mark.slow),
    ],
)
def test_time_grows_with_the_length(
    names: tuple[str, ...], units: tuple[str, ...], legacy: bool
) -> None:
    """16 times the text takes at most 60 times as long; what grows as its square takes 256."""
    for kind in map(find, names):
        for unit in units:
            texts = [(unit * size)[:size] + "!" for size in (SHORT, LONG)]
            judged(kind, texts[0], legacy)  # once to warm up
            tries = ([judged(kind, text, legacy) for text in texts] for _ in range(5))
            assert any(long < max(60 * short, 0.05) for short, long in tries), (kind.name, unit)


def read_once(repeats: int) -> Callable[[], None]:
    text = "A. B. C. D. " * repeats + "All of them"
    row = Prediction("1", "tvbench", "t", text, "A", ("a man", "a dog", "a cat", "a bird"))

    def work() -> None:
        assert find("tvbench").verdict(row, False).read is None

    return work


def test_a_list_of_all_letters_is_no_answer_however_often_it_stands() -> None:
    start = time.process_time()
    for repeats in (2, 3, 6, 200):
        read_once(repeats)()
    assert time.process_time() - start < 2
