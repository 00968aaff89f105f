"""Every public layout, read unaided from a small literal record."""

from __future__ import annotations

from typing import Any

import pytest

from mmalign.data import parse_record, to_record
from mmalign.data.convert import find_layout
from mmalign.data.layouts import LAYOUTS
from mmalign.data.media_layouts import MEDIA_LAYOUTS, PICTURE_LAYOUTS
from mmalign.errors import DataError


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def bot(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


HH = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why?\n\nAssistant: "
HH_PROMPT = [user("Hi"), bot("Yes?"), user("Why?")]
PAIR = {"chosen": "good", "rejected": "bad"}
PAIR_RECORD = {"prompt": "Q", **PAIR}
CHAT_RECORD = {"prompt": [user("Q")], **PAIR}

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "trl plain": ("pair", PAIR_RECORD, PAIR_RECORD),
    "trl conversational": (
        "pair",
        {"prompt": [user("Q")], "chosen": [bot("good")], "rejected": [bot("bad")]},
        CHAT_RECORD,
    ),
    "trl implicit conversational": (
        "pair",
        {"chosen": [user("Q"), bot("good")], "rejected": [user("Q"), bot("bad")]},
        CHAT_RECORD,
    ),
    "trl implicit plain": (
        "pair",
        {"chosen": "The sky is blue.", "rejected": "The sky is brown."},
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " brown."},
    ),
    "several turns differ": (
        "pair",
        {
            "chosen": [user("Q"), bot("a"), user("?"), bot("good")],
            "rejected": [user("Q"), bot("b"), user("?"), bot("bad")],
        },
        {
            "prompt": [user("Q")],
            "chosen": [bot("a"), user("?"), bot("good")],
            "rejected": [bot("b"), user("?"), bot("bad")],
        },
    ),
    "ultrafeedback binarized": (
        "pair",
        {
            "prompt": "Q",
            "prompt_id": "f00",
            "chosen": [user("Q"), bot("good")],
            "rejected": [user("Q"), bot("bad")],
            "messages": [user("Q"), bot("good")],
            "score_chosen": 8.5,
            "score_rejected": 3.0,
        },
        CHAT_RECORD
        | {
            "prompt_id": "f00",
            "score_chosen": 8.5,
            "score_rejected": 3.0,
            "messages": [user("Q"), bot("good")],
        },
    ),
    "prompt text, answers as messages": (
        "pair",
        {"prompt": "Q", "chosen": [bot("good")], "rejected": [bot("bad")]},
        CHAT_RECORD,
    ),
    "text and messages": (
        "pair",
        {"prompt": [user("Q")], "chosen": "good", "rejected": [bot("bad")]},
        CHAT_RECORD,
    ),
    "hh": ("pair", {"chosen": HH + "good", "rejected": HH + "bad"}, {"prompt": HH_PROMPT, **PAIR}),
    "hh prompt": (
        "pair",
        {"prompt": HH.strip(), **PAIR},
        {"prompt": HH_PROMPT, **PAIR},
    ),
    "hh with prompt column": (
        "pair",
        {"prompt": HH, "chosen": HH + "good", "rejected": HH + "bad"},
        {"prompt": HH_PROMPT, **PAIR},
    ),
    "soft": ("pair", PAIR_RECORD | {"p_chosen": 0.7}, PAIR_RECORD | {"p_chosen": 0.7}),
    "llama-factory alpaca": (
        "alpaca",
        {"instruction": "Q", "input": "x", **PAIR},
        {"prompt": "Q\nx", **PAIR},
    ),
    "llama-factory alpaca with history": (
        "alpaca",
        {"instruction": "Q", "input": "", "system": "S", "history": [["a", "b"]], "output": "good"},
        {"prompt": [system("S"), user("a"), bot("b"), user("Q")], "response": "good"},
    ),
    "llama-factory alpaca kto": (
        "alpaca",
        {"instruction": "Q", "output": "bad", "kto_tag": False},
        {"prompt": "Q", "response": "bad", "desirable": False},
    ),
    "llama-factory sharegpt": (
        "sharegpt",
        {
            "conversations": [{"from": "human", "value": "Q"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        CHAT_RECORD,
    ),
    "llama-factory sharegpt kto": (
        "sharegpt",
        {
            "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "good"}],
            "system": "S",
            "kto_tag": True,
        },
        {"prompt": [system("S"), user("Q")], "response": "good", "desirable": True},
    ),
    "ms-swift rejected_response": (
        "messages",
        {"messages": [user("Q"), bot("good")], "rejected_response": "bad"},
        CHAT_RECORD,
    ),
    "ms-swift rejected_messages": (
        "messages",
        {"messages": [user("Q"), bot("good")], "rejected_messages": [user("Q"), bot("bad")]},
        CHAT_RECORD,
    ),
    "ms-swift kto": (
        "messages",
        {"messages": [user("Q"), bot("good")], "label": True},
        {"prompt": [user("Q")], "response": "good", "desirable": True},
    ),
    "ms-swift query": (
        "messages",
        {"query": "Q", "response": "good", "rejected_response": "bad"},
        PAIR_RECORD,
    ),
    "messages": (
        "messages",
        {"messages": [user("Q"), bot("good")]},
        {"prompt": [user("Q")], "response": "good"},
    ),
    "kto": (
        "single",
        {"prompt": "Q", "completion": "good", "label": True},
        {"prompt": "Q", "response": "good", "desirable": True},
    ),
    "kto conversational": (
        "single",
        {"prompt": [user("Q")], "completion": [bot("bad")], "label": False},
        {"prompt": [user("Q")], "response": "bad", "desirable": False},
    ),
    "plain": ("single", {"prompt": "Q", "completion": "A"}, {"prompt": "Q", "response": "A"}),
    "ranked with scores": (
        "ranked",
        {"prompt": "Q", "responses": ["a", "b"], "scores": [1, 2]},
        {"prompt": "Q", "responses": ["a", "b"], "scores": [1, 2]},
    ),
    "ranked with ranks": (
        "ranked",
        {"prompt": "Q", "answers": ["a", "b"], "ranks": [2, 1]},
        {"prompt": "Q", "responses": ["a", "b"], "scores": [-2, -1]},
    ),
    "ultrafeedback": (
        "ranked",
        {
            "instruction": "Q",
            "completions": [
                {"response": "a", "overall_score": 7.0, "model": "x"},
                {"response": "b", "overall_score": 4.0, "model": "y"},
            ],
        },
        {"prompt": "Q", "responses": ["a", "b"], "scores": [7.0, 4.0]},
    ),
    "tie": (
        "choice",
        {"prompt": "Q", "tie": True, "response_a": "x", "response_b": "y", "votes_tie": 3},
        {"prompt": "Q", "chosen": "x", "rejected": "y", "tie": True, "votes_tie": 3},
    ),
    "votes for two answers": (
        "choice",
        {"prompt": "Q", "response_a": "bad", "response_b": "good", "votes_a": 1, "votes_b": 2},
        PAIR_RECORD | {"votes_chosen": 2, "votes_rejected": 1},
    ),
    "arena": (
        "choice",
        {
            "conversation_a": [user("Q"), bot("good")],
            "conversation_b": [user("Q"), bot("bad")],
            "winner": "model_a",
        },
        CHAT_RECORD,
    ),
    "better_response_id": (
        "choice",
        {"prompt": "Q", "response_0": "bad", "response_1": "good", "better_response_id": 1},
        PAIR_RECORD,
    ),
}


@pytest.mark.parametrize(("layout", "raw", "expected"), CASES.values(), ids=CASES)
def test_layout(layout: str, raw: dict[str, Any], expected: dict[str, Any]) -> None:
    assert find_layout(raw) == layout
    record = to_record(raw)
    assert record == expected
    parse_record(record, where="f:1")


@pytest.mark.parametrize(("layout", "raw", "expected"), CASES.values(), ids=CASES)
def test_null_columns_of_a_table_count_as_absent(
    layout: str, raw: dict[str, Any], expected: dict[str, Any]
) -> None:
    columns = {key for _, other, _ in CASES.values() for key in other}
    assert to_record(dict.fromkeys(columns) | raw) == expected


@pytest.mark.parametrize("record", [case[2] for case in CASES.values()], ids=CASES)
def test_a_canonical_record_is_read_as_itself(record: dict[str, Any]) -> None:
    assert to_record(record) == record


def test_a_layout_can_be_named() -> None:
    raw = {"prompt": "Q", "completion": "other", **PAIR}
    with pytest.raises(DataError, match="'nope'; it must be one of pair, choice"):
        to_record(raw, "nope")
    with pytest.raises(DataError, match="layout sharegpt needs conversations; the columns are"):
        to_record(raw, "sharegpt")
    record = to_record(raw | {"response": "x"}, "pair")
    assert record == PAIR_RECORD | {"completion": "other", "meta": {"response": "x"}}


def test_unknown_columns_name_what_was_found_and_the_nearest_layouts() -> None:
    with pytest.raises(DataError) as error:
        to_record({"prompt": "Q", "choosen": "a", "reject": "b"})
    message = str(error.value)
    assert "no layout has the columns choosen, prompt, reject" in message
    assert message.index("pair (prompt") < message.index(";")


def test_columns_that_fit_several_layouts_are_refused() -> None:
    raw = {"prompt": "Q", "response": "a", "answers": ["a", "b"]}
    with pytest.raises(DataError, match="fit several layouts; set `layout`: ranked, single"):
        to_record(raw)
    assert to_record(raw, "single") == {"prompt": "Q", "response": "a", "answers": ["a", "b"]}


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"chosen": [user("Q"), bot("a")], "rejected": [user("R"), bot("b")]}, "no prompt"),
        ({"chosen": "yes", "rejected": "no"}, "share no first words"),
        ({"prompt": "Q", "response_a": "x", "response_b": "y"}, "need a `winner`"),
        ({"prompt": "Q", "response_a": "x", "response_1": "y"}, "one of the two responses"),
        ({"conversations": [{"from": "human", "value": "Q"}]}, "must end with an assistant turn"),
        ({"messages": 5}, "messages must be a list of messages, but is 5"),
        ({"messages": [{"text": "hi"}]}, "must hold messages with role and content"),
    ],
)
def test_a_row_that_breaks_its_layout(raw: dict[str, Any], expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        to_record(raw)


def test_a_prompt_that_only_mentions_speakers_stays_text() -> None:
    prompt = "Continue: Human: hi\n\nAssistant:"
    assert to_record({"prompt": prompt, **PAIR})["prompt"] == prompt


def test_two_turns_of_one_speaker_are_one_message() -> None:
    prompt = "Human: Hi\n\nAssistant: Wait.\n\nAssistant: Yes?\n\nHuman: Why?\n\nAssistant:"
    assert to_record({"prompt": prompt, **PAIR})["prompt"] == [
        user("Hi"),
        bot("Wait.\n\nYes?"),
        user("Why?"),
    ]


def test_text_parts_of_a_message_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    raw = {"prompt": [{"role": "user", "content": parts}], **PAIR}
    assert to_record(raw)["prompt"] == [user("ab")]


def test_every_layout_has_a_case() -> None:
    elsewhere = set(PICTURE_LAYOUTS) | set(MEDIA_LAYOUTS)
    assert {layout for layout, _, _ in CASES.values()} == set(LAYOUTS) - elsewhere
