from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmalign.data.fields import left_out, read_lines

GOOD = {"step": 4, "loss": 0.5}


@pytest.mark.parametrize(
    "line",
    [
        b'{"step": 2, "lo',
        b"[]",
        b"null",
        b"7",
        b'"step"',
        b'{"loss": 1}',
        b'{"step": [1]}',
        b'{"step": true}',
        b'{"step": 1.5}',
        b'{"step": -1}',
        b'{"step": 1e400}',
        b"\xff\xfe",
        b"[" * 50_000,
        b'{"step": 1' + b"0" * 5000 + b"}",
    ],
)
def test_a_line_that_is_no_record_is_left_out_and_counted(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    good = json.dumps(GOOD).encode()
    path.write_bytes(b"\n".join([good, line, b"", good, b""]))
    records, odd = read_lines(path)
    assert (records, odd) == ([GOOD, GOOD], 1)
    assert left_out(path, odd) == "metrics.jsonl: 1 unreadable line left out"


def test_a_line_ends_at_a_line_feed_alone(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    record = {"step": 1, "response": "one\u2028two\u0085three"}
    path.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_lines(path) == ([record], 0)
