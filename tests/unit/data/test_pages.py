"""Binary tables that unfold to far more than they hold are refused; honest ones pass."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mmalign.data import pages, tables
from mmalign.data import pictures as cells
from mmalign.data.example import Picture
from mmalign.data.files import read_rows
from mmalign.data.pictures import cell_bytes
from mmalign.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

KIB = 2**10
CHAT = [
    [{"role": "user", "content": f"Question {i % 7}?"}, {"role": "bot", "content": "w" * (i % 300)}]
    for i in range(500)
]
HONEST = {
    "prompt": [f"Question {i}?" if i % 5 else None for i in range(500)],
    "chosen": CHAT,
    "ids": [list(range(i % 9)) for i in range(500)],
    "tags": [[["a", "b"], []] if i % 2 else None for i in range(500)],
    "score": [i / 7 for i in range(500)],
    "same": ["one text"] * 500,
}


@pytest.fixture(autouse=True)
def less_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of a MiB, and not 32, may come of any file."""
    for module in (pages, tables):
        monkeypatch.setattr(module, "FREE", 256 * KIB)
    monkeypatch.setattr(pages, "MOST_REPEATED", 256 * KIB)


def plain(table: Any) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items()} for row in table.to_pylist()]


@pytest.mark.runs
@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("codec", ["none", "snappy", "gzip", "zstd", "lz4", "brotli"])
def test_whatever_wrote_the_pages_rows_are_read(tmp_path: Path, codec: str, version: str) -> None:
    table, file = pa.table(HONEST), tmp_path / "a.parquet"
    rest: dict[str, Any] = {"compression": codec, "data_page_version": version}
    for options in (
        {},
        {"data_page_size": 4 * KIB, "row_group_size": 700},
        {"dictionary_pagesize_limit": KIB, "write_page_index": True},
        {"use_dictionary": False, "write_statistics": False, "store_schema": False},
    ):
        pq.write_table(table, file, **rest, **options)
        assert [row.value for row in read_rows(file)] == plain(table)


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("distinct", [1, 2, 5, 200])
def test_what_codes_stand_for_is_summed_up_exactly(
    tmp_path: Path, version: str, distinct: int
) -> None:
    rng = np.random.default_rng(distinct)
    texts = ["x" * int(n) for n in rng.integers(1000, 3000, distinct)]
    codes = np.sort(rng.integers(0, distinct, 5000)) if distinct == 5 else rng.integers(
        0, distinct, 5000
    )  # fmt: skip
    file = tmp_path / "a.parquet"
    table = pa.table({"m": [[texts[code] for code in codes]]})
    pq.write_table(table, file, data_page_version=version)
    expected = sum(len(texts[code]) for code in codes) + 8 * len(codes)
    with pytest.raises(DataError, match=r"a\.parquet: row group 1, column 'm\.list\.element'") as e:
        list(read_rows(file))
    assert f"unfolds to {expected / 2**20:,.1f} MiB" in str(e.value)


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("where", ["a column", "lists", "objects in lists", "a mask of ones"])
def test_a_text_that_all_rows_share_is_read(
    tmp_path: Path, version: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written once, it unfolds a thousandfold, and no row of it is long."""
    monkeypatch.setattr(pages, "MOST_REPEATED", 32 * KIB * KIB)
    count, system = 2000, "You are a helpful assistant. " * 100
    mask = [1] * 500
    shared = {
        "a column": system,
        "lists": ["be brief", system],
        "objects in lists": [
            {"role": "system", "content": system},
            {"role": "user", "content": ""},
        ],
        "a mask of ones": mask,
    }[where]
    prompts = np.random.default_rng(0).bytes(count * 50).hex()
    table = pa.table(
        {
            "shared": [shared] * count,
            "prompt": [prompts[i : i + 100] for i in range(0, len(prompts), 100)],
        }
    )
    file = tmp_path / "a.parquet"
    pq.write_table(table, file, data_page_version=version, compression="zstd")
    monkeypatch.setattr(pages, "MOST_HELD", 128 * KIB)
    assert sum(row.value["shared"] == shared for row in read_rows(file)) == count


def test_a_column_may_be_one_page_that_is_compressed_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As fastparquet writes it; what may come of any file is shared by all columns."""
    monkeypatch.setattr(pages, "MOST_REPEATED", 1024 * KIB)
    file, text = tmp_path / "a.parquet", "w" * 900
    options: dict[str, Any] = {"compression": "zstd", "use_dictionary": False}
    options |= {"data_page_size": 2**30, "write_statistics": False}
    pq.write_table(pa.table({"system": [text] * 1000}), file, **options)
    assert len(list(read_rows(file))) == 1000
    pq.write_table(pa.table({"system": [text] * 1000, "tools": [text] * 1000}), file, **options)
    with pytest.raises(DataError, match=r"row group 1 it unfolds to 1\.7 MiB; at most 1\.0 MiB"):
        list(read_rows(file))


@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_the_longest_row_counts_wherever_its_page_ends(tmp_path: Path, version: str) -> None:
    """One row of many values among short ones, and one that goes on in the next pages."""
    text = "v" * 400
    for rows in ([[text]] * 900 + [[text] * 3000], [[text] * 3000] + [[text]] * 900):
        file = tmp_path / "a.parquet"
        pq.write_table(pa.table({"m": rows}), file, data_page_version=version, data_page_size=64)
        found = 3000 * 400 / 2**20
        with pytest.raises(DataError, match=f"unfolds to {found:.1f} MiB in one row; at most "):
            list(read_rows(file))


def test_columns_of_nothing_beside_a_dictionary_are_no_damage(tmp_path: Path) -> None:
    texts: list[str | None] = [*["x" * 2000, "y" * 3000] * 200, *[None] * 2000]
    file = tmp_path / "a.parquet"
    noise = np.random.default_rng(0).bytes(100_000)
    rows = {"system": texts, "m": [[text] for text in texts]}
    table = pa.table({**rows, "prompt": [noise[20 * i : 20 * i + 20].hex() for i in range(2400)]})
    for version in ("1.0", "2.0"):
        pq.write_table(table, file, data_page_version=version, data_page_size=64)
        assert [row.value["system"] for row in read_rows(file)] == texts


LONG = "y" * (64 * KIB)
FOLDED: dict[str, tuple[Any, dict[str, Any]]] = {
    "a dictionary of one text": ({"prompt": [LONG] * 300}, {}),
    "its pages after honest ones": ({"prompt": [*map(str, range(500)), *[LONG] * 300]}, {}),
    "lists of it": ({"m": [["a"], [LONG] * 300]}, {}),
    "objects in lists": ({"m": [[{"role": "user", "content": LONG}] * 50] * 6}, {}),
    "lists of lists": ({"m": [[["a"] * 400] * 400]}, {}),
    "equal numbers": ({"m": [[0] * 200_000]}, {}),
    "nothing": ({"m": [[None] * 200_000]}, {}),
    "rows of nothing": ({"prompt": [None] * 200_000}, {}),
    "a compressed page": (
        {"prompt": ["z" * (512 * KIB)]}, {"compression": "zstd", "use_dictionary": False}
    ),
    "each text goes on from the last": (
        {"prompt": [f"{LONG}{i}" for i in range(300)]},
        {"use_dictionary": False, "column_encoding": {"prompt": "DELTA_BYTE_ARRAY"}},
    ),
    "lists of such": (
        {"m": [[f"{LONG}{i}" for i in range(300)]]},
        {"use_dictionary": False, "column_encoding": {"m.list.element": "DELTA_BYTE_ARRAY"}},
    ),
    "categories": ({"prompt": pa.array([LONG] * 300).dictionary_encode(), "n": range(300)}, {}),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOLDED)
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_a_table_that_unfolds_far_is_refused(tmp_path: Path, kind: str, version: str) -> None:
    columns, options = FOLDED[kind]
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table(columns), file, data_page_version=version, **options)
    assert file.stat().st_size < 256 * KIB
    with pytest.raises(DataError) as caught:
        list(read_rows(file))
    text = str(caught.value)
    assert text.startswith(f"{file}: ")
    assert "row group 1" in text
    assert "unfolds to" in text
    assert "; at most " in text
    assert "If it is what you want, write it again" in text


