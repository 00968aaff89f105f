"""Orders of two actions, answers of MUSIC-AVQA by kind, changes of scene, and whose code it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from runs import scored, write

from mmalign.bench import find, read_files, score
from mmalign.bench.avqa import said_of_kind
from mmalign.bench.choice import first_word_fits
from mmalign.bench.hallucination import route
from mmalign.bench.orders import order
from mmalign.errors import ConfigError

ORDERS = {
    "AB": """
A then B
First A, then B.
Action A -> Action B
A\u2192B
A > B
Action A precedes Action B
Action A is followed by Action B
Action B is preceded by Action A
Action A is earlier than Action B
B is later than A.
Action B happens after Action A
Action B follows Action A.
Action A comes first
After Action A, Action B occurs
Once A is done, B starts
Action A occurs, after that Action B occurs
Action A, Action B
1) A 2) B
<think>BA?</think>AB</s>
AB because action A precedes action B
先A后B
A在B之前
Primero A, luego B
B después de A
A avant B
Zuerst A, dann B
B nach A""",
    "BA": """
B, and then A
B --> A
A \u2190 B
Action A occurs later than Action B
Before Action A, Action B happens
Following Action B, Action A happens
Action B first, Action A second
Action B happens first, followed by Action A.
B happens first and A happens afterwards
First the man does Action B. Then he does Action A.
The video starts with Action B and ends with Action A
Action B, Action A
B-A
The correct order is BA, not AB.
It is not AB but BA
Action A happens before Action B? No, B happens before A.
<answer>BA</answer>
动作B先于动作A
D'abord B, ensuite A""",
    "A": """
A
Only action A occurs, action B does not occur.
Action B is not seen. Action A is seen""",
    "B": "b.\nI only detect Action B.\nThere is no action A; action B",
    None: """
Action A and Action B
Both actions occur simultaneously
AB or BA
A or B
Neither A nor B
Action A does not happen before Action B
I cannot determine whether A is before B
A happened before B. B happened before A.
A man opens the door, then B
A: sitting, B: standing
The order is not clear
Action C""",
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [(t, said) for said, block in ORDERS.items() for t in block.strip().split("\n") if t],
)
def test_an_order_is_read_as_a_person_reads_it(text: str, expected: str | None) -> None:
    assert order(text) == expected


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("There are two violins", "three", "two"),
        ("About 25", "two", "more than ten"),
        ("twenty-five of them", "two", "more than ten"),
        ("No instruments.", "two", "zero"),
        ("ten or more", "ten", None),
        ("one violin and two cellos", "two", None),
        ("<think>two</think>three", "two", "three"),
        ("Yes, two of them", "no", "yes"),
        ("Two of them", "yes", None),
        ("The cello is not louder", "yes", "no"),
        ("The loudest instrument, a violin, is on the left", "right", "left"),
        ("left, not right", "right", "left"),
        ("They sound at the same time", "left", "simultaneously"),
        ("Inside", "outdoor", "indoor"),
        ("Not the flute but the piano", "flute", "piano"),
        ("violins", "cello", "violin"),
        ("a cello or a violin", "cello", None),
        ("guitar", "acoustic_guitar", None),
        ("an acoustic guitar", "acoustic_guitar", "acoustic_guitar"),
        ("a zither", "zither", "zither"),  # an answer that the data set does not list
    ],
)
def test_music_is_answered_by_the_kind_of_question(
    text: str, answer: str, expected: str | None
) -> None:
    assert said_of_kind(text, answer) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Scene change: Yes, Locations: from a hall to a yard.", ("a hall", "a yard")),
        ("It goes from a hall to a yard\nthen home", ("a hall", "a yard")),
        ("from a hall", ()),
        ("from to a yard", ()),
        ("from a\nhall to a yard", ()),
    ],
)
def test_places_of_a_scene_change(text: str, expected: tuple[str, ...]) -> None:
    assert route(text) == expected


def test_a_scene_change_is_read_behind_its_name(tmp_path: Path) -> None:
    asked = {v: {"Scene change": "Yes", "Locations": "from a to b."} for v in ("1", "2", "3")}
    said = {
        "1": "<think>Scene change: No</think>**Scene change:** Yes, Locations: from a to b.",
        "2": "Scene change: Yes or No",
        "3": "Yes, it changes.",
    }
    files = write(tmp_path / "q.json", asked), write(tmp_path / "p.json", said)
    found = scored("vidhalluc-sth", files[1], questions=files[0])
    assert [row["read"] for row in found.rows] == ["yes", None, "yes"]


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("B", True),
        ("b.", True),
        ("(B) runs", True),
        ("(B)runs", True),
        ("", True),  # the empty word is part of every option
        (" C", True),
        ("B\n\nIt runs", False),
        ("B: runs", False),
        ("The answer is (B)", False),
        ("C", False),
    ],
)
def test_the_own_code_of_mvbench_compares_the_first_word(text: str, fits: bool) -> None:
    assert first_word_fits(text, "B") is fits


def task(*said: str) -> list[dict[str, Any]]:
    item = {"video": "v.mp4", "question": "?", "candidates": ["sits", "runs"], "answer": "runs"}
    return [{**item, "prediction": text} for text in said]


@pytest.mark.parametrize("name", ["tvbench", "mvbench"])
def test_tvbench_and_mvbench_are_read_as_either_code_does(name: str, tmp_path: Path) -> None:
    """`(B)`: all three. `B: runs`: not the own code. "It is (B)": strictly alone. "": own alone."""
    file = write(tmp_path / "t.json", task("(B)", "B: runs", "It is (B)", ""))
    right = {}
    for code in (None, "rrpo", "original"):
        kind = find(name, code=code)
        found = score(kind, read_files(kind, [file]), legacy=code is not None, num_resamples=2)
        right[code] = [row["right"] for row in found.rows]
        assert found.summary().get("code") == code
    assert right == {
        None: [True, True, True, False],
        "rrpo": [True, True, False, False],
        "original": [True, False, False, True],
    }
    assert scored(name, file, legacy=True).summary()["code"] == "rrpo"


def test_a_code_that_a_benchmark_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be one of rrpo, original for tvbench"):
        find("tvbench", code="orignal")
    with pytest.raises(ConfigError, match="one code alone for mlvu"):
        find("mlvu", code="original")
