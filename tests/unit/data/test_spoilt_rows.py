"""No row, however it is spoilt, ends in anything but an Example or problems."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest

from mmalign.data import to_record
from mmalign.data.convert import Unread, unread_of
from mmalign.data.parse import read_record
from mmalign.data.records import json_line
from mmalign.errors import DataError

USER, BOT = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "a"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
ROWS: list[dict[str, Any]] = [
    {
        "prompt": [USER, {"role": "assistant", "tool_calls": [CALL]}],
        "chosen": [BOT | {"reasoning_content": "r"}],
        "rejected": [BOT, USER, BOT | {"content": "b"}],
        "system": "S",
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        "chat_template_kwargs": {"x": 1},
    },
    {"question": "Q", "history": [["a", "b"]], "chosen": "the a", "rejected": "the b"},
    {"instruction": "Q", "input": "x", "output": ["a", "b"], "history": [["q", "a"]]},
    {"instruction": "Q", "chosen_response": "a", "rejected_response": "b"},
    {"instruction": "Q", "generations": ["a", "b"], "ratings": [1, 2]},
    {"context": [USER], "response1": "a", "response2": "b", "overall_preference": -2},
    {"history": "Q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1},
    {"input": {"messages": [USER]}, "preferred_output": [BOT], "non_preferred_output": "b"},
    {"prompt": "Q", "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 2}]},
    {
        "conversations": [
            {"from": "human", "value": "Q"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
            {"from": "gpt", "value": "a"},
        ],
        "kto_tag": True,
    },
    {"messages": [USER, BOT], "rejected_response": [BOT | {"content": "b"}], "objects": {}},
    {"conversation": [{"human": "Q", "assistant": "a"}], "system": "S"},
    {"prompt": "Q", "chosen": str([USER, BOT]), "rejected": "[{'role': 'user', 'content': 1}]"},
    {"prompt": [{"role": "user", "content": [{"type": "text", "text": "x"}]}], "completion": "a"},
    {"prompt": "Q", "response_a": "a", "response_b": "b", "winner": "a"},
    {"question": "q", "answer": "a", "pred": "b", "video": "x.mp4"},
]
NESTED: list[Any] = []
for _ in range(60):
    NESTED = [NESTED]
SPOILT: list[Any] = [
    *(None, 0, -1, 1.5, True, "", "x", [], {}, [[]], [None], {"a": 1}, [{"a": 1}], "\ud800"),
    *("\x1b]0;t\x07", "[{'role': 'user'", '{"name": "f"}', "[[", 10**400, float("nan"), NESTED),
    *([{"type": {"a": 1}, "text": "x"}], {"role": "user"}, {"role": {}, "content": []}, {1: 2}),
    *([{"role": "user", "content": None}], {"function": "x"}, b"x", [["a", None]], {"messages": 5}),
]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to every member of a value."""
    members: Any = value.items() if isinstance(value, dict) else ()
    members = enumerate(value) if isinstance(value, list) and len(path) < 7 else members
    return [path, *(place for key, member in members for place in places(member, (*path, key)))]


def spoil(row: dict[str, Any], draw: random.Random) -> None:
    *way, last = draw.choice([path for path in places(row) if path])
    inside: Any = row
    for key in way:
        inside = inside[key]
    kind = draw.random()
    if kind < 0.6:
        inside[last] = copy.deepcopy(draw.choice(SPOILT))
    elif kind < 0.8:
        row[draw.choice(list(draw.choice(ROWS)))] = copy.deepcopy(draw.choice(SPOILT))
    else:
        row |= copy.deepcopy(draw.choice(ROWS))


@pytest.mark.runs
@pytest.mark.parametrize("seed", range(6))
def test_spoilt_rows(seed: int) -> None:
    draw = random.Random(seed)
    read = 0
    for _ in range(300):
        raw = copy.deepcopy(draw.choice(ROWS))
        for _ in range(draw.randint(1, 3)):
            spoil(raw, draw)
        try:
            record = to_record(raw)
        except DataError:
            continue
        example, problems = read_record(record, where="f:1")
        assert (example is None) == bool(problems)
        if example is not None:
            read += 1
            book = Unread()
            book.add("f", unread_of(raw, record, example))
            assert all(line.isprintable() for line in (*book.lines(), *book.notes()))
            json_line(record).encode()
    assert read