PEAK = """
import resource, sys
import pyarrow.parquet
from mmalign.data.files import read_rows
from mmalign.errors import DataError

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

list(read_rows(sys.argv[1]))
before = peak()
try:
    list(read_rows(sys.argv[2]))
except DataError as error:
    print(peak() - before, error)
"""


@pytest.mark.parametrize("kind", ["m", "prompt"])
def test_it_is_refused_before_it_is_unfolded(tmp_path: Path, kind: str) -> None:
    """160 or 640 MiB from some KiB, of which a process that reads them sees little."""
    codes, texts = np.zeros(5000 if kind == "m" else 20_000, np.int32), ["z" * (32 * KIB)]
    column: Any = pa.DictionaryArray.from_arrays(codes, texts)
    if kind == "m":
        column = pa.ListArray.from_arrays([0, len(codes)], column)
    pq.write_table(pa.table({"m": [["a"]], "prompt": ["b"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({kind: column}), tmp_path / "b.parquet", store_schema=False)
    files = [str(tmp_path / name) for name in ("a.parquet", "b.parquet")]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *files], capture_output=True, text=True, check=True
    )
    kib, _, message = done.stdout.partition(" ")
    assert "unfolds to" in message, done
    assert int(kib) < 100 * KIB


def test_a_row_has_no_more_than_a_line_may_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "LONGEST", 64 * KIB)
    file = tmp_path / "a.parquet"
    noise = np.random.default_rng(0).integers(0, 2**31, 20_000).tolist()
    pq.write_table(pa.table({"prompt": ["a", "b", "c"], "ids": [[], [1], noise]}), file)
    with pytest.raises(DataError, match=r"a\.parquet:3: has 160,\d+ bytes, and a record"):
        list(read_rows(file))


