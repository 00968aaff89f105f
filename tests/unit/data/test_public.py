"""Public files with names of their own, as their cards describe them."""

from __future__ import annotations

from typing import Any

import pytest

from mmalign.data import parse_record, to_record
from mmalign.errors import DataError

USER = {"role": "user", "content": "Q"}
PAIR = {"prompt": "Q", "chosen": "good", "rejected": "bad"}
CHAT = PAIR | {"prompt": [USER]}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("good", "bad"))
LIST = {"prompt": "Q", "responses": ["good", "bad"]}

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ultrafeedback-binarized-preferences": (
        {"instruction": "Q", "chosen_response": "good", "rejected_response": "bad"},
        PAIR,
    ),
    "distilabel": (
        {"instruction": "Q", "generations": ["good", "bad"], "ratings": [5, 2]},
        LIST | {"scores": [5, 2]},
    ),
    "helpsteer3": (
        {"context": [USER], "response1": "good", "response2": "bad", "overall_preference": -2},
        CHAT,
    ),
    "helpsteer3, the second": (
        {"context": [USER], "response1": "bad", "response2": "good", "overall_preference": 1},
        CHAT,
    ),
    "helpsteer3, neither": (
        {"context": [USER], "response1": "good", "response2": "bad", "overall_preference": 0},
        CHAT | {"tie": True},
    ),
    "helpsteer2": (
        {"prompt": "Q", "response_1": "bad", "response_2": "good", "preference_strength": 3},
        PAIR,
    ),
    "shp": ({"history": "Q", "human_ref_A": "good", "human_ref_B": "bad", "labels": 1}, PAIR),
    "shp, the second": (
        {"history": "Q", "human_ref_A": "bad", "human_ref_B": "good", "labels": 0},
        PAIR,
    ),
    "nectar": (
        {
            "prompt": "\n\nHuman: Q \n\nAssistant: ",
            "answers": [{"answer": "bad", "rank": 2.0}, {"answer": "good", "rank": 1.0}],
        },
        {"prompt": [USER], "responses": ["bad", "good"], "scores": [-2, -1]},
    ),
    "openai": (
        {
            "input": {"messages": [USER], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [GOOD],
            "non_preferred_output": [BAD],
        },
        CHAT | {"tools": [], "parallel_tool_calls": True},
    ),
    "preference-collection": (
        {
            "orig_instruction": "Q",
            "orig_response_A": "bad",
            "orig_response_B": "good",
            "orig_preference": "B",
        },
        PAIR,
    ),
    "arena-55k, as stored": (
        {
            "prompt": '["Q", "more"]',
            "response_a": '["bad", "worse"]',
            "response_b": '["good", "better"]',
            "winner_model_a": 0,
            "winner_model_b": 1,
            "winner_tie": 0,
        },
        {
            "prompt": [USER],
            "chosen": [
                GOOD,
                {"role": "user", "content": "more"},
                {"role": "assistant", "content": "better"},
            ],
            "rejected": [
                BAD,
                {"role": "user", "content": "more"},
                {"role": "assistant", "content": "worse"},
            ],
        },
    ),
    "arena-140k": (
        {"conversation_a": [USER, GOOD], "conversation_b": [USER, BAD], "winner": "both_bad"},
        CHAT | {"tie": True},
    ),
    "ultrafeedback of distilabel": (
        {
            "instruction": "Q",
            "generations": ["good", "bad"],
            "ratings": [5, 2],
            "rationales": ["so", "no"],
        },
        LIST | {"scores": [5, 2], "meta": {"rationales": ["so", "no"]}},
    ),
    "kto of axolotl": (
        {"system": "S", "instruction": "Q", "completion": "good", "label": True},
        {
            "prompt": [{"role": "system", "content": "S"}, USER],
            "response": "good",
            "desirable": True,
        },
    ),
    "input and output": (
        {"input": [USER], "output": "good"},
        {"prompt": [USER], "response": "good"},
    ),
    "arena-55k": (
        {
            "prompt": "Q",
            "response_a": "bad",
            "response_b": "good",
            "winner_model_a": 0,
            "winner_model_b": 1,
            "winner_tie": 0,
        },
        PAIR,
    ),
    "alpaca with two outputs": ({"instruction": "Q", "output": ["good", "bad"]}, PAIR),
    "axolotl llama3": ({"messages": [USER], "chosen": GOOD, "rejected": BAD}, CHAT),
    "ms-swift sharegpt": (
        {"conversation": [{"human": "Q", "assistant": "good"}]},
        {"prompt": [USER], "response": "good"},
    ),
    "capybara": ({"chosen": {"messages": [USER, GOOD]}, "rejected": [USER, BAD]}, CHAT),
    "ultrainteract": (
        {"trajectory": [{"from": "user", "value": "Q"}], "chosen": "good", "rejected": "bad"},
        CHAT,
    ),
    "stack exchange": (
        {
            "question": "Q",
            "answers": [{"text": "good", "pm_score": 3}, {"text": "bad", "pm_score": 1}],
        },
        LIST | {"scores": [3, 1]},
    ),
    "magpie": (
        {"instruction": "Q", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        CHAT,
    ),
    "judged by distilabel": (
        {"input": "Q", "chosen": "good", "rejected": "bad", "rating": [9, 8], "rationale": "so"},
        PAIR | {"rating": [9, 8], "meta": {"rationale": "so"}},
    ),
    "sharegpt that holds the answer too": (
        {
            "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "good"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        CHAT,
    ),
    "stack-exchange-paired": (
        {"question": "Q", "response_j": "good", "response_k": "bad"},
        PAIR,
    ),
    "code preference pairs": (
        {"instruction": "Q", "input": "", "accepted": "good", "rejected": "bad"},
        PAIR,
    ),
    "transcripts beside the last question": (
        {
            "prompt": "Q",
            "chosen": "Human: Q\n\nAssistant: good",
            "rejected": "Human: Q\n\nAssistant: bad",
        },
        CHAT,
    ),
    "speakers as keys": (
        {
            "chosen": [{"human": "Q"}, {"assistant": "good"}],
            "rejected": [{"human": "Q"}, {"assistant": "bad"}],
        },
        CHAT,
    ),
    "dolly": ({"instruction": "Q", "response": "good"}, {"prompt": "Q", "response": "good"}),
}


@pytest.mark.parametrize(("raw", "expected"), CASES.values(), ids=CASES)
def test_public_file(raw: dict[str, Any], expected: dict[str, Any]) -> None:
    record = to_record(raw)
    assert record == expected
    parse_record(record, where="")
    assert to_record(record) == record


def test_rejected_media_alone_are_the_same_answer_about_something_else() -> None:
    asked = {"role": "user", "content": "<image>Q"}
    short = {"messages": [asked, GOOD], "images": ["a.png"], "rejected_images": ["b.png"]}
    assert to_record(short) == to_record(short | {"rejected_messages": [asked, GOOD]})


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (
            {"prompt": "Q", "response1": "a", "response2": "b", "overall_preference": "x"},
            "overall_preference must say which response won",
        ),
        ({"history": "Q", "human_ref_A": "a", "human_ref_B": "b", "labels": 7}, "labels must say"),
        (
            {"instruction": "Q", "output": ["a", "b", "c"]},
            r"output must be text, or \[chosen, reject",
        ),
        (
            {"conversations": [USER, BAD], "chosen": [GOOD], "rejected": [BAD]},
            "conversations must end with the turn that chosen and rejected answer",
        ),
    ],
)
def test_a_public_file_that_says_something_else(raw: dict[str, Any], expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        to_record(raw)


def test_arena_with_an_answer_too_few() -> None:
    row = {"prompt": '["Q", "more"]', "response_a": '["a", null]', "response_b": '["b"]'}
    with pytest.raises(DataError, match="a turn of response_a is null"):
        to_record({**row, "winner": "a"})
    with pytest.raises(DataError, match="response_b must hold an answer to every turn of prompt"):
        to_record({**row, "response_a": '["a", "b"]', "winner": "a"})
