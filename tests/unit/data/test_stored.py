"""Conversations that tables store as text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmalign.data import to_record
from mmalign.data.records import read_records
from mmalign.data.turns import LONGEST, Unreadable, literal
from mmalign.errors import DataError

GOOD = [
    {"role": "user", "content": 'Say "it\'s"\nplease'},
    {"role": "assistant", "content": "it's", "tool_calls": None},
]
BAD = [GOOD[0], {"role": "assistant", "content": "[no]"}]
RECORD = {"prompt": GOOD[:1], "chosen": "it's", "rejected": "[no]"}

WRITTEN = {
    "json": json.dumps,
    "indented json": lambda value: json.dumps(value, indent=2),
    "python": str,
    "numpy": lambda value: str(np.array(value, dtype=object)),
    "numpy repr": lambda value: repr(np.array(value, dtype=object)),
    "tuple parts": lambda value: str(
        [
            {**turn, "content": np.array([{"type": "text", "text": turn["content"]}])}
            for turn in value
        ]
    ),
}


@pytest.mark.parametrize("write", WRITTEN.values(), ids=WRITTEN)
def test_a_conversation_as_text_is_one(write: Any) -> None:
    assert to_record({"chosen": write(GOOD), "rejected": write(BAD)}) == RECORD
    sharegpt = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "a"}]
    assert to_record({"conversations": json.dumps(sharegpt)})["response"] == "a"


def test_roles_of_ones_own() -> None:
    turns = [{"role": role, "content": role} for role in ("customer", "agent")]
    assert to_record({"prompt": str(turns), "chosen": "a", "rejected": "b"})["prompt"] == turns


def test_one_message_as_text() -> None:
    raw = {"prompt": "Q", "chosen": str(GOOD[1]), "rejected": json.dumps({"messages": BAD[1:]})}
    assert to_record(raw) == {"prompt": [{"role": "user", "content": "Q"}], **RECORD} | {
        "prompt": [{"role": "user", "content": "Q"}]
    }


def test_texts_in_a_list() -> None:
    raw = {"prompt": "Q", "responses": [json.dumps(GOOD[1:]), "b"], "scores": [1, 2]}
    assert to_record(raw)["responses"] == ["it's", "b"]


@pytest.mark.parametrize(
    "answer",
    [
        '[{"a": 1}]',
        '{"users": [{"role": "user", "value": 2}]}',
        '[{"role": "admin", "value": 3}, {"role": "user", "value": 2}]',
        '[{"from": "2020", "value": 3}]',
        "[1, 2]",
        "[x for x in y]",
        "{ role: 'user', content }",
        "['role': 'user']",
        "[a link](http://x) says {'role': 'user', 'content': 1}",
    ],
)
def test_an_answer_that_begins_like_a_list_stays_text(answer: str) -> None:
    assert to_record({"prompt": "Q", "chosen": answer, "rejected": "b"})["chosen"] == answer


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (str(GOOD)[:-1], "it is cut off: it ends in"),
        (json.dumps(GOOD)[:-3], "cut off"),
        ("[{'role': 'user', 'content': f(x)}]", "neither JSON nor what Python writes"),
        ("[{'role': 'user', 'content': 'x'}] and more", "neither JSON nor what Python writes"),
        ("[{'role': 'user', 'content': " + "[" * 80 + "]" * 80 + "}]", "nested too deeply"),
        ("[{'role': 'user', 'content': '" + "x" * LONGEST + "'}]", "longer than"),
    ],
)
def test_a_conversation_that_cannot_be_read_is_named(text: str, why: str) -> None:
    with pytest.raises(
        DataError, match="chosen looks like a conversation written as text"
    ) as error:
        to_record({"prompt": "Q", "chosen": text, "rejected": "b"})
    assert why in str(error.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("['a' 'b']", ["a", "b"]),
        ("['a', \"it's\"]", ["a", "it's"]),
        ("[1. 2.5]", [1.0, 2.5]),
        ("[-1. -2.]", [-1.0, -2.0]),
        ("[nan 1.]", [None, 1.0]),
        ("array([1, 2])", [1, 2]),
        ("[True, None]", [True, None]),
    ],
)
def test_lists_as_python_and_numpy_write_them(text: str, value: Any) -> None:
    assert literal(text) == value


@pytest.mark.parametrize(
    "text", ["1 2", "f(1)", "[f(1)]", "(" * 500, "[" * 5000, "__import__('os')"]
)
def test_what_is_no_value(text: str) -> None:
    with pytest.raises(Unreadable):
        literal(text)


def one(path: Path) -> Any:
    (record,) = read_records(path)
    assert record.example is not None, record.problems
    return record.value


def test_columns_of_strings_and_of_json_in_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    path = tmp_path / "a.parquet"
    texts = {"chosen": [json.dumps(GOOD)], "rejected": [json.dumps(BAD)]}
    parquet.write_table(pa.table(texts), path)
    assert one(path) == RECORD
    tools = {"tools": [json.dumps([{"type": "function", "function": {"name": "f"}}])]}
    columns = {
        name: pa.ExtensionArray.from_storage(pa.json_(), pa.array(cells))
        for name, cells in (texts | tools).items()
    }
    parquet.write_table(pa.table(columns), path)
    assert one(path) == RECORD | {"tools": json.loads(tools["tools"][0])}


def test_a_table_fills_what_one_message_lacks_with_null(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    calls = [
        {"type": "function", "function": {"name": "f", "arguments": arguments}}
        for arguments in ({"town": "Oslo"}, {"count": 1})
    ]
    chosen = [{"role": "assistant", "content": "", "tool_calls": calls}]
    raw = {"prompt": "Q", "chosen": chosen, "rejected": [{"role": "assistant", "content": "b"}]}
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.Table.from_pylist([raw]), path)
    assert one(path)["chosen"] == chosen


def test_a_cell_that_is_not_utf8_is_a_problem_of_its_row(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    raw = pa.array([b"good", b"\xff bad", b"good"], pa.binary())
    cells = pa.StringArray.from_buffers(3, raw.buffers()[1], raw.buffers()[2])
    table = pa.table({"prompt": cells, "chosen": ["a"] * 3, "rejected": ["b"] * 3})
    path = tmp_path / "a.parquet"
    parquet.write_table(table, path)
    found = list(read_records(path))
    assert [record.example is None for record in found] == [False, True, False]
    assert found[1].place == f"{path}:2"
    assert "prompt is not UTF-8" in str(found[1].problems[0])


def test_lists_in_cells_of_csv(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,responses,scores\nQ,\"['a' 'it is']\",[1. 2.]\n")
    assert one(path) == {"prompt": "Q", "responses": ["a", "it is"], "scores": [1.0, 2.0]}


def test_json_lines_in_a_file_named_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    rows = [{"prompt": "Q", "chosen": "a", "rejected": "b"}, {"prompt": "R"}]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    good, bad = read_records(path)
    assert (good.place, good.value) == (f"{path}:1", rows[0])
    assert bad.place == f"{path}:2"


@pytest.mark.parametrize("write", [json.dumps, str])
def test_lists_as_text(write: Any) -> None:
    answers = [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 2}]
    row = {"prompt": "Q", "answers": write(answers)}
    assert to_record(row)["responses"] == ["a", "b"]
    row = {"prompt": "Q", "responses": write(["a", "b"]), "scores": write([1, 2.5])}
    assert to_record(row) == {"prompt": "Q", "responses": ["a", "b"], "scores": [1, 2.5]}
    exchanges = write([{"human": "Q", "assistant": "a"}])
    assert to_record({"conversation": exchanges})["response"] == "a"


def test_json_text_written_twice() -> None:
    row = {"prompt": "Q", "chosen": json.dumps(json.dumps(GOOD[1:])), "rejected": '"[no]"'}
    record = to_record(row)
    assert (record["chosen"], record["rejected"]) == ("it's", '"[no]"')


@pytest.mark.parametrize(
    "text",
    [
        "[{'role': assistant, 'content': hello there}]",
        "[{'content': 'x\ny', 'role': 'assistant'}]",
        "[OrderedDict([('role', 'assistant'), ('content', 'x')])]",
        "[ChatCompletionMessage(content='x', role='assistant')]",
    ],
)
def test_conversations_that_others_write_are_refused(text: str) -> None:
    with pytest.raises(DataError, match="chosen looks like a conversation written as text"):
        to_record({"prompt": "Q", "chosen": text, "rejected": "b"})


def test_code_about_roles_is_text() -> None:
    code = '[{"role": role, "content": text} for role, text in turns]'
    assert to_record({"prompt": "Q", "chosen": code, "rejected": "b"})["chosen"] == code
