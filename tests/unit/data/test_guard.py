"""No path of data leaves its folder: captions, tables, shards, saved datasets, checkpoints."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from picture_files import encoded, picture

from mmalign.data.files import read_rows
from mmalign.data.opening import Fence
from mmalign.data.records import read_records
from mmalign.errors import CheckpointError, DataError
from mmalign.models.files import weight_files


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """A folder with one pair of images, and a text beside it that it must not show."""
    folder = tmp_path / "pairs"
    for seed, side in enumerate(("chosen", "rejected")):
        (folder / side).mkdir(parents=True)
        (folder / side / "a.png").write_bytes(encoded(picture(seed, 8, 8), "PNG"))
    (tmp_path / "secret.txt").write_text("SECRET")
    (tmp_path / "secret.jsonl").write_text('{"file_name": "a.png", "caption": "SECRET"}\n')
    return folder


def problems(folder: Path) -> str:
    return " ".join(str(p) for record in read_records(folder) for p in record.problems)


def test_a_link_that_stays_inside_is_followed(pairs: Path) -> None:
    (pairs / "real.txt").write_text("a cat")
    os.symlink("../real.txt", pairs / "chosen" / "a.txt")
    (record,) = read_records(pairs)
    assert record.example is not None
    assert record.example.prompt == "a cat"


def test_a_caption_elsewhere_is_not_read(pairs: Path) -> None:
    os.symlink("../../secret.txt", pairs / "chosen" / "a.txt")
    said = problems(pairs)
    assert "leads out of" in said
    assert "SECRET" not in said


@pytest.mark.parametrize("name", ["metadata.jsonl", "captions.jsonl", "captions.txt"])
def test_a_table_of_captions_elsewhere_is_not_read(pairs: Path, name: str) -> None:
    os.symlink("../secret.jsonl", pairs / name)
    with pytest.raises(DataError, match="leads out of"):
        list(read_rows(pairs))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_caption_that_is_a_pipe_is_refused(pairs: Path) -> None:
    os.mkfifo(pairs / "chosen" / "a.txt")
    assert "is a pipe" in problems(pairs)


def test_a_shard_elsewhere_is_not_read(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    (tmp_path / "shards").mkdir()
    parquet.write_table(pa.table({"prompt": ["SECRET"]}), tmp_path / "other.parquet")
    os.symlink("../other.parquet", tmp_path / "shards" / "train-00000-of-00001.parquet")
    with pytest.raises(DataError, match="leads out of"):
        list(read_rows(tmp_path / "shards"))


def test_a_snapshot_of_the_hub_may_link_to_its_blobs(tmp_path: Path) -> None:
    home = tmp_path / "datasets--a--b"
    snapshot = home / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir()
    (home / "blobs" / "ff").write_text("x")
    os.symlink("../../blobs/ff", snapshot / "a.parquet")
    fence = Fence(snapshot)
    assert fence.require(snapshot / "a.parquet")
    with pytest.raises(DataError, match="leads out of"):
        fence.require(home / "other")


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("state.json", {"_data_files": [{"filename": "../b/data.arrow"}]}, "leads out of"),
        ("state.json", {"_data_files": [{"filename": 3}]}, "names no files"),
        ("state.json", {"_data_files": None}, "names no files"),
        ("state.json", [], "must hold an object"),
        ("state.json", "{", "not JSON"),
        ("dataset_dict.json", {"splits": ["../b"]}, "is not a folder in it"),
    ],
)
def test_a_saved_dataset_names_its_own_files(
    tmp_path: Path, file: str, change: object, said: str
) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    row = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    folder = tmp_path / "a"
    datasets.Dataset.from_list(row).save_to_disk(str(folder))
    assert len(list(read_rows(folder))) == 1
    shutil.copytree(folder, tmp_path / "b")
    before = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    value = {**before, **change} if isinstance(change, dict) else change
    text = value if isinstance(value, str) else json.dumps(value)
    (folder / file).write_text(text)
    with pytest.raises(DataError, match=said):
        list(read_rows(folder))


def test_a_damaged_saved_dataset_is_one_sentence(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    datasets.Dataset.from_list([row] * 50).save_to_disk(str(tmp_path / "a"))
    (arrow,) = (tmp_path / "a").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:200])
    with pytest.raises(DataError):
        list(read_rows(tmp_path / "a"))


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/other.safetensors"])
def test_an_index_of_weights_names_files_beside_it(tmp_path: Path, name: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="only files beside it"):
        weight_files(tmp_path)
