"""The page of a rounds run: what it says, and that nothing in a stranger's folder breaks it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmalign.errors import ConfigError
from mmalign.report import place_of, write_report
from mmalign.report.rounds import read_rounds


def mean(value: float) -> dict[str, Any]:
    return {"mean": value, "interval": [value - 0.1, value + 0.1]}


def over(wins: float, low: float) -> dict[str, Any]:
    return {
        "wins": wins, "losses": 1 - wins, "ties": 0.0, "interval": [wins - 0.1, wins + 0.1],
        "difference": low + 0.1, "difference_interval": [low, low + 0.2],
    }  # fmt: skip


def measured(number: int, reward: float, **more: Any) -> dict[str, Any]:
    found = {"round": number, "prompts": 2, "lost": 0.0, "cut": 0.5, "reward": mean(reward), **more}
    if number:
        made = {"prompts": 8, "pairs": 6, "ties": 0.25, "lost": 0.0, "reward": reward}
        found |= {"kl": mean(2.0 * number), "over_base": over(0.7, 0.1), "made": made}
    return found


def rounds(folder: Path, *numbers: dict[str, Any], **summary: Any) -> Path:
    folder.mkdir(parents=True)
    config = "model: {path: m/stories}\nobjective: {name: dpo}\nrounds: {num: 2}\n"
    (folder / "config.yaml").write_text(config)
    (folder / "rounds.json").write_text(json.dumps({"best": 2, "stopped": "", **summary}))
    for number, found in enumerate(numbers):
        held = folder / f"round-{number:02d}" / "held_out"
        held.mkdir(parents=True)
        (held.parent / "measured.json").write_text(json.dumps(found))
        said = [f"said {i} in {number}" for i in range(2)]
        rows = [
            {"id": f"q{i}", "prompt": f"Ask <{i}>", "policy": said[i], "policy_reward": i * number}
            for i in range(2)
        ]
        (held / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def page(folder: Path) -> str:
    return write_report([folder], place_of([folder])).read_text()


def test_the_page_says_what_was_gained_and_what_it_cost(tmp_path: Path) -> None:
    last = measured(2, 0.7) | {"over_previous": over(0.6, 0.05)}
    text = page(rounds(tmp_path / "r", measured(0, 0.3), measured(1, 0.5), last))
    assert "Rounds of dpo on stories" in text
    assert "The best round is 2: its mean reward is 0.7, from 0.3 of the base, at 4 nats" in text
    assert "finished after 2 rounds" in text
    assert "said 1 in 2" in text
    assert "Ask &lt;1&gt;" in text
    assert "<svg" in text
    assert "lost to the round before" not in text


def test_what_went_wrong_is_said_first(tmp_path: Path) -> None:
    few = measured(1, 0.2) | {"over_previous": over(0.3, -0.4)}
    few["made"]["pairs"] = 1
    folder = rounds(tmp_path / "r", measured(0, 0.3), few, best=0, stopped="KL 9 nats is above 5")
    text = page(folder)
    assert "Stopped early: KL 9 nats is above 5." in text
    assert "No round is better than the base" in text
    assert "Fewer than a quarter of the prompts gave a pair in round 1" in text
    assert "Round 1 lost to the round before it" in text
    assert "stopped after round 1 of 2" in text


def test_a_run_that_has_begun(tmp_path: Path) -> None:
    folder = rounds(tmp_path / "r", measured(0, 0.3))
    assert "0 of 2 rounds so far" in page(folder)
    (folder / "round-00" / "measured.json").unlink()
    assert "No round has been measured so far." in page(folder)


@pytest.mark.parametrize(
    "odd",
    [
        {"over_base": {"wins": "all"}}, {"over_base": 3}, {"made": []}, {"cut": None},
        {"kl": {"mean": 1.0, "interval": [0.0]}}, {"prompts": "many"},
    ],
)  # fmt: skip
def test_odd_numbers_are_left_out(odd: dict[str, Any], tmp_path: Path) -> None:
    text = page(rounds(tmp_path / "r", measured(0, 0.3) | odd, measured(1, 0.5) | odd))
    assert "Reward against " in text


def test_torn_files_are_left_out(tmp_path: Path) -> None:
    folder = rounds(tmp_path / "r", measured(0, 0.3), measured(1, 0.5))
    (folder / "round-01" / "held_out" / "rows.jsonl").write_text('{"id": 1')
    (folder / "rounds.json").write_text("[")
    assert "said 1" not in page(folder)
    (folder / "round-01" / "measured.json").write_text('{"reward": "high"}')
    assert len(read_rounds(folder).rounds) == 1


def test_images_of_all_rounds_are_one_sheet(tmp_path: Path) -> None:
    folder = rounds(tmp_path / "r", measured(0, 0.3), measured(1, 0.5))
    Image.new("RGB", (8, 8), "red").save(tmp_path / "secret.png")
    for policy, shown in (("a.png", True), ("../../../secret.png", False)):
        for number in range(2):  # a path that leaves the folder is not followed
            held = folder / f"round-0{number}" / "held_out"
            Image.new("L", (8, 8), 40 * number).save(held / "a.png")
            row = {"id": "q", "prompt": "a seven", "kind": "images", "policy": policy}
            (held / "rows.jsonl").write_text(json.dumps(row | {"policy_reward": 0.1}) + "\n")
        assert ('alt="a seven"' in page(folder)) == shown


def test_one_run_of_rounds_a_page(tmp_path: Path) -> None:
    one, two = (rounds(tmp_path / name, measured(0, 0.3)) for name in "ab")
    with pytest.raises(ConfigError, match="a page shows one run of rounds"):
        write_report([one, two], tmp_path / "both.html")
