"""What runs, `data check` and `data convert` make of image records."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from data_rows import ANY, LIST, PAIR, UNPAIRED, Needs, Write
from picture_files import AB, encoded, examples, names, pickapic, picture, save

from mmalign.config import DataConfig
from mmalign.data import Example, Picture, check_files, convert_file, load_examples, parse_record
from mmalign.data.cache import TensorCache, content_of
from mmalign.data.parse import read_record
from mmalign.data.pictures import PictureRoot
from mmalign.data.select import fit
from mmalign.errors import DataError


def rows_of(pics: Path, *records: dict[str, Any]) -> list[Example]:
    root = PictureRoot(pics)
    return [parse_record(r, where=f"row{i}", root=root) for i, r in enumerate(records)]


def test_ties_stay_ties(pics: Path, caplog: pytest.LogCaptureFixture) -> None:
    tie, won = rows_of(pics, AB | {"tie": True}, AB)
    assert tie.is_tie
    assert [row.id for row in fit([tie, won], PAIR)] == ["row1"]
    assert "1 of 2 rows are ties" in caplog.text
    assert [row.labels for row in fit([tie, won], PAIR, ties="soft")] == [(0.5, 0.5), (1, 0)]
    half = fit([tie, won], PAIR, ties="half")
    assert [(names(row), row.labels, row.weight) for row in half] == [
        (["a.png", "b.png"], (1, 0), 0.5),
        (["b.png", "a.png"], (1, 0), 0.5),
        (["a.png", "b.png"], (1, 0), 1),
    ]


def test_pictures_take_every_shape_that_texts_do(pics: Path) -> None:
    ranked = {"prompt": "p", "images": ["a.png", "b.png", "c.png"], "scores": [2, 1, 3]}
    row, pair = rows_of(pics, ranked, AB)
    assert [names(new) for new in fit([row], PAIR)] == [["c.png", "b.png"]]
    assert len(fit([row], PAIR, list_pairs="all")) == 3
    assert [names(new) for new in fit([row], LIST)] == [["a.png", "b.png", "c.png"]]
    assert [names(new) for new in fit([pair], PAIR, swap=True)] == [["b.png", "a.png"]]
    assert [(names(new), new.labels) for new in fit([pair], UNPAIRED)] == [
        (["a.png"], (1,)),
        (["b.png"], (0,)),
    ]
    assert [names(new) for new in fit([pair], ANY)] == [["a.png"]]
    alone, _ = read_record({"prompt": "p"}, where="here", alone=True)
    assert alone is not None
    assert fit([alone], Needs("any", 1)) == [alone]
    with pytest.raises(DataError, match="this one has a single response"):
        fit([alone], PAIR)


def test_own_captions_are_held_out_and_compared_too(
    pics: Path, write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    records = [
        {"id": str(i), "prompt_chosen": f"x{i % 50}", "prompt_rejected": "y"}
        | {"image_chosen": "a.png", "image_rejected": "b.png"}
        for i in range(100)
    ]
    config = DataConfig.model_validate({"train": write("a.jsonl", records), "eval_fraction": 0.3})
    train, held_out = load_examples(config, PAIR, seed=0)
    assert 10 <= len(held_out) <= 60
    assert not {r.candidates[0].prompt for r in train} & {r.candidates[0].prompt for r in held_out}
    assert "that is also trained on" not in caplog.text


def test_the_content_of_a_picture_is_its_file_and_place(tmp_path: Path, pics: Path) -> None:
    cache = TensorCache(tmp_path / "cache", {"model": "m"})

    def key(*responses: Picture) -> str:
        (row,) = rows_of(pics, AB)
        old = row.candidates
        new = [type(old[0])(response, prompt=None) for response in responses]
        return cache.key(content_of(Example("x", "p", tuple(new), (1.0, 0.0))))

    table = pickapic(tmp_path / "a.parquet", [1.0, 0.0])
    a, b = Picture(pics / "a.png"), Picture(pics / "b.png")
    cells = [Picture(table, row, column) for row in (0, 1) for column in ("jpg_0", "jpg_1")]
    keys = [key(a, b), key(b, a), *(key(a, cell) for cell in cells)]
    assert len(set(keys)) == len(keys)
    save(a.path, 77, width=40)
    assert key(a, b) != keys[0]
    assert key(a, cells[0]) != keys[2]


# Check and convert


def test_check_names_pictures_that_cannot_be_used(pics: Path, write: Write) -> None:
    (pics / "cut.png").write_bytes(encoded(picture(0))[:80])
    save(pics / "wide.png", 3, width=60)
    path = write(
        "a.jsonl",
        [
            AB | {"id": "1"},
            {"id": "2", "prompt": "q", "image_chosen": "cut.png", "image_rejected": "b.png"},
            {"id": "3", "prompt": "r", "image_chosen": "wide.png", "image_rejected": "c.png"},
            {"id": "4", "prompt": "s", "image_chosen": "gone.png", "image_rejected": "c.png"},
        ],
    )
    report = check_files([path])
    assert report.exit_code == 1
    lines = report.problems.lines()
    assert lines[0].startswith(f"{path}:4 (id '4'): image_chosen must name an image file")
    assert lines[1].startswith(f"{path}:2 (id '2'): an image must be decodable, but {pics}/cut.png")
    assert report.warnings.lines() == [
        "rows whose images differ in aspect ratio by more than 2 to 1: not trained on: "
        f"1 of 3 rows; the first is {path}:3 (id '3'): 60 x 24 and 24 x 24"
    ]
    text = report.text()
    assert "images   6 in 3 records; 4 files decoded" in text
    assert [line.split() for line in text.splitlines() if line.startswith("  chosen")] == [
        ["chosen", "24", "42", "60", "24", "24", "24", "1.00", "1.75", "2.50"]
    ]


def test_check_names_pictures_that_teach_other_than_they_seem(tmp_path: Path) -> None:
    """Small beside the others, mostly cut away, or one image twice, in whatever format."""
    folder = tmp_path / "pairs"
    sizes = {"fine": (24, 24), "tiny": (2, 3), "long": (24, 60), "twice": (24, 24)}
    for name, (height, width) in sizes.items():
        for i, side in enumerate(("chosen", "rejected")):
            save(folder / side / f"{name}.png", i, height=height, width=width)
    save(folder / "chosen" / "twice.png", 5).rename(folder / "chosen" / "twice.bmp")
    picture(5).save(folder / "rejected" / "twice.png")
    picture(5).save(folder / "chosen" / "twice.bmp")
    said = "".join(f"{name}\ta cat\n" for name in sizes)
    (folder / "captions.txt").write_text(said, encoding="utf-8")
    lines = check_files([folder]).warnings.lines()
    assert [line.partition(": ")[0] for line in lines] == [
        "rows that show one image twice, pixel by pixel",
        "rows with images that a square crop cuts by more than half",
        "rows with images that would be enlarged more than 2 times",
    ]
    assert all(f": 1 of 4 rows; the first is {folder}:" in line for line in lines)
    assert "long" in lines[1]
    assert "60 x 24; diffusion.buckets keeps more" in lines[1]
    assert "3 x 2, where most have 24 a side" in lines[2]
    assert len(check_files([folder], sizes=False).warnings.lines()) == 1


def test_convert_names_pictures_from_the_new_file(pics: Path, write: Write) -> None:
    path = write("a.jsonl", [{"caption": "p", "win": "a.png", "lose": "b.png", "label_x": 1}])
    assert convert_file(path, pics / "b.jsonl") == (1, 0)
    assert json.loads((pics / "b.jsonl").read_text()) == AB | {"label_x": 1}
    # From another folder the images are copied: a data file may not point outside of its own.
    out = pics / "new" / "c.jsonl"
    assert convert_file(path, out) == (1, 0)
    copied = json.loads(out.read_text())
    assert copied["image_chosen"] == "c_pictures/a.png"
    assert (out.parent / "c_pictures/a.png").read_bytes() == (pics / "a.png").read_bytes()
    assert names(examples(out)[0]) == ["a.png", "b.png"]


def test_convert_exports_cells_as_they_are(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    file = pickapic(tmp_path / "a.parquet", [1.0, 0.0, 0.5], has_label=[True, True, False])
    out = tmp_path / "out" / "b.jsonl"
    with pytest.raises(DataError, match="has_label is false"):
        convert_file(file, out)
    assert list(out.parent.iterdir()) == []
    assert convert_file(file, out, drop_bad=True) == (2, 1)
    cells = pq.read_table(file).to_pylist()
    rows = examples(out)
    assert [
        c.response.path.name for c in rows[1].candidates if isinstance(c.response, Picture)
    ] == [
        "000001-jpg_1.jpg",
        "000001-jpg_0.jpg",
    ]
    for row, cell, order in zip(rows, cells, ("01", "10"), strict=False):
        for candidate, i in zip(row.candidates, order, strict=True):
            assert isinstance(candidate.response, Picture)
            assert candidate.response.path.read_bytes() == cell[f"jpg_{i}"]


def test_convert_keeps_kinds_labels_and_captions(tmp_path: Path, pics: Path, write: Write) -> None:
    records: list[dict[str, Any]] = [
        AB | {"id": "1", "p_chosen": 0.7, "split": "test"},
        {"id": "2", "prompt": "p", "images": ["a.png", "b.png"], "scores": [1, 2]},
        {"id": "3", "prompt": "p", "image": "c.png", "desirable": False},
        {"id": "4", "prompt_chosen": "x", "prompt_rejected": "y"}
        | {"image_chosen": "a.png", "image_rejected": "a.png"},
    ]
    path = write("a.jsonl", records)
    assert convert_file(path, tmp_path / "b.jsonl") == (4, 0)
    assert examples(tmp_path / "b.jsonl") == examples(path)
    prompts = write("p.jsonl", [{"caption": "a cat"}])
    assert convert_file(prompts, tmp_path / "c.jsonl", layout="prompts") == (1, 0)
    assert json.loads((tmp_path / "c.jsonl").read_text()) == {"prompt": "a cat"}


def test_nothing_is_logged_of_good_rows(pics: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        fit(rows_of(pics, AB), PAIR)
    assert caplog.text == ""
