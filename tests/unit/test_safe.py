"""What comes from strangers: how it is shown, and which files are opened."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from mmalign import safe
from mmalign.errors import DataError


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, 好 and \u3000 too\n\tnext", "plain, 好 and \u3000 too\n\tnext"),
        ("\x1b[2J\x1b]0;title\x07", "\\x1b[2J\\x1b]0;title\\x07"),
        ("a\rb\x9bc\x7f", "a\\rb\\x9bc\\x7f"),
        ("safe\u202egnp.exe\u2066", "safe\\u202egnp.exe\\u2066"),
        ("half \ud800", "half \\ud800"),
        ("line\u2028line\u0085", "line\\u2028line\\x85"),
    ],
)
def test_what_moves_a_terminal_is_written_out(text: str, shown: str) -> None:
    assert safe.escaped(text) == shown
    assert str(DataError(text)) == shown
    assert safe.escaped(shown) == shown, "what was escaped stays as it is"


def test_a_name_stands_on_one_line() -> None:
    assert safe.printable("a\nb\u00a0c") == "a\\nb\\xa0c"


def test_a_long_message_keeps_its_ends() -> None:
    text = str(DataError("begin " + "x" * 100_000 + " end"))
    assert text.startswith("begin xxx")
    assert text.endswith("xxx end")
    assert "characters left out" in text
    assert len(text) < 2000
    assert len(str(DataError(f"outer {DataError('y' * 5000)}"))) < 2000


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_pipes_devices_and_folders_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    os.symlink("pipe", tmp_path / "link")
    for path in (tmp_path / "pipe", tmp_path / "link"):
        with pytest.raises(OSError, match="is a pipe and no file"):
            safe.open_file(path)
    if Path("/dev/zero").exists():
        with pytest.raises(OSError, match="is a device and no file"):
            safe.open_file("/dev/zero")
    if sys.platform != "win32":
        with pytest.raises(OSError, match="folder"):
            safe.open_file(tmp_path)
    with pytest.raises(OSError, match="null"):
        safe.open_file("a\0b")


def test_a_file_may_have_so_many_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert safe.read_bytes(tmp_path / "a", 5) == b"12345"
    with pytest.raises(OSError, match="has more than"):
        safe.read_bytes(tmp_path / "a", 4)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "out.txt"
    safe.write_text(file, "old")
    (tmp_path / ".out.txt.tmp").write_text("of a killed process")

    def fail(temporary: Path) -> None:
        assert not temporary.exists(), "what was left before is not continued"
        temporary.write_text("half")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"), safe.replacing(file) as temporary:
        fail(temporary)
    assert file.read_text() == "old"
    with safe.replacing(file, several=True, flush=True) as temporary:
        assert str(os.getpid()) in temporary.name
        temporary.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out.txt"]
