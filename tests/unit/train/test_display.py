from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest
from toy_adapter import toy_config

from mmalign.train.loop import train


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_file_gets_a_line_now_and_then(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(toy_config(tmp_path, "train.num_steps=50"))
    told = capsys.readouterr().err
    lines = [line for line in told.splitlines() if line.startswith("step ")]
    assert lines[0].startswith("step 1/50  loss 0.6931  margin +0.000  accuracy 0.50  rows/s ")
    assert lines[-1].startswith("step 50/50  loss ")
    assert lines[-1].endswith("left 0:00")
    assert len(lines) < 10, "not one a step"
    assert "held out at step 50: loss " in told
    assert "\x1b" not in told


def test_a_terminal_gets_a_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    train(toy_config(tmp_path, "train.num_steps=5"))
    told = terminal.getvalue()
    assert "5/5" in told
    assert "accuracy 1.00" in told
    assert "left" in told
    assert "held out at step 5: loss" in told, "lines appear above the bar"


def test_a_narrow_terminal_keeps_the_step_and_the_time_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    train(toy_config(tmp_path, "train.num_steps=5"))
    told = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert re.search(r"step 5/5 \d:\d\d:\d\d left \d:\d\d:\d\d loss ", told)
    assert "accuracy 1.00" in told
    lines = [line for line in told.splitlines() if line.startswith("held out at step 5")]
    assert "log-ratio margin" in lines[0], "the terminal wraps it, and a copy is one line"
