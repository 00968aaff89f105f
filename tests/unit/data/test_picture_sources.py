"""Pictures in tables and folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_rows import PAIR
from picture_files import encoded, examples, names, pickapic, picture, problems, save

from mmalign.config import DataConfig
from mmalign.data import Picture, check_files, convert_file, load_examples
from mmalign.data.pictures import open_picture
from mmalign.data.records import read_records
from mmalign.errors import DataError


def test_pickapic_is_listed_without_reading_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow.parquet as pq

    asked: list[list[str]] = []
    read = pq.ParquetFile.iter_batches

    def spy(self: Any, *args: Any, **options: Any) -> Any:
        asked.append(options["columns"])
        return read(self, *args, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    file = pickapic(tmp_path / "a.parquet", [1.0, 0.0, 0.5])
    rows = examples(file)
    assert [names(row) for row in rows] == [
        ["0:jpg_0", "0:jpg_1"],
        ["1:jpg_1", "1:jpg_0"],
        ["2:jpg_0", "2:jpg_1"],
    ]
    assert [row.labels for row in rows] == [(1, 0), (1, 0), (0.5, 0.5)]
    assert rows[1].meta["image_0_uid"] == "uid-1"
    assert not {"jpg_0", "jpg_1"} & set(asked[0])


def test_rows_that_nobody_labelled_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = pickapic(tmp_path / "a.parquet", [1.0, 0.0, 1.0], has_label=[True, False, True])
    with pytest.raises(DataError, match=r"a\.parquet:2: has_label is false"):
        load_examples(DataConfig.model_validate({"train": str(file)}), PAIR, seed=0)
    config = DataConfig.model_validate({"train": str(file), "bad_rows": "drop"})
    train, _ = load_examples(config, PAIR, seed=0)
    assert len(train) == 2
    assert "1 of 3 records have problems and are left out" in caplog.text


def test_pictures_of_saved_datasets_stay_where_they_are(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    columns = {
        "caption": ["x", "y", "z"],
        "image_0": [picture(i) for i in range(3)],
        "image_1": [picture(i + 10) for i in range(3)],
        "label_0": [0.0, 1.0, 0.5],
    }
    data = datasets.Dataset.from_dict(columns)
    data = data.cast_column("image_0", datasets.Image()).cast_column("image_1", datasets.Image())
    both = datasets.DatasetDict({"train": data, "test": data.select([2, 0])})
    both.save_to_disk(str(tmp_path / "saved"))
    rows = examples(tmp_path / "saved")
    assert [row.labels[0] for row in rows] == [1, 1, 0.5, 0.5, 1]
    expected = [(10, 0), (1, 11), (2, 12), (2, 12), (10, 0)]
    for row, seeds in zip(rows, expected, strict=True):
        for candidate, seed in zip(row.candidates, seeds, strict=True):
            assert isinstance(candidate.response, Picture)
            assert (np.asarray(open_picture(candidate.response)) == np.asarray(picture(seed))).all()

    file = tmp_path / "a.parquet"
    data.to_parquet(str(file))
    assert names(examples(file)[0]) == ["0:image_1", "0:image_0"]

    from mmalign.data.tables import _records

    with pytest.raises(DataError, match="cannot be read in place, as it is a selection"):
        list(_records("hub", data.select([1])))


def test_cells_that_only_name_a_file(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    save(tmp_path / "a.png")
    save(tmp_path / "b.png", 1)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = [pa.array([{"bytes": None, "path": f"{n}.png"}], kind) for n in "ab"]
    table = pa.table({"image_chosen": cells[0], "image_rejected": cells[1], "prompt": ["p"]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert names(examples(tmp_path / "a.parquet")[0]) == ["a.png", "b.png"]

    lists = pa.table({"prompt": ["p"], "images": [[b"x", b"y"]], "scores": [[1, 2]]})
    pq.write_table(lists, tmp_path / "b.parquet")
    with pytest.raises(DataError, match="the cells of column 'images' hold lists of images"):
        list(read_records(tmp_path / "b.parquet"))


def test_a_folder_of_parquet_files(tmp_path: Path) -> None:
    for split in ("train", "test", "extra"):
        for i in range(2):
            file = tmp_path / "hub" / "data" / f"{split}-0000{i}-of-00002-0a1b.parquet"
            file.parent.mkdir(parents=True, exist_ok=True)
            pickapic(file, [1.0, 0.0])
    rows = list(read_records(tmp_path / "hub"))
    assert [record.split for record in rows] == ["train"] * 4 + ["test"] * 4
    assert len(list(read_records(tmp_path / "hub", split="extra"))) == 4
    with pytest.raises(DataError, match=r"no split 'nope'; set `split` to one of \['extra'"):
        list(read_records(tmp_path / "hub", split="nope"))
    for name in "ab":
        (tmp_path / "flat").mkdir(exist_ok=True)
        pickapic(tmp_path / "flat" / f"{name}.parquet", [1.0])
    assert len(examples(tmp_path / "flat")) == 2


# Folders


def paired(folder: Path) -> Path:
    for i, name in enumerate(("a", "b", "sub/c", "d.1")):
        save(folder / "chosen" / f"{name}.png", i)
        save(folder / "rejected" / f"{name}.jpg", i + 50)
    return folder


def test_two_paired_folders(tmp_path: Path) -> None:
    folder = paired(tmp_path / "pairs")
    (folder / "chosen" / "a.txt").write_text("an a\n", encoding="utf-8")
    (folder / "rejected" / "b.txt").write_text("a b", encoding="utf-8")
    (folder / "chosen" / "sub" / "c.txt").write_text("one c", encoding="utf-8")
    (folder / "rejected" / "sub" / "c.txt").write_text("another c", encoding="utf-8")
    (folder / "chosen" / "d.1.txt").write_text("a d", encoding="utf-8")
    rows = examples(folder)
    assert [row.id for row in rows] == ["a", "b", "d.1", "sub/c"]
    assert [row.prompt for row in rows] == ["an a", "a b", "a d", ""]
    assert [c.prompt for c in rows[3].candidates] == ["one c", "another c"]
    assert names(rows[3]) == ["c.png", "c.jpg"]


@pytest.mark.parametrize("table", ["metadata.jsonl", "captions.jsonl", "captions.txt"])
def test_captions_in_one_file(tmp_path: Path, table: str) -> None:
    folder = paired(tmp_path / "pairs")
    said = {"a.png": "an a", "b": "a b", "sub/c.jpg": "a c", "d.1.png": "a d"}
    if table.endswith(".txt"):
        lines = [f"{name}\t{caption}" for name, caption in said.items()]
    else:
        lines = [json.dumps({"file_name": n, "text": c, "split": "test"}) for n, c in said.items()]
    (folder / table).write_text("\n".join(lines) + "\n", encoding="utf-8")
    records = list(read_records(folder))
    assert [r.example and r.example.prompt for r in records] == ["an a", "a b", "a d", "a c"]
    assert {r.split for r in records} == {"" if table.endswith(".txt") else "test"}


def test_a_table_may_caption_the_two_apart(tmp_path: Path) -> None:
    folder = paired(tmp_path / "pairs")
    said = [
        {"file_name": f"{side}/{name}", "caption": f"{side} {name}", "weight": 2}
        for name in ("a", "b", "sub/c", "d.1.png")
        for side in ("chosen", "rejected")
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, said)), encoding="utf-8")
    row = examples(folder)[0]
    assert [c.prompt for c in row.candidates] == ["chosen a", "rejected a"]
    assert row.weight == 2


def test_what_is_wrong_in_a_folder_is_named(tmp_path: Path) -> None:
    folder = paired(tmp_path / "pairs")
    (folder / "rejected" / "a.jpg").unlink()
    save(folder / "chosen" / "b.webp")
    (folder / "chosen" / "sub" / "c.txt").write_bytes(b"\xff\xfe\xfa")
    said = ["nothing", json.dumps({"text": "of no file"}), json.dumps({"file": "x", "text": "y"})]
    (folder / "metadata.jsonl").write_text("\n".join(said), encoding="utf-8")
    found = {r.place.removeprefix(f"{folder}"): problems([r])[0] for r in read_records(folder)}
    assert found[":a"] == "has no image of the same name in rejected/"
    assert found[":b"] == "has more than one image of the same name in chosen/"
    assert found[":d.1"].startswith("has no caption: give NAME.txt")
    assert found[":sub/c"].startswith("has a caption that cannot be read")
    assert found[":x"] == "has a caption, but no image"
    assert found["/metadata.jsonl:1"].startswith("not JSON")
    assert found["/metadata.jsonl:2"] == "names no image; it must have `file_name`"
    assert len(found) == 7
    (folder / "captions.txt").write_text("no tab here", encoding="utf-8")
    with pytest.raises(DataError, match=r"has metadata\.jsonl and captions\.txt; keep one"):
        list(read_records(folder))
    (folder / "metadata.jsonl").unlink()
    assert problems(list(read_records(folder)))[0].startswith("must be the name of an image, a tab")
    save(tmp_path / "half" / "chosen" / "a.png")
    with pytest.raises(DataError, match="has chosen/, but no rejected/ beside it"):
        list(read_records(tmp_path / "half"))
    (tmp_path / "half" / "rejected").mkdir()
    (tmp_path / "half" / "chosen" / "a.png").unlink()
    with pytest.raises(DataError, match="hold no images"):
        list(read_records(tmp_path / "half"))


def test_a_folder_of_single_pictures(tmp_path: Path) -> None:
    for i, name in enumerate(("a", "b", "deep/c")):
        save(tmp_path / "pics" / f"{name}.png", i)
        (tmp_path / "pics" / f"{name}.txt").write_text(f"the {name}", encoding="utf-8")
    rows = examples(tmp_path / "pics")
    assert [(row.id, row.prompt, row.kind) for row in rows] == [
        ("a", "the a", "plain"),
        ("b", "the b", "plain"),
        ("deep/c", "the deep/c", "plain"),
    ]
    said = [{"file_name": f"{name}.png", "desirable": name == "a"} for name in ("a", "b", "deep/c")]
    (tmp_path / "pics" / "metadata.jsonl").write_text(
        "\n".join(map(json.dumps, said)), encoding="utf-8"
    )
    assert [row.labels for row in examples(tmp_path / "pics")] == [(1,), (0,), (0,)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("ending", ["txt", "caption"])
def test_captions_as_windows_and_kohya_write_them(
    tmp_path: Path, encoding: str, ending: str
) -> None:
    """A byte order mark is no part of a caption."""
    save(tmp_path / "pics" / "a.png")
    (tmp_path / "pics" / f"a.{ending}").write_text("a cat\r\n", encoding=encoding)
    assert [row.prompt for row in examples(tmp_path / "pics")] == ["a cat"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_table_of_captions_with_a_mark(tmp_path: Path, encoding: str) -> None:
    save(tmp_path / "pics" / "a.png")
    (tmp_path / "pics" / "captions.txt").write_text("a.png\tan ä\n", encoding=encoding)
    assert [row.prompt for row in examples(tmp_path / "pics")] == ["an ä"]


def test_two_captions_that_differ(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(tmp_path / "pics" / f"{name}.png")
        (tmp_path / "pics" / f"{name}.txt").write_text("a cat", encoding="utf-8")
    (tmp_path / "pics" / "a.caption").write_text("a cat", encoding="utf-8")
    (tmp_path / "pics" / "b.caption").write_text("a dog", encoding="utf-8")
    one, two = read_records(tmp_path / "pics")
    assert one.example is not None
    assert problems([two]) == [
        "has a caption that cannot be read: b.txt and b.caption differ; keep one of them"
    ]


def test_every_format_has_its_endings(tmp_path: Path) -> None:
    """AVIF, and JPEG under the names that Windows and cameras give it."""
    from PIL import features

    kinds = {"jfif": "JPEG", "JPE": "JPEG", "webp": "WEBP"}
    if features.check("avif"):
        kinds["avif"] = "AVIF"
    for side in ("chosen", "rejected"):
        (tmp_path / "pairs" / side).mkdir(parents=True)
        for i, (ending, kind) in enumerate(kinds.items()):
            file = tmp_path / "pairs" / side / f"{i}.{ending}"
            file.write_bytes(encoded(picture(i + 9 * (side == "chosen")), kind))
            file.with_suffix(".txt").write_text("a cat", encoding="utf-8")
    assert len(examples(tmp_path / "pairs")) == len(kinds)
    report = check_files([tmp_path / "pairs"]).text()
    assert f"{2 * len(kinds)} files decoded" in report
    assert "no problems" in report
    convert_file(tmp_path / "pairs", tmp_path / "elsewhere" / "out.jsonl")
    assert len(examples(tmp_path / "elsewhere" / "out.jsonl")) == len(kinds)


def test_what_the_system_leaves_in_folders_is_passed_over(tmp_path: Path) -> None:
    folder = paired(tmp_path / "pairs")
    (folder / "captions.txt").write_text("a\tx\nb\tx\nsub/c\tx\nd.1\tx\n", encoding="utf-8")
    for name in ("._a.png", ".ipynb_checkpoints/a.png", "__MACOSX/._b.png"):
        save(folder / "chosen" / name)
    assert [row.id for row in examples(folder)] == ["a", "b", "d.1", "sub/c"]


def test_pictures_that_are_not_read_and_captions_without_one_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = paired(tmp_path / "pairs")
    (folder / "captions.txt").write_text("a\tx\nb\tx\nsub/c\tx\nd.1\tx\n", encoding="utf-8")
    (folder / "chosen" / "h.heic").write_bytes(b"not read")
    (folder / "chosen" / "a.heic").write_bytes(b"beside one that is")
    (folder / "rejected" / "gone.txt").write_text("a cat", encoding="utf-8")
    found = list(read_records(folder))
    assert problems(found) == ["chosen/h.heic is of a format that is not read: convert it to png"]
    assert sum(record.example is not None for record in found) == 4
    assert "caption files without an image beside them: 1 (rejected/gone.txt)" in caplog.text
