"""Every kind of source gives the same rows; what cannot be read is said, with its place."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from mmalign.data import files
from mmalign.data.example import Row
from mmalign.data.files import read_rows
from mmalign.data.records import read_records
from mmalign.errors import DataError

RECORDS: list[dict[str, Any]] = [
    {"prompt": "Größe? 日本", "chosen": 'say "5",\nplease', "rejected": "7", "p_chosen": 0.75},
    {"prompt": "Q", "chosen": "\u2028 line", "rejected": "🙂", "p_chosen": 1.0},
]


def values(path: Path | str, **options: Any) -> list[dict[str, Any] | None]:
    rows = list(read_rows(path, **options))
    assert not any(row.problem for row in rows)
    return [row.value for row in rows]


def jsonl(path: Path, text: str | bytes) -> list[Row]:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return list(read_rows(path))


def test_jsonl(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps(r, ensure_ascii=False) for r in RECORDS)
    path = tmp_path / "a.jsonl"
    for text in (lines, lines + "\n", "\ufeff" + lines, lines.replace("\n", "\r\n \r\n") + "\r\n"):
        assert [row.value for row in jsonl(path, text)] == RECORDS
    assert [row.place for row in jsonl(path, "\n" + lines)] == [f"{path}:2", f"{path}:3"]


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for content in (RECORDS, {"version": 1, "data": RECORDS}):
        path.write_text(json.dumps(content, indent=1), encoding="utf-8-sig")
        assert values(path) == RECORDS
    path.write_text("[1]")
    assert "must be a JSON object, but is 1" in next(read_rows(path)).problem
    for content in ("{}", '{"rows": []}', "3", '{"a"', "[NaN]"):
        path.write_text(content)
        with pytest.raises(DataError, match=r"a\.json: "):
            list(read_rows(path))


def test_json_lines_of_one_column(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"messages": [{"a": 1}]}\n{"messages": [{"a": 2}]}\n')
    assert values(path) == [{"messages": [{"a": 1}]}, {"messages": [{"a": 2}]}]
    alone = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
    path.write_text(json.dumps(alone))
    assert values(path) == [alone]


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.tsv", "\t")])
def test_csv(tmp_path: Path, name: str, delimiter: str) -> None:
    path = tmp_path / name
    with path.open("w", encoding="utf-8-sig", newline="") as handle:
        writer = csv.DictWriter(handle, list(RECORDS[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(RECORDS)
    assert values(path) == RECORDS
    assert [row.place for row in read_rows(path)] == [f"{path}:3", f"{path}:4"]


def test_csv_cells(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    message = '[{"role": "user", "content": "Q"}]'
    quoted = message.replace('"', '""')
    path.write_text(f'prompt,completion,label,weight\n"{quoted}",12,True,\nQ,null,0,0.5\n')
    assert values(path) == [
        {"prompt": message, "completion": "12", "label": True, "weight": None},
        {"prompt": "Q", "completion": "null", "label": 0, "weight": 0.5},
    ]
    path.write_text("prompt,response\nQ,a,b\nQ\n")
    assert [row.problem for row in read_rows(path)] == [
        "has more cells than the header has names",
        "has fewer cells than the header has names",
    ]
    path.write_bytes(b"prompt,response\n\xff,a\n")
    with pytest.raises(DataError, match="not UTF-8"):
        list(read_rows(path))


def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pa.Table.from_pylist(RECORDS), path)
    assert values(path) == RECORDS
    assert [row.place for row in read_rows(path)] == [f"{path}:1", f"{path}:2"]
    path.write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        list(read_rows(path))


def test_gzip(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(json.dumps(r) for r in RECORDS).encode()))
    assert values(path) == RECORDS
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(DataError, match="cannot be read"):
        list(read_rows(path))


def test_saved_dataset(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list(RECORDS)
    one.save_to_disk(str(tmp_path / "one"))
    assert values(tmp_path / "one") == RECORDS
    both = datasets.DatasetDict({"train": one, "test": one.select([0]), "sft": one})
    both.save_to_disk(str(tmp_path / "both"))
    assert [row["split"] for row in values(tmp_path / "both") if row] == ["train", "train", "test"]
    assert len(values(tmp_path / "both", split="sft")) == 2
    with pytest.raises(DataError, match=r"no split 'nope'; set `split` to one of \['sft', 'test'"):
        list(read_rows(tmp_path / "both", split="nope"))
    with pytest.raises(DataError, match="a folder must be one of datasets"):
        list(read_rows(tmp_path))


def test_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list(RECORDS)

    def load(path: str, name: str | None, split: str | None) -> Any:
        assert (path, name) == ("owner/data", "small")
        return one if split else datasets.DatasetDict({"train": one})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(values("owner/data", name="small")) == 2
    records = list(read_records("owner/data", name="small", split="train[:2]"))
    assert [r.place for r in records] == ["owner/data/train[:2]:1", "owner/data/train[:2]:2"]
    assert [r.split for r in records] == ["train[:2]"] * 2


def test_a_hub_name_that_cannot_be_loaded() -> None:
    pytest.importorskip("datasets")
    with pytest.raises(DataError, match=r"owner/nothing: neither a file or folder here nor a hub"):
        read_rows("owner/nothing")


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").touch()
    with pytest.raises(DataError, match=r"there is no such file. Did you mean .*/pairs\.jsonl\?"):
        read_rows(tmp_path / "pair.jsonl")
    with pytest.raises(DataError, match="and no folder"):
        read_rows(tmp_path / "nowhere" / "pair.jsonl")


def test_an_unknown_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").touch()
    with pytest.raises(DataError, match=r"ends in \.xlsx; it must end in one of \.jsonl"):
        read_rows(tmp_path / "a.xlsx")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"a": 1', "not JSON"),
        (b"[1]", "a record must be a JSON object, but is [1]"),
        (b'{"a": NaN}', "NaN is not a number"),
        (b'{"a": -Infinity}', "-Infinity is not a number"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not JSON"),
    ],
    ids=["cut", "array", "nan", "infinity", "latin-1", "deep", "digits"],
)
def test_a_bad_line_is_a_problem_of_that_line_only(
    tmp_path: Path, line: bytes, problem: str
) -> None:
    rows = jsonl(tmp_path / "a.jsonl", b'{"a": 1}\n' + line + b'\n{"a": 2}\n')
    assert [row.value for row in rows] == [{"a": 1}, None, {"a": 2}]
    assert problem in rows[1].problem


def test_a_truncated_last_line_is_called_that(tmp_path: Path) -> None:
    rows = jsonl(tmp_path / "a.jsonl", '{"a": 1}\n{"a": ')
    assert "the last line is cut off" in rows[1].problem


def test_an_endless_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LONGEST_LINE", 64)
    with pytest.raises(DataError, match=r"a\.jsonl:2: the line is longer than"):
        jsonl(tmp_path / "a.jsonl", '{"a": 1}\n' + "x" * 65)


def test_rows_of_splits_that_are_not_wanted_need_not_be_read(tmp_path: Path) -> None:
    said = 'it says "split": "eval" here'
    lines = [
        {"split": "train", "prompt": said},
        {"split": "eval", "prompt": "one"},
        {"prompt": said},
        {"meta": {"split": "train"}, "split": "eval", "prompt": "two"},
        {"meta": {"split": "eval"}, "split": "train", "prompt": "three"},
    ]
    path = tmp_path / "a.jsonl"
    text = "".join(json.dumps(line) + "\n" for line in lines)
    path.write_text(text + '{"split" : "train", no JSON\n')
    read = list(read_rows(path, wanted=lambda split: split == "eval"))
    # A line that names both, or none, is left to the caller.
    assert [row.place.rpartition(":")[2] for row in read] == ["2", "3", "4", "5"]
    assert len(list(read_rows(path, wanted=lambda split: True))) == 6


def test_numbers_of_responses_in_csv(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(
        "chosen_score,rejected-rating,label_chosen,score_A,rank_0,score\n1,2.5,0.5,3,4,5\n"
    )
    (row,) = values(path)
    assert list(row.values()) == [1, 2.5, 0.5, 3, 4, "5"]