def test_maps_count_by_their_own_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "LONGEST", 4 * KIB)
    file, kind = tmp_path / "a.parquet", pa.map_(pa.string(), pa.string())
    maps = pa.array([[(f"key {i}", "v" * 1000)] for i in range(20)], kind)
    pq.write_table(pa.table({"prompt": ["a"] * 20, "about": maps}), file)
    assert len(list(read_rows(file))) == 20
    maps = pa.array([[(f"key {i}", "v" * 1000) for i in range(n)] for n in (1, 5)], kind)
    pq.write_table(pa.table({"prompt": ["a"] * 2, "about": maps}), file)
    with pytest.raises(DataError, match=r"a\.parquet:2: has 5,\d+ bytes"):
        list(read_rows(file))


def pictures(count: int, size: int) -> list[bytes]:
    return [np.random.default_rng(i).bytes(size) for i in range(count)]


def test_pictures_in_a_table_are_read_by_row_groups(tmp_path: Path) -> None:
    """Of honest ones more than may come of any file; those that repeat are told apart."""
    file, images = tmp_path / "a.parquet", pictures(64, 64 * KIB)
    table = pa.table({"image": images, "caption": ["a cat"] * 64})
    pq.write_table(table, file, row_group_size=16)
    rows = list(read_rows(file))
    assert [cell_bytes(row.value["image"]) for row in rows] == images
    twice = pa.table({"image": [image for image in images[:4] for _ in range(16)]})
    pq.write_table(twice, file)
    assert len({cell_bytes(row.value["image"]) for row in read_rows(file)}) == 4


