"""Compressed and large data files: read piece by piece, bounded, and refused with the place."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path
from typing import Any

import pytest

from mmalign.data import fields, files, opening
from mmalign.data.files import read_rows
from mmalign.errors import DataError

ROWS = [{"prompt": f"Question {i}?", "chosen": "yes", "rejected": "no"} for i in range(40)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def zst(data: bytes) -> bytes:
    pa = pytest.importorskip("pyarrow")
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


FOLD: dict[str, Any] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zst,
}


@pytest.mark.parametrize("ending", FOLD)
def test_every_kind_is_read(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(FOLD[ending](LINES))
    assert [row.value for row in read_rows(path)] == ROWS
    path.write_bytes(FOLD[ending](LINES[:500]) + FOLD[ending](LINES[500:]))
    if ending != ".zst":  # several streams in one file, as parallel tools write them
        assert [row.value for row in read_rows(path)] == ROWS


@pytest.mark.parametrize("ending", FOLD)
def test_a_damaged_file_is_one_sentence(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.jsonl{ending}"
    whole = FOLD[ending](LINES)
    for data in (whole[:-12], whole[:30] + b"\xff\xff\xff\xff" + whole[34:], b"no such thing"):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"a\.jsonl.* cannot be read: "):
            list(read_rows(path))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.csv.gz", "a.txt.gz", "a.jsonl.xz"])
def test_what_unfolds_beyond_all_text_is_refused(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "FREE", 2**20)
    path = tmp_path / name
    start = {".json": b"[", ".csv": b'prompt\n"'}.get(path.suffixes[0], b"")
    path.write_bytes(FOLD[path.suffixes[1]](start + b" " * (3 * 2**20)))
    with pytest.raises(DataError, match="unfolds to more than 250 times its size"):
        list(read_rows(path))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_no_record_is_longer_than_a_line_may_be(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "LONGEST_LINE", 2**16)
    monkeypatch.setattr(fields, "LONGEST", 2**16)
    monkeypatch.setattr(fields, "_CHUNK", 2**10)
    word = "w" * 2**17
    text = {
        ".jsonl": json.dumps({"prompt": word}),
        ".json": json.dumps([{"prompt": "a"}, {"prompt": word}], indent=1),
        ".csv": f'prompt,chosen\nq,a\nq,"{word}"\n',
        ".txt": word,
    }[Path(name).suffix]
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=r"too long|longer than") as caught:
        list(read_rows(tmp_path / name))
    assert name in str(caught.value)


def test_an_array_is_read_in_pieces_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    rows = [{"prompt": 'é\u2028"]}, [' * i, "n": [i, -1.5e3, None, True]} for i in range(1, 30)]
    for size in (1, 2, 7, 64):
        monkeypatch.setattr(fields, "_CHUNK", size)
        for content in (rows, {"version": {"a": [1]}, "data": rows, "n": 12}):
            path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8-sig")
            assert [row.value for row in read_rows(path)] == rows


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[{"a": 1}, {"a": 2]', "after record 1: not JSON"),
        ('[{"a": 1} {"a": 2}]', "after record 1: not JSON: a comma"),
        ('[{"a": 1}] x', "after record 1: not JSON: more follows"),
        ('[{"a": 1},', "after record 1: not JSON: the file ends too early"),
        ('{"data": [{"a": 1}], 3}', "not JSON: an object must have names"),
        ('[{"a": NaN}]', "NaN is not a number"),
        ("[" * 5000, "nested too deeply"),
        ("", "ends too early"),
    ],
)
def test_a_damaged_array_says_where(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(DataError, match=said):
        list(read_rows(path))


def test_a_record_of_too_many_values_is_a_problem(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": [' + "[]," * 200_000 + "[]]}\n" + '{"prompt": "a, b"}\n')
    first, second = read_rows(path)
    assert first.problem == "holds more than 200,000 values"
    assert not second.problem


@pytest.mark.parametrize("name", ["w" * 300, "\x1b[2J"])
def test_odd_names_of_columns_are_told_and_not_compared_for_ever(tmp_path: Path, name: str) -> None:
    from mmalign.data.validate import check_files

    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({name: 1, "x": 2}) + "\n")
    said = check_files([path]).text()
    assert ("is the header missing?" if len(name) > 256 else "\\x1b[2J") in said
    assert "\x1b" not in said


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.csv.gz", "a.txt"])
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match="is a pipe and no file"):
        list(read_rows(tmp_path / name))
