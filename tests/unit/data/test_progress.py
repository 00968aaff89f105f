"""A bar for long jobs on a terminal, and nothing anywhere else."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from data_rows import PAIR

from mmalign.config import DataConfig
from mmalign.data import cache, jobs
from mmalign.data.cache import KeptRows
from mmalign.data.example import Candidate, Example
from mmalign.data.sources import load_examples
from mmalign.train.files import rows_hash

SLOW = (
    "import time\n"
    "from mmalign.data import jobs as progress\n"
    "progress.DELAY = 0.2\n"
    "for _ in progress.track(range(8), 'counting sheep', total=8): time.sleep(0.1)\n"
)


def on_terminal(code: str, **environment: str) -> str:
    main, side = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-c", code],
        stderr=side,
        env={**os.environ, "TERM": "xterm", **environment},
        check=True,
    )
    os.close(side)
    assert done.returncode == 0
    told = b""
    while True:
        try:
            part = os.read(main, 4096)
        except OSError:
            break
        if not part:
            break
        told += part
    os.close(main)
    return told.decode(errors="replace")


def test_long_job_on_a_terminal_shows_how_far_it_is() -> None:
    told = on_terminal(SLOW)
    assert "counting sheep" in told
    assert "/8" in told


@pytest.mark.runs
def test_nothing_is_shown_of_a_short_job_or_by_further_processes() -> None:
    assert on_terminal(SLOW.replace("0.1", "0.001")) == ""
    assert on_terminal(SLOW, RANK="1") == ""


def test_nothing_is_shown_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    with jobs.waiting("loading"):
        assert list(jobs.track(range(3), "counting")) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_every_pass_over_all_rows_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, tuple[int | None, str]] = {}

    @contextmanager
    def bar(what: str, total: int | None) -> Iterator[SimpleNamespace]:
        def update(task: int, *, completed: int, count: str) -> None:
            told[what] = total, count

        told[what] = total, ""
        yield SimpleNamespace(task_ids=[0], update=update)

    monkeypatch.setattr(jobs, "_is_watched", lambda: True)
    monkeypatch.setattr(jobs, "_bar", bar)
    monkeypatch.setattr(jobs, "DELAY", -1.0)
    monkeypatch.setattr(jobs, "_LOOK_EVERY", -1.0)
    monkeypatch.setattr(cache, "FEWEST", 1)
    monkeypatch.setattr(cache, "_AT_ONCE", 2)
    file = tmp_path / "rows.jsonl"
    file.write_text(
        "".join(f'{{"prompt": "{i}", "chosen": "a", "rejected": "b"}}\n' for i in range(6))
    )
    config = DataConfig.model_validate({"train": str(file), "eval_fraction": 0.4})
    parts = load_examples(config, PAIR, seed=0)
    kept = KeptRows(tmp_path / "kept", config, PAIR, 0)
    kept.put(parts, [])
    assert kept.get() == parts
    rows_hash([Example("x", "p", (Candidate("a"), Candidate("b")), (1.0, 0.0))] * 3)
    assert told == {
        f"reading {file}": (None, "6 rows"),
        "comparing with rows held out": (6, "6/6"),
        f"looking at {file}": (None, ""),
        "keeping rows": (6, "6/6"),
        "reading rows": (6, "6/6"),
        "hashing rows": (3, "3/3"),
    }
