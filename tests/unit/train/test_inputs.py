"""What a run is made of is known by content, wherever it lies."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from toy_adapter import toy_config

from mmalign.config import RunConfig
from mmalign.data.example import Candidate, Clip, Example, Media, Picture
from mmalign.train import files as inputs
from mmalign.train.files import rows_hash


def make_model(folder: Path) -> Path:
    """A folder with the names of a model; nothing reads more than its bytes."""
    folder.mkdir(parents=True)
    files = {
        "config.json": "{}",
        "model.safetensors": "weights",
        "tokenizer.json": "tokens",
        "chat_template.jinja": "template",
        "preprocessor_config.json": "pixels",
        "generation_config.json": "only sampling",
        "README.md": "read by nobody",
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def config_of(folder: Path, **model: Any) -> RunConfig:
    config = toy_config(folder)
    return config.model_copy(update={"model": config.model.model_copy(update=model)})


def clip_row(file: Path, **times: float) -> Example:
    shown = Media(videos=(Clip(file, **times),))
    return Example("row", "What?", (Candidate("a"), Candidate("b")), (1.0, 0.0), media=shown)


def test_a_model_is_its_files_and_not_its_place(tmp_path: Path) -> None:
    one, two = make_model(tmp_path / "one"), make_model(tmp_path / "elsewhere" / "two")
    told = [inputs.identity(inputs.look(config_of(tmp_path, path=str(m)), [])) for m in (one, two)]
    assert told[0] == told[1]
    assert {kind: sorted(files) for kind, files in told[0].items()} == {
        "model": ["config.json", "model.safetensors"],
        "tokenizer": ["chat_template.jinja", "tokenizer.json"],
        "processor": ["preprocessor_config.json"],
    }


def test_a_trained_aggregator_of_clues_counts_as_well(tmp_path: Path) -> None:
    pytest.importorskip("av")
    clues = tmp_path / "clues.safetensors"
    video = {"clues": {"path": str(clues)}}
    told: list[str] = []
    for weights in ("first", "other"):
        clues.write_text(weights)
        raw = {**toy_config(tmp_path).model_dump(), "modality": "video", "video": video}
        told.append(str(inputs.identity(inputs.look(RunConfig.model_validate(raw), []))["clues"]))
    assert told[0] != told[1]


@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.json", "chat_template.jinja", "config.json"]
)
def test_a_file_that_changed_in_its_place_is_named(tmp_path: Path, name: str) -> None:
    model = make_model(tmp_path / "m")
    config = config_of(tmp_path, path=str(model))
    then = inputs.identity(inputs.look(config, []))
    info = (model / name).stat()
    (model / name).write_text((model / name).read_text().swapcase() + " ")
    os.utime(model / name, ns=(info.st_atime_ns, info.st_mtime_ns))
    table = inputs.look(config, [])
    (found,) = inputs.differences(then, inputs.identity(table), table, tmp_path)
    assert found.startswith(f"{model / name} was {info.st_size} bytes, hash ")
    assert "when the run began, and is" in found
    (model / "README.md").write_text("another text")
    (model / "generation_config.json").write_text("hotter")
    assert inputs.identity(inputs.look(config, [])) == inputs.identity(table)


def test_what_is_no_folder_is_known_by_its_name(tmp_path: Path) -> None:
    one, two = (inputs.identity(inputs.look(config_of(tmp_path, path=p), [])) for p in ("a", "b"))
    assert (one["model"], two["model"]) == ({"name": "a"}, {"name": "b"})


def test_a_large_file_is_looked_at_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "WHOLE", 4096)
    model = make_model(tmp_path / "m")
    weights = model / "model.safetensors"
    data = bytearray(os.urandom(40_000))
    weights.write_bytes(data)
    config = config_of(tmp_path, path=str(model))
    before = inputs.look(config, [])
    (tmp_path / inputs.TABLE).write_text(json.dumps(before))
    assert inputs.touched(tmp_path, before) == []
    os.utime(weights, (1, 1))
    assert inputs.touched(tmp_path, inputs.look(config, [])) == [str(weights)]
    for place in (0, -1):
        changed = bytearray(data)
        changed[place] ^= 1
        weights.write_bytes(changed)
        after = inputs.look(config, [])
        assert inputs.identity(after) != inputs.identity(before)
        assert inputs.touched(tmp_path, after) == []


def test_media_are_named_by_the_table_of_the_run_and_may_move(tmp_path: Path) -> None:
    def rows(folder: Path) -> list[Example]:
        return [clip_row(folder / f"{n}.mp4") for n in range(3)]

    def look(folder: Path) -> Any:
        return inputs.look(config, rows(folder))

    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    for n in range(3):
        (here / f"{n}.mp4").write_text(f"clip {n}")
    config = config_of(tmp_path)
    before = look(here)
    (tmp_path / inputs.TABLE).write_text(json.dumps(before))
    hashes = [rows_hash(rows(here))]
    here.rename(there)
    hashes.append(rows_hash(rows(there)))
    assert hashes[0] == hashes[1]
    assert inputs.identity(look(there)) == inputs.identity(before)

    (there / "1.mp4").write_text("other")
    after = look(there)
    then, now = inputs.identity(before), inputs.identity(after)
    (found,) = inputs.differences(then, now, after, tmp_path)
    assert found.startswith(f"{there / '1.mp4'} was 6 bytes")
    (tmp_path / inputs.TABLE).write_text("{")  # then the kind alone can be named
    (found,) = inputs.differences(then, now, after, tmp_path)
    assert found.startswith("media was 3 files")


def read_of(table: Any) -> list[str]:
    return [Path(found["path"]).name for found in table["media"].values() if found["hash"]]


def test_of_very_many_media_a_sample_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same one wherever they lie; of the others size and time tell, where nothing moved."""
    monkeypatch.setattr(inputs, "_MOST_READ", 8)
    config, rows = config_of(tmp_path), {}
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for n in range(40):
            (tmp_path / folder / f"{n:02}.mp4").write_text(f"clip {n:02}")
        rows[folder] = [clip_row(file) for file in sorted((tmp_path / folder).iterdir())]
    before, there = (inputs.look(config, rows[folder]) for folder in "ab")
    read = read_of(before)
    assert len(read) == 8
    assert read_of(there) == read
    assert inputs.identity(there) == inputs.identity(before)
    (tmp_path / inputs.TABLE).write_text(json.dumps(before))
    assert inputs.touched(tmp_path, before) == []

    (known, *_), unread = read, next(f"{n:02}.mp4" for n in range(40) if f"{n:02}.mp4" not in read)
    for name, is_told in ((known, True), (unread, False)):
        file = tmp_path / "a" / name
        text, info = file.read_text(), file.stat()
        file.write_text(text.upper())
        os.utime(file, ns=(1, info.st_mtime_ns + 1))
        after = inputs.look(config, rows["a"])
        changed = inputs.differences(
            inputs.identity(before), inputs.identity(after), after, tmp_path
        )
        assert bool(changed) == is_told
        assert inputs.touched(tmp_path, after) == ([] if is_told else [str(file)])
        file.write_text(text)
        os.utime(file, ns=(info.st_atime_ns, info.st_mtime_ns))
    (tmp_path / "a" / unread).write_text("clip 123")
    after = inputs.look(config, rows["a"])
    assert inputs.identity(after) != inputs.identity(before), "the size tells, of every file"


