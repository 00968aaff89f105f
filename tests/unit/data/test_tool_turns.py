"""Calls of tools and their results, whatever roles stand for them, and reasoning beside answers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mmalign.data import parse_record, to_record
from mmalign.data.turns import turns
from mmalign.errors import DataError


def said(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def written(name: str, **arguments: Any) -> str:
    return json.dumps({"name": name, "arguments": arguments})


ASKED = said("user", "Rain in Oslo?")
LOOKED = said("assistant", "", tool_calls=[call("look_up", town="Oslo")])
FOUND = said("tool", "rain")
ANSWER = said("assistant", "It rains.")
AS_TEXT = written("look_up", town="Oslo")


@pytest.mark.parametrize(
    "conversation",
    [
        [ASKED, LOOKED, FOUND, ANSWER],
        [ASKED, said("tool_call", AS_TEXT), said("tool_response", "rain"), ANSWER],
        [ASKED, said("function_call", AS_TEXT), said("observation", "rain"), ANSWER],
        [ASKED, said("function", AS_TEXT), said("observation", "rain"), ANSWER],
        [
            ASKED,
            said("assistant", None, function_call=json.loads(AS_TEXT)),
            said("function", "rain"),
            ANSWER,
        ],
        [
            ASKED,
            {"role": "assistant", "tool_calls": [{"type": "function", "function": {
                "name": "look_up", "arguments": '{"town": "Oslo"}'}}]},
            FOUND,
            ANSWER,
        ],
        [
            {"from": "human", "value": "Rain in Oslo?"},
            {"from": "function_call", "value": AS_TEXT},
            {"from": "observation", "value": "rain"},
            {"from": "gpt", "value": "It rains."},
        ],
    ],
    ids=["openai", "ms-swift", "llama-factory", "older", "former openai", "as text", "sharegpt"],
)  # fmt: skip
def test_calls_and_results_become_one_form(conversation: list[dict[str, Any]]) -> None:
    assert turns(conversation, "messages") == [ASKED, LOOKED, FOUND, ANSWER]


def test_calls_one_after_the_other_are_one_turn() -> None:
    spoken = [
        said("assistant", "I will look."),
        said("tool_call", written("a", x=1)),
        said("tool_call", json.dumps([json.loads(written("b")), json.loads(written("c"))])),
        said("tool", "1"),
        said("tool_call", written("d")),
    ]
    assert turns(spoken, "chosen") == [
        said("assistant", "I will look.", tool_calls=[call("a", x=1), call("b"), call("c")]),
        said("tool", "1"),
        said("assistant", "", tool_calls=[call("d")]),
    ]


def test_a_rejected_response_stands_for_all_after_the_last_question() -> None:
    earlier = [said("user", "Hi"), said("assistant", "Hello")]
    tail = [ASKED, said("tool_call", AS_TEXT), said("tool_response", "rain"), ANSWER]
    record = to_record(
        {"messages": [*earlier, *tail], "rejected_response": [said("assistant", "?")]}
    )
    assert record["prompt"] == [*earlier, ASKED]
    assert record["chosen"] == [LOOKED, FOUND, ANSWER]
    assert record["rejected"] == "?"


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_calls_on_the_way_to_an_answer_belong_to_it(column: str) -> None:
    record = to_record({column: [ASKED, LOOKED, FOUND, ANSWER]})
    assert record["prompt"] == [ASKED]
    assert record["response"] == [LOOKED, FOUND, ANSWER]


@pytest.mark.parametrize(
    "content", ["look_up('Oslo')", '{"arguments": {}}', '{"name": "f", "arguments": "town"}', "[1]"]
)
def test_a_call_that_cannot_be_read_is_named(content: str) -> None:
    with pytest.raises(DataError, match="messages has a call of a tool that is not"):
        to_record({"messages": [ASKED, said("tool_call", content), ANSWER]})


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_what_an_answer_says_beside_its_words_is_kept(key: str) -> None:
    chosen = [said("assistant", "42", **{key: "Six sevens."})]
    record = to_record({"prompt": [ASKED], "chosen": chosen, "rejected": [ANSWER]})
    row = parse_record(record, where="")
    assert [turn.as_dict() for turn in row.candidates[0].response] == chosen  # type: ignore[union-attr]
    assert row.candidates[1].response == "It rains."
    assert parse_record(to_record(record), where="") == row


def test_lists_keep_it_too() -> None:
    thought = [said("assistant", "b", reasoning_content="r")]
    raw = {"prompt": "Q", "responses": [[said("assistant", "a")], thought], "scores": [1, 2]}
    assert to_record(raw)["responses"] == ["a", thought]


def test_keys_that_are_empty_say_nothing() -> None:
    chosen = [said("assistant", "yes", tool_calls=[], reasoning_content="", name=None)]
    record = to_record({"prompt": [ASKED], "chosen": chosen, "rejected": "no"})
    assert parse_record(record, where="").candidates[0].response == "yes"


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (said("assistant", "x", reasoning_content=5), "reasoning_content in a message of chosen"),
        (said("assistant", "x", tool_calls=["f"]), "chosen has a call of a tool"),
        ({"role": "assistant"}, "must hold messages with role and content"),
        (said("assistant", None), "must hold messages with role and content"),
    ],
)
def test_a_message_that_cannot_be_used(message: dict[str, Any], expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        parse_record(
            to_record({"prompt": [ASKED], "chosen": [message], "rejected": "no"}), where=""
        )


def test_tools_get_the_object_that_templates_expect() -> None:
    bare = {"name": "look_up", "description": "d", "parameters": {"type": "object"}}
    whole = [{"type": "function", "function": bare}]
    for tools in (whole, [bare], json.dumps(whole), json.dumps([bare]), str(whole)):
        record = to_record({"prompt": "Q", "chosen": "a", "rejected": "b", "tools": tools})
        assert json.loads(parse_record(record, where="").template.tools) == whole


def test_boxes_of_ms_swift_are_refused() -> None:
    messages = [said("user", "Where is the <ref-object>?"), said("assistant", "At <bbox>.")]
    objects = {"ref": ["cat"], "bbox": [[1, 2, 3, 4]]}
    with pytest.raises(DataError, match="stand for entries of `objects`, which are not read"):
        to_record({"messages": messages, "rejected_response": "no", "objects": objects})


def test_turns_that_two_conversations_do_not_share_are_answered() -> None:
    def side(user: str, last: str) -> list[dict[str, Any]]:
        return [ASKED, ANSWER, said("user", user), said("assistant", last)]

    record = to_record({"chosen": side("x", "a"), "rejected": side("y", "b")})
    assert record["prompt"] == [ASKED]
    assert record["chosen"] == side("x", "a")[1:]
    assert record["rejected"] == side("y", "b")[1:]


def test_dates_of_messages_do_not_tell_prompts_apart() -> None:
    one, other = (said("user", "Q", timestamp=t) for t in (1, 2))
    record = to_record({"chosen": [one, ANSWER], "rejected": [other, said("assistant", "no")]})
    assert [turn["content"] for turn in record["prompt"]] == ["Q"]
    assert parse_record(record, where="").prompt[0].extra == ""  # type: ignore[union-attr]