def test_one_picture_in_a_million_cells_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": pictures(1, KIB) * 20_000, "n": [1] * 20_000}), file)
    with pytest.raises(DataError, match=r"row group 1, column 'image' unfolds to 19\.7 MiB;"):
        cell_bytes(Picture(file, 0, "image"))
    cells._PIECES.reset()
    pq.write_table(pa.table({"image": [b"x"] * 300_000}), file)
    with pytest.raises(DataError, match="row group 1 it unfolds to"):
        list(read_rows(file))


def saved(folder: Path, table: Any, codec: str | None, max_rows: int | None = None) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"prompt": ["a"]}).save_to_disk(str(folder))
    (arrow,) = folder.glob("*.arrow")
    options = pa.ipc.IpcWriteOptions(compression=codec)
    with pa.ipc.new_stream(str(arrow), table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=max_rows)
    (folder / "dataset_info.json").write_text("{}")
    return folder


@pytest.mark.parametrize("codec", [None, "lz4", "zstd"])
def test_saved_rows_are_read(tmp_path: Path, codec: str | None) -> None:
    table = pa.table({"prompt": [f"Question {i}?" for i in range(250)], "chosen": CHAT[:250]})
    rows = list(read_rows(saved(tmp_path / "a", table, codec, 100)))
    assert [row.value for row in rows] == plain(table)


EMPTY = pa.ListArray.from_arrays(pa.array([0, 90_000], pa.int32()), pa.nulls(90_000))
BACK = pa.ListArray.from_buffers(
    pa.list_(pa.string()),
    4,
    [None, pa.py_buffer(np.array([0, 3, 0, 3, 0], np.int32))],
    children=[pa.array(["a", "b", "c"])],
)
UNFOLDING: dict[str, tuple[Any, str | None, str]] = {
    "lz4": (["z" * (512 * KIB)], "lz4", r"record batch 1 its compressed parts unfold to 524,"),
    "zstd": (["z" * (512 * KIB)], "zstd", r"record batch 1 its compressed parts unfold to 524,"),
    "rows of nothing": (pa.nulls(90_000), None, "unfolds to"),
    "lists of nothing": (EMPTY, None, "record batch 1 it unfolds to 720,0"),
    "categories": (pa.array([LONG] * 300).dictionary_encode(), None, "record batch 1 it unfolds"),
    "offsets that go back": (BACK, None, "damaged, or no stream of Arrow .*[Oo]ffset"),
}


@pytest.mark.parametrize("kind", UNFOLDING)
def test_saved_rows_that_unfold_far_are_refused(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "MOST_FOLDED", 100)  # LZ4 packs 240 times at most
    column, codec, message = UNFOLDING[kind]
    folder = saved(tmp_path / "a", pa.table({"prompt": column}), codec)
    with pytest.raises(DataError, match=message) as caught:
        list(read_rows(folder))
    assert str(folder / "data-00000-of-00001.arrow") in str(caught.value)


@pytest.mark.slow
def test_two_gigabytes_of_pictures_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard costs a small part of the reading, and nothing is kept of what was read."""
    file = tmp_path / "a.parquet"
    table = pa.table({"image": pictures(20, 2**20), "caption": [f"cat {i}" for i in range(20)]})
    with pq.ParquetWriter(file, table.schema) as writer:
        for _ in range(100):
            writer.write_table(table, row_group_size=20)

    def seconds() -> float:
        begin = time.perf_counter()
        rows = list(read_rows(file))
        assert len(rows) == 2000
        assert sum(len(cell_bytes(row.value["image"])) for row in rows) == 2000 * 2**20
        return time.perf_counter() - begin

    guarded = seconds()
    monkeypatch.setattr(pages.Pages, "require_whole", lambda *_: None)
    cells._PIECES.reset()
    assert guarded < 2.5 * seconds() + 1, "less than decoding them takes"
