"""Which column asks where there is no `prompt`, and the system text before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmalign.data import to_record
from mmalign.data.records import read_prompts
from mmalign.errors import DataError

ALIKE = {"chosen": "The capital is Paris.", "rejected": "The capital is Rome."}
USER = {"role": "user", "content": "Q"}
SYSTEM = {"role": "system", "content": "S"}


def bot(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    "column",
    ["question", "input", "query", "problem", "context", "user", "post", "instruction", "history"],
)
def test_a_column_that_asks_is_the_prompt(column: str) -> None:
    assert to_record({column: "Capital of France?", **ALIKE}) == {
        "prompt": "Capital of France?",
        **ALIKE,
    }


@pytest.mark.parametrize("column", ["messages", "conversations", "conversation", "context"])
def test_messages_that_are_answered_are_the_prompt(column: str) -> None:
    raw = {column: [SYSTEM, USER], "chosen": bot("a"), "rejected": bot("b")}
    assert to_record(raw) == {"prompt": [SYSTEM, USER], "chosen": "a", "rejected": "b"}


def test_answers_as_messages_to_a_question() -> None:
    raw = {"question": "Q", "chosen": [bot("a")], "rejected": [bot("b")]}
    assert to_record(raw) == {"prompt": [USER], "chosen": "a", "rejected": "b"}


def test_several_columns_that_could_ask_are_named() -> None:
    with pytest.raises(DataError, match="`question` and `context` could each be it"):
        to_record({"question": "Q?", "context": "C", **ALIKE})


@pytest.mark.parametrize(
    "beside",
    [
        {"ask_me": "What is it?"},
        {"promt": "What is it?"},
        {"task": "Say what the capital of this country is, please."},
        {"dialog": [["a", "b"]]},
    ],
)
def test_shared_words_are_no_prompt_where_a_column_could_be_it(beside: dict[str, Any]) -> None:
    (name,) = beside
    with pytest.raises(DataError, match=f"words that both answers begin with .* `{name}` could be"):
        to_record({**beside, **ALIKE})


def test_shared_words_beside_bookkeeping() -> None:
    beside = {"id": 1, "source": "a web page", "chosen_model": "m", "score_chosen": 2.0}
    record = to_record({**beside, **ALIKE})
    assert record["prompt"] == "The capital is"
    assert record["chosen"] == " Paris."


LAYOUTS: dict[str, dict[str, Any]] = {
    "pair": {"prompt": "Q", "chosen": "a", "rejected": "b"},
    "pair of messages": {"prompt": [USER], "chosen": [bot("a")], "rejected": [bot("b")]},
    "whole conversations": {"chosen": [USER, bot("a")], "rejected": [USER, bot("b")]},
    "transcripts": {
        "chosen": "\n\nHuman: Q\n\nAssistant: a",
        "rejected": "\n\nHuman: Q\n\nAssistant: b",
    },
    "question": {"question": "Q", "chosen": "a", "rejected": "b"},
    "choice": {"prompt": "Q", "response_a": "a", "response_b": "b", "winner": "a"},
    "ranked": {"prompt": "Q", "responses": ["a", "b"], "scores": [2, 1]},
    "kto": {"prompt": "Q", "completion": "a", "label": True},
    "messages": {"messages": [USER, bot("a")]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "a"}]},
    "alpaca": {"instruction": "Q", "output": "a"},
    "query": {"query": "Q", "response": "a", "rejected_response": "b"},
    "clip": {"video": "a.mp4", "prompt": "Q", "chosen": "a", "rejected": "b"},
    "media question": {"media": "a.mp4", "question": "Q", "chosen": "a", "rejected": "b"},
}


@pytest.mark.parametrize("raw", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("name", ["system", "system_prompt"])
def test_a_system_column_stands_before_the_prompt_of_every_layout(
    raw: dict[str, Any], name: str
) -> None:
    record = to_record({**raw, name: "S"})
    assert record["prompt"] == [SYSTEM, USER]
    assert name not in record
    assert to_record({**raw, name: ""})["prompt"] in ("Q", [USER])


def test_each_own_prompt_gets_the_system_text() -> None:
    raw = {"prompt_chosen": "Q", "prompt_rejected": [USER], "chosen": "a", "rejected": "b"}
    record = to_record({**raw, "system": "S"})
    assert record["prompt_chosen"] == record["prompt_rejected"] == [SYSTEM, USER]


def test_a_system_turn_beside_the_column() -> None:
    raw = {"prompt": [SYSTEM, USER], "chosen": "a", "rejected": "b"}
    assert to_record({**raw, "system": "S"})["prompt"] == [SYSTEM, USER]
    with pytest.raises(DataError, match="the system turn of the prompt say different things"):
        to_record({**raw, "system": "other"})
    with pytest.raises(DataError, match="`system` and `system_prompt` say different things"):
        to_record({**raw, "system": "S", "system_prompt": "T"})
    with pytest.raises(DataError, match="system must be text, but is 5"):
        to_record({**raw, "system": 5})


def test_a_history_stands_before_the_question() -> None:
    raw = {"question": "Q", "history": [["h", "i"]], "chosen": "a", "rejected": "b"}
    head = [{"role": "user", "content": "h"}, bot("i")]
    assert to_record(raw)["prompt"] == [*head, USER]
    assert to_record(raw | {"history": head})["prompt"] == [*head, USER]
    for history in ([["only a question"]], [["a", None]], ["a"]):
        with pytest.raises(DataError, match=r"history must hold \[question, answer\]"):
            to_record(raw | {"history": history})


@pytest.mark.parametrize(
    ("prompt", "expected"), [([SYSTEM], [SYSTEM, USER]), ([SYSTEM, USER], [SYSTEM, USER])]
)
def test_a_prompt_that_the_conversations_go_on_with(prompt: Any, expected: Any) -> None:
    raw = {"prompt": prompt, "chosen": [USER, bot("a")], "rejected": [USER, bot("b")]}
    assert to_record(raw)["prompt"] == expected


def test_another_question_in_the_conversations() -> None:
    other = [{"role": "user", "content": "another"}]
    with pytest.raises(DataError, match="begin differently"):
        to_record({"prompt": other, "chosen": [USER, bot("a")], "rejected": [USER, bot("b")]})


def test_files_of_prompts_are_read_the_same_way(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "Q", "system": "S", "tools": [{"name": "f"}], "score": 3}\n')
    (row,) = read_prompts(path)
    assert isinstance(row.prompt, tuple)
    assert [turn.as_dict() for turn in row.prompt] == [SYSTEM, USER]
    assert '"name": "f"' in row.template.tools
    assert row.meta == {}


def test_prompts_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("fine \r\ncaf\u00e9".encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.txt:2: not UTF-8 .*; save the file as UTF-8"):
        read_prompts(path)
    path.write_bytes("\ufefffine \r\n\r\na\u2028b\n".encode())
    assert [row.prompt for row in read_prompts(path)] == ["fine ", "a\u2028b"]


@pytest.mark.parametrize("beside", [{"question": ""}, {"input": " ", "source": "web"}])
def test_shared_words_are_no_prompt_where_the_column_for_it_is_empty(
    beside: dict[str, Any],
) -> None:
    name = next(iter(beside))
    with pytest.raises(DataError, match=f"there is no prompt: `{name}` is empty"):
        to_record({**beside, **ALIKE})


@pytest.mark.parametrize("text", ["What is it?", "Name the capital."])
def test_a_short_sentence_could_ask(text: str) -> None:
    with pytest.raises(DataError, match="`task` could be it"):
        to_record({"task": text, **ALIKE})
    assert to_record({"task": "open qa", **ALIKE})["prompt"] == "The capital is"


def test_an_instruction_beside_the_prompt_of_a_pair_is_kept() -> None:
    row = {"prompt": "Q", "instruction": "Answer briefly", "chosen": "a", "rejected": "b"}
    assert to_record(row) == row
