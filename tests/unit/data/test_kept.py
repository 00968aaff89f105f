"""Rows that are kept are the rows that were read, and nothing stale is ever given back."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from datetime import date
from pathlib import Path

import pytest

from mmalign.config import DataConfig
from mmalign.data import cache as kept
from mmalign.data.cache import KeptRows
from mmalign.data.example import Candidate, Example
from mmalign.data.sources import load_examples


@dataclass(frozen=True)
class Pairs:
    """What an objective of pairs asks for."""

    rows: str = "pair"
    candidates: int = 2
    roles: tuple[str, ...] = ()
    labels: bool = False


TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho", "name": "x"}]
ROWS = [
    {
        "id": "a",
        "prompt": "Why?",
        "chosen": "So.",
        "rejected": "No.",
        "weight": 2.5,
        "note": [1, 2],
    },
    {"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": "No.", "p_chosen": 0.75},
    {"prompt": "How?", "chosen": "Thus…", "rejected": "Nay.", "spans_chosen": [[0, 2]]},
    {"prompt": "Who?", "chosen": "I.", "rejected": "You.", "chosen_cut": True},
]


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "FEWEST", 1)
    monkeypatch.setattr(kept, "_AT_ONCE", 3)  # two lines, the second not full


def source(tmp_path: Path) -> DataConfig:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return DataConfig.model_validate({"train": [{"path": str(file), "weight": 2}]})


def test_kept_rows_are_those_that_were_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = source(tmp_path)
    parts = load_examples(config, Pairs(), seed=0)
    KeptRows(tmp_path / "kept", config, Pairs(), 0).put(parts, ["one line"])
    caplog.clear()
    found = KeptRows(tmp_path / "kept", config, Pairs(), 0).get()
    assert found == parts
    assert [row.place for row in found[0]] == [row.place for row in parts[0]]
    assert len({id(row) for row in found[0]}) == len(ROWS)  # a repeated row is one object
    assert caplog.messages == ["one line"]


def test_all_that_a_row_holds_is_kept() -> None:
    """A new field must be packed too, or rows with it refused."""
    known = "id prompt candidates labels kind weight media template meta place"
    assert {item.name for item in fields(Example)} == set(known.split())
    known = "response prompt media spans steps role complete"
    assert {item.name for item in fields(Candidate)} == set(known.split())


def test_another_file_config_or_objective_is_a_miss(tmp_path: Path) -> None:
    config = source(tmp_path)
    folder = tmp_path / "kept"
    KeptRows(folder, config, Pairs(), 0).put(load_examples(config, Pairs(), seed=0), [])
    assert KeptRows(folder, config, Pairs(), 1).get() is None
    assert KeptRows(folder, config, Pairs(rows="any"), 0).get() is None
    swapped = config.model_copy(update={"swap": True})
    assert KeptRows(folder, swapped, Pairs(), 0).get() is None
    longer = config.model_copy(update={"max_response_length": 7})  # asks nothing else of the files
    assert KeptRows(folder, longer, Pairs(), 0).get() is not None
    with Path(config.train[0].path).open("a") as stream:
        stream.write("\n")
    assert KeptRows(folder, config, Pairs(), 0).get() is None


def test_damaged_file_is_a_miss_and_is_written_again(tmp_path: Path) -> None:
    config = source(tmp_path)
    parts = load_examples(config, Pairs(), seed=0)
    rows = KeptRows(tmp_path / "kept", config, Pairs(), 0)
    rows.put(parts, [])
    assert rows.file is not None
    whole = rows.file.read_bytes()
    head, *chunks, places, checksum = whole.split(b"\n")
    without_one = b"\n".join((head, *chunks[:1], places, checksum))
    swapped = b"\n".join((head, *chunks[::-1], places, checksum))
    damage = (whole[:-9], whole[:-20], whole.replace(b"Why", b"Who"), b"", b"[1]")
    for damaged in (*damage, without_one, swapped, whole.replace(b"[[0, ", b"[[1, ")):
        rows.file.write_bytes(damaged)
        assert rows.get() is None
    rows.put(parts, [])
    assert rows.get() == parts


def test_rows_that_json_cannot_hold_are_read_again_and_leave_nothing_behind(tmp_path: Path) -> None:
    config = source(tmp_path)
    train, held_out = load_examples(config, Pairs(), seed=0)
    for value in (date(2026, 1, 1), "half of a pair: \ud800"):
        rows = KeptRows(tmp_path / "kept", config, Pairs(), 0)
        rows.put(([*train, replace(train[0], meta={"when": value})], held_out), [])
        assert rows.get() is None
        assert list((tmp_path / "kept").iterdir()) == []


def test_few_rows_and_what_is_no_file_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "FEWEST", 100)
    config = source(tmp_path)
    KeptRows(tmp_path / "kept", config, Pairs(), 0).put(load_examples(config, Pairs(), seed=0), [])
    assert not (tmp_path / "kept").exists()
    hub = DataConfig.model_validate({"train": "owner/dataset"})
    assert KeptRows(tmp_path / "kept", hub, Pairs(), 0).file is None
