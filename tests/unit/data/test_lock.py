"""One writer a folder, kept out and let in by real processes."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mmalign.data.jobs import LOCK, only_writer
from mmalign.errors import ConfigError

HOLD = """
import sys
from pathlib import Path
from mmalign.data.jobs import only_writer
with only_writer(Path(sys.argv[1]), "output"):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def other_writer(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of `folder`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_second_writer_is_refused_and_told_who_the_first_is(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with other_writer(folder) as process:
        for _ in range(2):  # looking at a lock does not end it
            with (
                pytest.raises(ConfigError, match=rf"process {process.pid} on .* is writing there"),
                only_writer(folder, "output"),
            ):
                pass
        process.communicate()  # its end
        with only_writer(folder, "output"):
            assert json.loads((folder / LOCK).read_text())["pid"] != process.pid


def test_the_lock_of_a_process_that_was_killed_is_taken_over_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with other_writer(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (tmp_path / LOCK).exists()
        with only_writer(tmp_path, "output"):
            pass
    assert [
        r.message for r in caplog.records if f"taken over from process {process.pid}" in r.message
    ]
    assert not (tmp_path / LOCK).exists()


def test_who_waits_is_let_in_when_the_other_has_ended(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Heard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            process.kill()  # once it is said that somebody waits

    with other_writer(tmp_path) as process:
        heard = Heard()
        logging.getLogger("mmalign.data").addHandler(heard)
        try:
            with only_writer(tmp_path, "cache", wait=True):
                assert process.wait() == -signal.SIGKILL
        finally:
            logging.getLogger("mmalign.data").removeHandler(heard)
    assert f"waiting for process {process.pid}" in caplog.text


def test_a_folder_that_stays_empty_is_removed_again(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with only_writer(folder, "output"):
        assert (folder / LOCK).exists()
        with pytest.raises(ConfigError, match="this process is writing"), only_writer(folder, "it"):
            pass
    assert list(tmp_path.iterdir()) == []
    with only_writer(folder, "output"):
        (folder / "weights").write_text("")
    assert [path.name for path in folder.iterdir()] == ["weights"]


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    thesis = tmp_path / "thesis.txt"
    thesis.write_text("mine")
    (tmp_path / LOCK).symlink_to(thesis)
    with pytest.raises(ConfigError, match="cannot be written to"), only_writer(tmp_path, "output"):
        pass
    assert thesis.read_text() == "mine"


@pytest.mark.parametrize("left", ["", "{", "[]", '{"pid": "x"}', '{"pid": 1, "host": "\\u001b["}'])
def test_whatever_a_lock_says_it_can_be_taken_over(tmp_path: Path, left: str) -> None:
    (tmp_path / LOCK).write_text(left)
    with only_writer(tmp_path, "output"):
        pass
