"""What a stage was made of is written down, and what has changed since is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmalign.errors import DataError
from mmalign.rounds.ledger import FILE, Ledger, digest, seed_of

SETTINGS = {"generate": {"num": 4, "temperature": 1.0}}


def made(folder: Path) -> Ledger:
    (folder / "prompts.jsonl").write_text("{}\n")
    (folder / "candidates.jsonl").write_text("[]\n")
    ledger = Ledger(folder)
    ledger.note("candidates.jsonl", inputs(folder), SETTINGS, seconds=1.0)
    return ledger


def inputs(folder: Path) -> dict[str, Path | str]:
    return {"prompts.jsonl": folder / "prompts.jsonl", "model": "some/name"}


def test_a_stage_is_done_when_its_file_is_there(tmp_path: Path) -> None:
    made(tmp_path)
    assert Ledger(tmp_path).is_done("candidates.jsonl", inputs(tmp_path), SETTINGS)
    (tmp_path / "candidates.jsonl").unlink()
    assert not Ledger(tmp_path).is_done("candidates.jsonl", inputs(tmp_path), SETTINGS)


def test_what_it_was_made_of_is_written_down(tmp_path: Path) -> None:
    made(tmp_path)
    told = json.loads((tmp_path / FILE).read_text())["stages"]["candidates.jsonl"]
    assert told["sha256"] == digest(tmp_path / "candidates.jsonl")
    assert told["inputs"] == {
        "prompts.jsonl": digest(tmp_path / "prompts.jsonl"), "model": "some/name"
    }  # fmt: skip
    assert told["settings"] == SETTINGS
    assert "torch" in told["versions"]


def test_a_file_made_elsewhere_is_taken_and_noted(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("{}\n")
    (tmp_path / "candidates.jsonl").write_text("by hand\n")
    ledger = Ledger(tmp_path)
    assert ledger.is_done("candidates.jsonl", inputs(tmp_path), SETTINGS)
    told = json.loads((tmp_path / FILE).read_text())["stages"]["candidates.jsonl"]
    assert told["sha256"] == digest(tmp_path / "candidates.jsonl")


def test_other_inputs_are_refused(tmp_path: Path) -> None:
    made(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(DataError, match=r"candidates.jsonl: was made of another prompts.jsonl "):
        Ledger(tmp_path).is_done("candidates.jsonl", inputs(tmp_path), SETTINGS)


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    made(tmp_path)
    other = {"generate": {"num": 4, "temperature": 0.7}}
    with pytest.raises(DataError, match=r"generate.temperature 1.0, and it is 0.7 now; put that"):
        Ledger(tmp_path).is_done("candidates.jsonl", inputs(tmp_path), other)


def test_a_result_in_anothers_place_is_refused_where_something_was_made_of_it(
    tmp_path: Path,
) -> None:
    ledger = made(tmp_path)
    (tmp_path / "judged.jsonl").write_text("judged\n")
    of: dict[str, Path | str] = {"candidates.jsonl": tmp_path / "candidates.jsonl"}
    ledger.note("judged.jsonl", of, {})
    (tmp_path / "candidates.jsonl").write_text("[1]\n")
    ledger = Ledger(tmp_path)
    assert ledger.is_done("candidates.jsonl", inputs(tmp_path), SETTINGS)  # it may be exchanged
    with pytest.raises(DataError, match=r"judged.jsonl: was made of another candidates.jsonl"):
        ledger.is_done("judged.jsonl", of, {})


def test_a_damaged_ledger_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("{")
    with pytest.raises(DataError, match=r"done.json: is damaged; delete it"):
        Ledger(tmp_path)


def test_weights_count_by_name_and_content(tmp_path: Path) -> None:
    for name, data in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(data)
        (tmp_path / name / "README.md").write_text(name)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")
    (tmp_path / "link").symlink_to("a")
    assert digest(tmp_path / "link") == digest(tmp_path / "a")


def test_seeds_follow_from_what_they_are_for() -> None:
    assert seed_of(0, "draw", 1) == seed_of(0, "draw", 1)
    seeds = {seed_of(run, "draw", number) for run in range(20) for number in range(20)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**31 for seed in seeds)
