"""Prompts are held out by their hash, and rounds draw for others until all had their turn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmalign.config import DataConfig, JudgeSpec, RoundsConfig
from mmalign.errors import ConfigError, DataError
from mmalign.rounds.asked import Question
from mmalign.rounds.prompts import choose, per_round, read_prompts, write_prompts


def rows(path: Path, *values: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return str(path)


def data(path: str, **settings: Any) -> DataConfig:
    return DataConfig.model_validate({"train": path, "eval_fraction": 0.25, **settings})


def spec(**settings: Any) -> RoundsConfig:
    return RoundsConfig.model_validate({"judge": [JudgeSpec(rule="a:b")], **settings})


def questions(folder: Path, count: int) -> list[Question]:
    path = rows(folder / "p.jsonl", *({"id": f"q{i}", "prompt": f"Say {i}."} for i in range(count)))
    return read_prompts(data(path)).train


def test_a_row_keeps_what_judges_read_and_nothing_of_responses(tmp_path: Path) -> None:
    value = {
        "prompt": "What is 2 + 3?", "answer": "5", "level": 3, "chosen": "5", "rejected": "6",
        "score_chosen": 1.0, "p_chosen": 0.9, "split": "train",
    }  # fmt: skip
    path = rows(tmp_path / "p.jsonl", value, {"prompt": "Another?", "split": "test"})
    found = read_prompts(data(path, eval_fraction=0.0))
    assert [q.record for q in found.held_out] == [{"prompt": "Another?"}]
    write_prompts(found.train, tmp_path / "out.jsonl")
    line = json.loads((tmp_path / "out.jsonl").read_text())
    assert line.pop("id") == found.train[0].id
    assert line == {"prompt": "What is 2 + 3?", "answer": "5", "level": 3}


def test_no_prompt_is_on_both_sides(tmp_path: Path) -> None:
    asked = [{"prompt": f"Say {i}."} for i in range(40)]
    found = read_prompts(data(rows(tmp_path / "p.jsonl", *asked, *asked)))
    sides = [{q.record["prompt"] for q in part} for part in (found.train, found.held_out)]
    assert not sides[0] & sides[1]
    assert len(found.train) + len(found.held_out) == 40
    assert 4 <= len(found.held_out) <= 16


def test_ids_do_not_follow_from_places(tmp_path: Path) -> None:
    asked = [{"prompt": f"Say {i}."} for i in range(8)]
    one = read_prompts(data(rows(tmp_path / "a.jsonl", *asked)))
    two = read_prompts(data(rows(tmp_path / "b.jsonl", *reversed(asked))))
    assert {q.id for q in one.train} == {q.id for q in two.train}


def test_prompts_of_eval_are_not_drawn_for(tmp_path: Path) -> None:
    train = rows(tmp_path / "a.jsonl", *({"prompt": f"Say {i}."} for i in range(4)))
    held = rows(tmp_path / "b.jsonl", {"prompt": "Say 2."})
    found = read_prompts(data(train, eval=held, eval_fraction=0.0))
    assert [q.record["prompt"] for q in found.held_out] == ["Say 2."]
    assert {q.record["prompt"] for q in found.train} == {"Say 0.", "Say 1.", "Say 3."}


def test_the_only_prompts_there_are_may_be_named_twice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train = rows(tmp_path / "a.jsonl", *({"id": i, "prompt": f"Say {i % 2}."} for i in range(4)))
    held = rows(tmp_path / "b.jsonl", *({"id": f"e{i}", "prompt": f"Say {i}."} for i in range(2)))
    found = read_prompts(data(train, eval=held, eval_fraction=0.0))
    assert [q.id for q in found.train] == ["0", "1", "2", "3"]
    assert "says nothing about new prompts" in caplog.text


def test_two_files_that_count_their_rows_alike_lose_none(tmp_path: Path) -> None:
    train = rows(tmp_path / "a.jsonl", *({"id": i, "prompt": f"Say {i}."} for i in range(4)))
    held = rows(tmp_path / "b.jsonl", *({"id": i, "prompt": f"Tell {i}."} for i in range(3)))
    found = read_prompts(data(train, eval=held, eval_fraction=0.0))
    assert [q.record["prompt"] for q in found.train] == [f"Say {i}." for i in range(4)]
    assert len(found.held_out) == 3


@pytest.mark.parametrize(
    ("values", "settings", "message"),
    [
        ([{"prompt": "a"}], {"eval_fraction": 0.0}, "holds out none: set data.eval"),
        ([{"id": 1, "prompt": "a"}, {"id": 1, "prompt": "b"}], {}, "the id '1' is not unique"),
        ([{"chosen": "a"}], {}, "has no `prompt`"),
        ([], {}, "holds no prompts"),
        ([{"chosen": "a"}], {"bad_rows": "drop"}, "holds no prompts"),
        ([{"prompt": "a"}], {"train": [{"path": "p.jsonl", "weight": 2}]}, "has `weight`"),
    ],
)
def test_what_cannot_be_used_is_refused(
    values: list[dict[str, Any]],
    settings: dict[str, Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    path = rows(Path("p.jsonl"), *values)
    with pytest.raises((ConfigError, DataError), match=message):
        read_prompts(data(path, **settings))


def test_fresh_prompts_come_once_until_all_had_their_turn(tmp_path: Path) -> None:
    asked = questions(tmp_path, 40)
    size = len(asked) // 3
    fresh = spec(prompts={"per_round": size})
    rounds = [[q.id for q in choose(asked, fresh, n, 7, None)] for n in range(1, 7)]
    assert [len(set(one)) for one in rounds] == [size] * 6
    assert len({name for one in rounds[:3] for name in one}) == 3 * size
    assert rounds[:3] != rounds[3:]  # the second pass has another order
    assert rounds == [[q.id for q in choose(asked, fresh, n, 7, None)] for n in range(1, 7)]
    assert rounds[0] != [q.id for q in choose(asked, fresh, 1, 8, None)]


def test_hard_prompts_are_those_with_the_lowest_mean_score(tmp_path: Path) -> None:
    asked = questions(tmp_path, 40)
    hard = spec(prompts={"per_round": 8, "how": "hard"})
    first = choose(asked, hard, 1, 0, None)
    assert [q.id for q in first] == [
        q.id for q in choose(asked, spec(prompts={"per_round": 8}), 1, 0, None)
    ]
    judged = tmp_path / "judged.jsonl"
    rows(judged, *(
        {"id": q.id, "scores": [None] if i == 0 else [float(-i), 0.5 - i]}
        for i, q in enumerate(first)
    ))  # fmt: skip
    second = choose(asked, hard, 2, 0, judged)
    assert [q.id for q in second[:4]] == [q.id for q in reversed(first[4:])]
    assert len({q.id for q in second}) == 8


def test_all_prompts_and_shares_of_them(tmp_path: Path) -> None:
    asked = questions(tmp_path, 40)
    assert choose(asked, spec(prompts={"how": "all"}), 2, 0, None) == asked
    assert per_round(spec(num=3), 32) == 10
    with pytest.raises(ConfigError, match=r"per_round is 50, but there are 32 prompts"):
        per_round(spec(prompts={"per_round": 50}), 32)


def test_clips_get_a_second_name_beside_the_file(tmp_path: Path, clips_dir: Path) -> None:
    clip = next(clips_dir.rglob("*.mp4"))
    source = clips_dir / "rounds-prompts.jsonl"
    path = rows(source, *(
        {"prompt": f"What is seen {i}?", "video": clip.relative_to(clips_dir).as_posix()}
        for i in range(2)
    ))  # fmt: skip
    held = rows(tmp_path / "held.jsonl", {"prompt": "Else?"})
    found = read_prompts(data(path, eval=held, eval_fraction=0.0))
    write_prompts(found.train, tmp_path / "round-01" / "prompts.jsonl")
    source.unlink()
    line = json.loads((tmp_path / "round-01" / "prompts.jsonl").read_text().splitlines()[0])
    assert (tmp_path / "round-01" / line["video"]).samefile(clip)
