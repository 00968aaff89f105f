"""A bar for long jobs on a terminal, and nothing anywhere else."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from mmalign.data import jobs

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