def test_what_is_read_of_all_files_together_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "_ALL_MEDIA", 2**18)
    rows = [clip_row(tmp_path / f"{n}.mp4") for n in range(64)]
    for n in range(64):
        (tmp_path / f"{n}.mp4").write_bytes(bytes([n]) * 2**16)
    read = 0
    plain = inputs._of_parts

    def counted(stream: Any, length: int, size: int) -> str:
        nonlocal read
        read += size
        return plain(stream, length, size)

    monkeypatch.setattr(inputs, "_of_parts", counted)
    table = inputs.look(config_of(tmp_path), rows)
    assert read == 2**18
    assert len({found["hash"] for found in table["media"].values()}) == 64


def test_rows_are_others_when_they_say_or_show_another_thing(tmp_path: Path) -> None:
    one = clip_row(tmp_path / "a.mp4")
    other = [
        clip_row(tmp_path / "a.mp4", start=1.0),
        Example("row", "Who?", one.candidates, one.labels, media=one.media),
        Example("row", one.prompt, one.candidates, (0.0, 1.0), media=one.media),
    ]
    assert len({rows_hash([row]) for row in (one, *other)}) == 4
    renamed = Example("x", one.prompt, one.candidates, one.labels, media=one.media)
    assert rows_hash([renamed]) == rows_hash([one])
    twice = [one, clip_row(tmp_path / "b.mp4")]
    assert rows_hash(twice) != rows_hash([one, one]), "which rows share a file counts"


def test_pictures_to_learn_from_count_by_the_names_that_noise_is_drawn_by(tmp_path: Path) -> None:
    def row(folder: str) -> Example:
        pictures = (Candidate(Picture(tmp_path / folder / f"{n}.png")) for n in range(2))
        return Example("row", "a cat", tuple(pictures), (1.0, 0.0))

    assert rows_hash([row("x/pairs")]) == rows_hash([row("y/pairs")])
    assert rows_hash([row("x/pairs")]) != rows_hash([row("x/others")])
