"""The tensor cache: finds what was put, and never anything else."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from mmalign.data.cache import TensorCache, content_of
from mmalign.data.example import Candidate, Clip, Example, Media, Message, Template
from mmalign.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

SETTINGS = {"model": "m1", "encoding": "e1", "dtype": "float32", "needs": "reference"}
EXAMPLE = Example("a", "Why?", (Candidate("Yes."), Candidate("No.")), (1.0, 0.0))


def arrays(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "ref_logps": rng.normal(size=(2, 5)).astype(np.float32),
        "bits": rng.integers(-99, 99, size=(2, 5, 3)).astype(np.int16),
        "mask": rng.random((2, 5)) > 0.5,
        "empty": np.zeros((0, 4), np.float64),
    }


def filled(folder: Path, num: int = 6, **options: int) -> tuple[TensorCache, list[str]]:
    with TensorCache(folder, SETTINGS, **options) as cache:
        keys = [cache.key(i) for i in range(num)]
        for i, key in enumerate(keys):
            cache.put(key, arrays(i))
    return cache, keys


def check(found: dict[str, np.ndarray] | None, seed: int) -> None:
    assert found is not None
    expected = arrays(seed)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()
        assert found[name].flags.writeable


def test_what_was_put_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    _, keys = filled(tmp_path)
    cache = TensorCache(tmp_path, SETTINGS)
    for i in (3, 0, 5, 3):
        check(cache.get(keys[i]), i)
    assert (len(cache), cache.hits, cache.misses, cache.corrupt) == (6, 4, 0, 0)


def test_entries_can_be_read_before_they_are_written(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path / "new", SETTINGS)
    key = cache.key("x")
    cache.put(key, arrays(1))
    check(cache.get(key), 1)
    assert not (tmp_path / "new").exists()


def test_shards_are_cut_by_size(tmp_path: Path) -> None:
    size = sum(array.nbytes for array in arrays(0).values())
    _, keys = filled(tmp_path, num=6, shard_bytes=2 * size)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    cache = TensorCache(tmp_path, SETTINGS)
    for i, key in enumerate(keys):
        check(cache.get(key), i)


@pytest.mark.parametrize("name", SETTINGS)
def test_any_other_setting_is_a_miss(name: str, tmp_path: Path) -> None:
    filled(tmp_path)
    other = TensorCache(tmp_path, {**SETTINGS, name: "changed"})
    assert other.get(other.key(0)) is None
    assert (other.hits, other.misses) == (0, 1)


def test_key_follows_all_that_a_model_sees_and_nothing_else(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path, SETTINGS)
    first, second = EXAMPLE.candidates
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"one")

    def key(example: Example) -> str:
        return cache.key(content_of(example))

    same = replace(EXAMPLE, id="b", labels=(0.3, 0.7), weight=2.0, meta={"x": 1})
    assert key(same) == key(EXAMPLE)
    seen = [
        EXAMPLE,
        replace(EXAMPLE, prompt="Why"),
        replace(EXAMPLE, prompt=(Message("user", "Why?"),)),
        replace(EXAMPLE, prompt=(Message("system", "Why?"),)),
        replace(EXAMPLE, candidates=(second, first)),
        replace(EXAMPLE, candidates=(replace(first, complete=False), second)),
        replace(EXAMPLE, candidates=(replace(first, prompt="Who?"), second)),
        replace(EXAMPLE, candidates=(replace(first, spans=((0, 2),)), second)),
        replace(EXAMPLE, media=Media((Clip(clip),))),
        replace(EXAMPLE, template=Template(tools="[{}]")),
        replace(EXAMPLE, template=Template(options='{"enable_thinking": false}')),
    ]
    assert len({key(example) for example in seen}) == len(seen)
    before = key(replace(EXAMPLE, media=Media((Clip(clip),))))
    clip.write_bytes(b"longer")
    assert key(replace(EXAMPLE, media=Media((Clip(clip),)))) != before


def test_killed_run_is_gone_on_with(tmp_path: Path) -> None:
    """Only whole shards are found; what was not written yet is missing, and no more."""
    size = sum(array.nbytes for array in arrays(0).values())
    cache = TensorCache(tmp_path, SETTINGS, shard_bytes=2 * size)
    keys = [cache.key(i) for i in range(5)]
    for i in range(3):
        cache.put(keys[i], arrays(i))  # the third is not flushed: killed here
    (tmp_path / ".half.123.part").write_bytes(b"half a shard")
    again = TensorCache(tmp_path, SETTINGS)
    assert again.missing(keys + keys) == keys[2:]
    assert again.corrupt == 0
    with again:
        for i in range(2, 5):
            again.put(keys[i], arrays(i))
    last = TensorCache(tmp_path, SETTINGS)
    assert last.missing(keys) == []
    for i, key in enumerate(keys):
        check(last.get(key), i)


def test_interrupted_work_keeps_what_was_done(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path, SETTINGS)
    key = cache.key(0)

    def work() -> None:
        with cache:
            cache.put(key, arrays(0))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    check(TensorCache(tmp_path, SETTINGS).get(key), 0)


@pytest.mark.parametrize("cut", [0, 5, 100, -1])
def test_shard_cut_short_is_a_counted_miss(
    cut: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, keys = filled(tmp_path)
    (shard,) = tmp_path.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:cut])
    with caplog.at_level(logging.WARNING):
        cache = TensorCache(tmp_path, SETTINGS)
    assert cache.get(keys[0]) is None
    assert (cache.misses, cache.corrupt) == (1, 1)
    assert "cannot be used" in caplog.text
    assert cache.missing(keys) == keys


def test_foreign_file_is_a_counted_miss(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"w": np.zeros(3)}, tmp_path / "model.safetensors")
    cache = TensorCache(tmp_path, SETTINGS)
    assert (len(cache), cache.corrupt) == (0, 1)


def test_flipped_bit_is_a_counted_miss_and_can_be_written_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, keys = filled(tmp_path)
    (shard,) = tmp_path.glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    value = arrays(2)["ref_logps"].tobytes()
    data[bytes(data).index(value) + 3] ^= 1
    shard.write_bytes(data)
    cache = TensorCache(tmp_path, SETTINGS)
    assert cache.get(keys[2]) is None
    assert cache.corrupt == 1
    assert "checksum" in caplog.text
    check(cache.get(keys[1]), 1)
    assert cache.missing(keys) == [keys[2]]
    with cache:
        cache.put(keys[2], arrays(2))
    check(TensorCache(tmp_path, SETTINGS).get(keys[2]), 2)


def test_damage_is_found_by_reading_and_repaired_without_losing_the_rest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, keys = filled(tmp_path)
    foreign = tmp_path / "model.safetensors"
    foreign.write_bytes(b"not ours")
    (shard,) = set(tmp_path.glob("*.safetensors")) - {foreign}
    data = bytearray(shard.read_bytes())
    for damaged in (1, 4):
        data[bytes(data).index(arrays(damaged)["ref_logps"].tobytes()) + 3] ^= 1
    shard.write_bytes(data)
    with TensorCache(tmp_path, SETTINGS) as cache:
        assert cache.missing(keys) == []
        assert cache.missing(keys, read=True) == [keys[1], keys[4]]
        assert caplog.text.count(shard.name) == 1, "one line a file"
        assert cache.repair() == 1
        assert not shard.exists()
        assert foreign.exists()
        for damaged in (1, 4):
            cache.put(keys[damaged], arrays(damaged))
    caplog.clear()
    again = TensorCache(tmp_path, SETTINGS)
    assert again.missing(keys, read=True) == []
    for i, key in enumerate(keys):
        check(again.get(key), i)
    assert "checksum" not in caplog.text
    assert again.repair() == 0


def test_shard_that_vanished_is_a_counted_miss(tmp_path: Path) -> None:
    cache, keys = filled(tmp_path)
    next(tmp_path.glob("*.safetensors")).unlink()
    assert cache.get(keys[0]) is None
    assert (cache.misses, cache.corrupt) == (1, 1)


def test_temporary_files_are_renamed_and_nothing_else_is_left(tmp_path: Path) -> None:
    filled(tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]
    assert os.stat(next(tmp_path.iterdir())).st_size > 0


def test_shards_are_ordinary_safetensors(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    _, keys = filled(tmp_path, num=1)
    tensors = load_file(next(tmp_path.glob("*.safetensors")))
    np.testing.assert_array_equal(tensors[f"{keys[0]}/ref_logps"], arrays(0)["ref_logps"])


def test_cache_travels_to_loader_workers(tmp_path: Path) -> None:
    cache, keys = filled(tmp_path)
    check(pickle.loads(pickle.dumps(cache)).get(keys[4]), 4)


def test_old_entries_are_written_without_waiting_for_a_full_shard(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path, SETTINGS, seconds=0.05)
    cache.put(cache.key(0), arrays(0))
    assert not list(tmp_path.glob("*.safetensors"))
    time.sleep(0.06)
    cache.put(cache.key(1), arrays(1))
    assert len(TensorCache(tmp_path, SETTINGS)) == 2


def test_few_files_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmalign.data.opening.MOST", 2)
    _, keys = filled(tmp_path, num=6, shard_bytes=1)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    cache = TensorCache(tmp_path, SETTINGS)
    for i in (0, 1, 2, 3, 4, 5, 0, 3):
        check(cache.get(keys[i]), i)
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) <= before + 2
        cache.close()
        assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.runs
def test_loader_workers_read_what_the_parent_has_open(tmp_path: Path) -> None:
    _, keys = filled(tmp_path, num=4, shard_bytes=1)
    cache = TensorCache(tmp_path, SETTINGS)
    check(cache.get(keys[0]), 0)
    for method in ("fork", "spawn"):
        if method not in multiprocessing.get_all_start_methods():
            continue
        with ProcessPoolExecutor(2, multiprocessing.get_context(method)) as pool:
            found = list(pool.map(cache.get, keys * 3))
        for i, arrays_found in enumerate(found):
            check(arrays_found, i % 4)


def test_a_shard_written_anew_over_a_damaged_one_is_read(tmp_path: Path) -> None:
    """The same entries give the same file name, and the old file may still be open."""
    cache, keys = filled(tmp_path, num=1)
    (shard,) = tmp_path.glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(bytes(data))
    assert cache.get(keys[0]) is None
    with cache:
        cache.put(keys[0], arrays(0))
    check(cache.get(keys[0]), 0)
    check(TensorCache(tmp_path, SETTINGS).get(keys[0]), 0)


def test_a_disk_that_refuses_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    cache = TensorCache(tmp_path, SETTINGS)
    cache.put(cache.key(0), arrays(0))
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DataError, match="No space left"):
        cache.flush()
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    cache.flush()
    check(TensorCache(tmp_path, SETTINGS).get(cache.key(0)), 0)
