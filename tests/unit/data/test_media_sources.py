"""Rows about clips between files: repeats, held-out clips, reports of checks, converted files."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from data_rows import PAIR, Write
from picture_files import save

from mmalign.config import DataConfig
from mmalign.data import Example, check_files, convert_file, load_examples
from mmalign.data.records import read_records

ANSWERS = {"prompt": "Is there a disc?", "chosen": "yes", "rejected": "no"}


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """A folder with c0.mp4 to c39.mp4; nothing here decodes them."""
    for number in range(40):
        (tmp_path / f"c{number}.mp4").write_bytes(bytes([number]))
    return tmp_path


def rows(*numbers: int, **more: Any) -> list[dict[str, Any]]:
    return [ANSWERS | {"video": f"c{n}.mp4"} | more for n in numbers]


def names(examples: list[Example]) -> set[str]:
    return {clip.path.name for row in examples for clip in row.media.videos}


def test_the_same_words_about_another_clip_are_another_row(clips: Path, write: Write) -> None:
    report = check_files([write("a.jsonl", rows(0, 1, 1))])
    (line,) = report.warnings.lines()
    assert "a.jsonl:3" in line
    assert "it repeats" in line
    swapped = {"chosen": "no", "rejected": "yes"}
    assert not check_files([write("a.jsonl", [*rows(0), *rows(1, **swapped)])]).warnings.lines()
    (line,) = check_files([write("a.jsonl", [*rows(0), *rows(0, **swapped)])]).warnings.lines()
    assert "pairs that contradict an earlier one, which prefers the other response: 1 of 2" in line


def test_a_part_of_the_clip_tells_rows_apart(clips: Path, write: Write) -> None:
    path = write("a.jsonl", [*rows(0, start=0, end=1), *rows(0, start=1, end=2)])
    assert not check_files([path]).warnings.lines()


def test_clips_of_evaluation_rows_that_are_trained_on_are_told(
    clips: Path, write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    train = write("a.jsonl", rows(0, 1))
    held_out = write("b.jsonl", [*rows(1, prompt="What colour?"), *rows(2)])
    (line,) = check_files([train], eval_paths=[held_out]).warnings.lines()
    assert line == (
        "1 of 2 evaluation rows show a clip, image or sound that is also trained on; "
        f"the first is {held_out}:1"
    )
    load_examples(DataConfig(train=train, eval=held_out), PAIR, seed=0)
    assert caplog.messages == [line]


def test_a_fraction_holds_out_clips_whole(
    clips: Path, write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    every = range(40)
    colours = {"prompt": "What colour is the disc?", "chosen": "Red.", "rejected": "Blue."}
    path = write("a.jsonl", [*rows(*every), *rows(*every, **colours)])
    train, held_out = load_examples(DataConfig(train=path, eval_fraction=0.25), PAIR, seed=0)
    assert not names(train) & names(held_out)
    assert len(held_out) == 2 * len(names(held_out))
    assert 4 <= len(names(held_out)) <= 18
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_missing_file_is_a_problem_with_its_line(clips: Path, write: Write) -> None:
    report = check_files([write("a.jsonl", [*rows(0), *rows(77), *rows(1), *rows(78)])])
    assert report.exit_code == 1
    (line,) = report.problems.lines()
    assert "a.jsonl:2: what is shown or played must be a media file that is there" in line
    assert "c77.mp4" in line
    assert "1 more has the same problem: 4" in line


def test_a_report_counts_what_is_shown(clips: Path, write: Write) -> None:
    save(clips / "a.png", 0)
    more = ANSWERS | {"images": ["a.png"], "audio": "c3.mp4"}
    text = check_files([write("a.jsonl", [*rows(0, 1, 1), more])]).text()
    assert "shown    3 clips (2 files), 1 image (1 file), 1 sound (1 file)" in text


def test_pictures_of_prompts_are_looked_into(clips: Path, write: Write) -> None:
    (clips / "a.png").write_bytes(b"no picture")
    report = check_files([write("a.jsonl", [ANSWERS | {"image": "a.png"}])])
    (line,) = report.problems.lines()
    assert "an image must be decodable" in line


def test_a_converted_file_names_a_clip_again_that_changed(clips: Path, write: Write) -> None:
    source = write("a.jsonl", rows(5))
    target = clips / "out" / "b.jsonl"
    convert_file(source, target)
    copy = target.parent / "b_pictures" / "c5.mp4"
    assert os.path.samefile(copy, clips / "c5.mp4")
    assert json.loads(target.read_text())["video"] == "b_pictures/c5.mp4"
    (clips / "c5.mp4").unlink()
    (clips / "c5.mp4").write_bytes(b"new")
    convert_file(source, target)
    assert copy.read_bytes() == b"new"
    (row,) = read_records(target)
    assert row.example is not None
    assert row.example.media.videos[0].path == copy.resolve()


def test_where_links_cannot_be_made_clips_are_copied(
    clips: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("another disk")

    monkeypatch.setattr(os, "link", refuse)
    target = clips / "out" / "b.jsonl"
    for _ in range(2):
        convert_file(write("a.jsonl", rows(5)), target)
    copy = target.parent / "b_pictures" / "c5.mp4"
    assert not os.path.samefile(copy, clips / "c5.mp4")
    assert copy.read_bytes() == bytes([5])


def test_a_copied_picture_is_never_written_into_a_source(clips: Path, write: Write) -> None:
    """A prompt's image becomes a hard link; later, a response of that name must not fill it."""
    for number, folder in enumerate(("one", "two")):
        (clips / folder).mkdir()
        save(clips / folder / "a.png", number)
    first, second = ((clips / folder / "a.png").read_bytes() for folder in ("one", "two"))
    target = clips / "out" / "b.jsonl"
    convert_file(write("one/a.jsonl", [ANSWERS | {"image": "a.png"}]), target)
    convert_file(write("two/a.jsonl", [{"prompt": "a disc", "image": "a.png"}]), target)
    assert (target.parent / "b_pictures" / "a.png").read_bytes() == second != first
    assert (clips / "one" / "a.png").read_bytes() == first


def test_a_folder_of_copies_that_is_the_source_loses_nothing(clips: Path, write: Write) -> None:
    save(clips / "a.png", 0)
    kept = (clips / "a.png").read_bytes()
    (clips / "out").mkdir()
    (clips / "out" / "b_pictures").symlink_to(clips)
    for more in rows(5, image="a.png"), [{"prompt": "a disc", "image": "a.png"}]:
        convert_file(write("a.jsonl", more), clips / "out" / "b.jsonl")
    assert (clips / "c5.mp4").read_bytes() == bytes([5])
    assert (clips / "a.png").read_bytes() == kept
