"""`mmalign data select`: who may win, which pairs each kind makes, and what is counted."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from judged_rows import drawn, judged, read, write
from toy_adapter import TOY, TOY_TOOLS, toy_config
from typer.testing import CliRunner

from mmalign.cli import app
from mmalign.config.judges import SelectSpec
from mmalign.data import select
from mmalign.data.records import read_records
from mmalign.errors import DataError
from mmalign.judging.rule import Rule
from mmalign.judging.score import score_file
from mmalign.judging.select import SELECTORS, Selected, select_file
from mmalign.models.adapter import ADAPTERS, TOOLS
from mmalign.train.loop import train


def selected(
    folder: Path, rows: list[dict[str, Any]], seed: int = 0, **spec: Any
) -> tuple[list[dict[str, Any]], Selected]:
    out = folder / "pairs.jsonl"
    out.unlink(missing_ok=True)
    source = write(folder / "judged.jsonl", rows)
    result = select_file(source, out, SelectSpec(**spec), seed=seed)
    return read(out), result


def places(pairs: list[dict[str, Any]]) -> list[list[int]]:
    return [pair["meta"]["places"] for pair in pairs]


def test_best_against_worst_as_an_ordinary_record(tmp_path: Path) -> None:
    row = judged("a", [1, 3, -2, 0], video="clip.mp4", answer="x", meta={"from": "there"})
    (pair,), result = selected(tmp_path, [row])
    assert pair == {
        "id": "a",
        "prompt": "say a",
        "video": "clip.mp4",
        "chosen": "answer 1",
        "rejected": "answer 2",
        "meta": {
            "answer": "x",
            "from": "there",
            "source": "a",
            "places": [1, 2],
            "rewards": {"rule": [3.0, -2.0]},
            "scores": [3.0, -2.0],
        },
    }
    assert (result.num_rows, result.num_pairs, result.num_used) == (1, 1, 1)


def test_pairs_are_read_as_training_reads_them(tmp_path: Path) -> None:
    rows = [
        judged("a", [1, 2], about=[{"cut": True}, {"cut": False}], calibration="so", label=3),
        judged("b", [2, 1], spans=[[[0, 3]], []], system="be kind"),
    ]
    selected(tmp_path, rows, kind="targets")
    first, second = read_records(tmp_path / "pairs.jsonl")
    assert first.problems == second.problems == ()
    assert first.example is not None
    assert second.example is not None
    assert [c.response for c in first.example.candidates] == ["answer 1", "answer 0", "so"]
    assert [c.complete for c in first.example.candidates] == [True, False, True]
    rate = 1 / (1 + np.exp(-1.0))
    assert first.example.labels[:2] == pytest.approx(((rate + 0.5) / 2, (1.5 - rate) / 2))
    assert second.example.candidates[0].spans == ((0, 3),)


@pytest.mark.parametrize(
    ("spec", "objective"),
    [
        ({}, "{name: dpo}"),
        ({"kind": "rso", "keep": 3}, "{name: rso}"),
        ({"kind": "targets"}, "{name: sppo}"),
        ({"kind": "targets", "labels": "score"}, "{name: gpo}"),
    ],
)
def test_judged_candidates_become_pairs_that_a_loss_learns_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: dict[str, Any], objective: str
) -> None:
    """Score, select, train: the whole way of a file."""
    monkeypatch.setitem(ADAPTERS, "text", TOY)
    monkeypatch.setitem(TOOLS, "text", TOY_TOOLS)
    (tmp_path / "vowel_rules.py").write_text(
        "def vowels(response):\n    return float(sum(c in 'aeiou' for c in response))\n"
    )
    words = ["aeio", "aeic", "aebc", "abcd", "bcdf", "aeiou"]
    rows = [drawn(f"r{k}", *words[k % 3 :], *words[: k % 3]) for k in range(8)]
    source = write(tmp_path / "candidates.jsonl", rows)
    judge = Rule("vowel_rules:vowels", tmp_path)
    score_file(source, tmp_path / "judged.jsonl", judge)
    pairs = tmp_path / "made.jsonl"
    select_file(tmp_path / "judged.jsonl", pairs, SelectSpec(**spec))
    settings = (f"objective={objective}", f"data.train={pairs}", "sample.num_prompts=0")
    config = toy_config(tmp_path, *settings, "train.num_steps=20", "train.log_every=1")
    lines = [line for line in read(train(config).run_dir / "metrics.jsonl") if "loss" in line]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["rewards/margins"] > 0


@pytest.mark.parametrize("kind", SELECTORS)
def test_nan_empty_and_cut_responses_never_win(tmp_path: Path, kind: str) -> None:
    """The best three of eight: one not judged, one empty, one cut off."""
    scores = [None, None, 9.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    row = judged("a", scores, about=[{"cut": k == 2} for k in range(8)])
    row["responses"][1] = " "
    rows = [{**row, "id": f"r{k}"} for k in range(6)]
    pairs, result = selected(tmp_path, rows, kind=kind)
    assert pairs
    assert all(chosen >= 3 for chosen, _ in places(pairs))
    assert all(rejected not in (0, 1) for _, rejected in places(pairs))
    assert not any("chosen_cut" in pair for pair in pairs)
    assert (result.unjudged, result.cut, result.same) == (6, 6, 6)
    freed, _ = selected(tmp_path, rows, kind=kind, cut="wins")
    if kind in ("best_worst", "all", "win_rate", "targets"):
        assert freed[0]["meta"]["places"] == [2, 7]
        assert freed[0]["chosen_cut"] is True


def test_a_cut_response_may_lose_and_no_end_is_learned_there(tmp_path: Path) -> None:
    about = [{"cut": True}, {"cut": False}]
    (pair,), _ = selected(tmp_path, [judged("a", [1, 2], about=about)])
    assert pair["rejected_cut"] is True
    rows = [judged("a", [2, 1], about=about), judged("b", [1, 2])]
    _, result = selected(tmp_path, rows)
    assert result.outcomes == {"none that may win is the better one": 1}
    both = judged("a", [2, 1], about=[{"cut": True}] * 2)
    _, result = selected(tmp_path, [both, judged("b", [1, 2])])
    assert result.outcomes == {"all responses were cut off": 1}


def test_equal_rewards_make_no_pair_and_are_counted(tmp_path: Path) -> None:
    rows = [
        judged("tie", [1, 1, 1]),
        judged("lost", [None, None]),
        judged("one", [2]),
        judged("near", [1.0, 1.05]),
        {**judged("same", [1, 1]), "responses": ["x", "x"]},
        {**judged("empty", [None]), "responses": [""]},
        judged("good", [0, 1]),
    ]
    pairs, result = selected(tmp_path, rows, margin=0.1)
    assert [pair["id"] for pair in pairs] == ["good"]
    assert result.outcomes == {
        "all rewards are equal": 1,
        "not judged": 1,
        "one response that is different and judged": 2,
        "no rewards differ by more than 0.1": 1,
        "all responses are empty": 1,
    }
    assert (result.ties, result.lost) == (1, 1)
    assert sum(result.outcomes.values()) + result.num_used == result.num_rows
    assert "no pair: all rewards are equal (1 rows)" in result.text()


def test_few_rows_with_a_pair_are_warned_of_and_none_is_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [judged(f"r{k}", [1, 1]) for k in range(4)]
    with caplog.at_level(logging.WARNING):
        selected(tmp_path, [*rows[:3], judged("good", [0, 1])])
        assert caplog.text == ""
        selected(tmp_path, [*rows, judged("good", [0, 1])])
    assert "only 1 of 5 rows have a pair (all rewards are equal: 4)" in caplog.text
    assert "a higher temperature" in caplog.text
    with pytest.raises(DataError, match=r"no row has a pair.*all rewards are equal \(4 rows\)"):
        selected(tmp_path, rows)
    assert not (tmp_path / "pairs.jsonl").exists()


def test_keep_takes_the_next_best_and_the_widest(tmp_path: Path) -> None:
    row = judged("a", [5, 1, 4, 2, 3])
    pairs, _ = selected(tmp_path, [row], keep=9)
    assert places(pairs) == [[0, 1], [2, 3]]
    assert [pair["id"] for pair in pairs] == ["a#0", "a#1"]
    pairs, _ = selected(tmp_path, [row], kind="all")
    assert len(pairs) == 10
    pairs, _ = selected(tmp_path, [row], kind="all", keep=3)
    assert places(pairs) == [[0, 1], [0, 3], [2, 1]]
    pairs, _ = selected(tmp_path, [row], kind="all", margin=2.5)
    assert places(pairs) == [[0, 1], [0, 3], [2, 1]]


def test_drawn_seatings_are_functions_of_seed_and_row(tmp_path: Path) -> None:
    rows = [judged(f"r{k}", list(range(8))) for k in range(4)]
    for kind, most in (("first_round", 4), ("tournament", 7)):
        pairs, _ = selected(tmp_path, rows, kind=kind)
        assert len(pairs) == 4 * most
        assert all(chosen > rejected for chosen, rejected in places(pairs))
        backwards, _ = selected(tmp_path, rows[::-1], kind=kind)
        assert sorted(map(json.dumps, backwards)) == sorted(map(json.dumps, pairs))
        others, _ = selected(tmp_path, rows, seed=1, kind=kind)
        assert others != pairs
        assert places(pairs[:most]) != places(pairs[most : 2 * most])
    first, _ = selected(tmp_path, rows, kind="first_round")
    used = [place for pair in places(first[:4]) for place in pair]
    assert sorted(used) == list(range(8)), "every response once"


def test_rso_keeps_better_responses_where_beta_is_small(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [judged(f"r{k}", rng.normal(size=16).tolist()) for k in range(60)]

    def mean(beta: float) -> float:
        pairs, _ = selected(tmp_path, rows, kind="rso", keep=4, beta=beta)
        assert len(pairs) == 3 * len(rows)
        return float(np.mean([pair["meta"]["scores"] for pair in pairs]))

    assert mean(0.05) > mean(0.5) > mean(50.0)
    pairs, _ = selected(tmp_path, rows, kind="rso", pair="first_round")
    assert len(pairs) == 2 * len(rows), "a quarter of 16, paired once"
    tied = [judged(f"t{k}", [1, 1, 1, 2]) for k in range(60)]
    _, result = selected(tmp_path, tied, kind="rso", keep=2, beta=9.0)
    assert set(result.outcomes) == {"the responses that were drawn have equal rewards"}
    with pytest.raises(DataError, match="fewer than 20 responses that rso could accept"):
        selected(tmp_path, rows, kind="rso", keep=20)


def test_win_rates_order_what_rewards_would_not(tmp_path: Path) -> None:
    """Response 0 has the highest reward, and 2 beats all others."""
    wins = [[0.5, 0.6, 0.2], [0.4, 0.5, 0.1], [0.8, 0.9, 0.5]]
    row = judged("a", [9, 1, 2], wins=wins)
    (pair,), _ = selected(tmp_path, [row], kind="win_rate")
    assert pair["meta"]["places"] == [2, 1]
    (pair,), _ = selected(tmp_path, [judged("a", [9, 1, 2])], kind="win_rate")
    assert pair["meta"]["places"] == [0, 1], "through the sigmoid"
    cyclic = judged("a", [0.5, 0.6, 0.4], wins=[[0.5, 0, 1], [1, 0.5, 0], [0, 1, 0.5]])
    _, result = selected(tmp_path, [cyclic, row], kind="win_rate")
    assert result.outcomes == {"all rewards are equal": 1}, "no response dominates"


def test_pairs_that_nobody_compared_do_not_count(tmp_path: Path) -> None:
    wins = [[0.5, 0.9, None], [0.1, 0.5, 0.6], [None, 0.4, 0.5]]
    (pair,), _ = selected(tmp_path, [judged("a", [0.9, 0.35, 0.4], wins=wins)], kind="win_rate")
    assert pair["meta"]["places"] == [0, 1]
    rates = select.win_rate(np.array([[0.5, 0.9, np.nan], [0.1, 0.5, 0.6], [np.nan, 0.4, 0.5]]))
    assert rates.tolist() == pytest.approx([0.9, 0.35, 0.4])
    assert np.isnan(select.win_rate(np.full((2, 2), np.nan))).all()


def test_targets_of_sppo_and_gpo(tmp_path: Path) -> None:
    wins: list[list[float | None]] = [[0.5, 1.0, 0.75], [0.0, 0.5, 0.25], [0.25, 0.75, 0.5]]
    row = judged("a", [0.9, 0.1, 0.5], wins=wins)
    (pair,), _ = selected(tmp_path, [row], kind="targets")
    assert (pair["label_chosen"], pair["label_rejected"]) == (0.75, 0.25)
    for k in range(3):
        wins[k][k] = None  # 1/2 against itself, whatever the file says
    (again,), _ = selected(tmp_path, [judged("a", [0.9, 0.1, 0.5], wins=wins)], kind="targets")
    assert again == pair
    (pair,), _ = selected(tmp_path, [row], kind="targets", labels="score")
    assert pair["label_chosen"] == pytest.approx((0 + 1 + 0.5) / 3)
    assert pair["label_rejected"] == pytest.approx((-1 + 0 - 0.5) / 3)
    (pair,), _ = selected(tmp_path, [judged("a", [3, 1, 2])], kind="targets", labels="score")
    assert (pair["label_chosen"], pair["label_rejected"]) == (1.0, -1.0)


def test_images_stay_beside_their_file(tmp_path: Path) -> None:
    row = {**judged("a", [1, 2]), "images": ["a0.png", "sub/a1.png"]}
    del row["responses"]
    (pair,), _ = selected(tmp_path, [row])
    assert (pair["image_chosen"], pair["image_rejected"]) == ("sub/a1.png", "a0.png")
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match=r"must lie in .* name images by their way from there"):
        select_file(tmp_path / "judged.jsonl", tmp_path / "other/p.jsonl", SelectSpec())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"scores": [1]}, "scores must be a list of 2 numbers"),
        ({"scores": [1, "x"]}, "scores must hold finite numbers or null"),
        ({"rewards": 3}, "rewards must be numbers by judge"),
        ({"rewards": {"a": [1]}}, "rewards of a must be a list of 2 numbers"),
        ({"wins": [[0.5]]}, "wins must be 2 lists of 2 numbers"),
        ({"wins": [[0.5, 0.9], [0.9, 0.5]]}, "probabilities that add to 1"),
        ({"wins": [[0.5, None], [0.9, 0.5]]}, "probabilities that add to 1"),
        ({"cut": [True]}, "cut must have an entry for each of the 2 responses"),
    ],
)
def test_a_judged_row_that_does_not_fit_names_its_line(
    tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    with pytest.raises(DataError, match=r"judged\.jsonl:2") as error:
        selected(tmp_path, [judged("a", [0, 1]), {**judged("b", [0, 1]), **change}])
    assert told in str(error.value)


def test_images_beside_texts_belong_to_the_prompt(tmp_path: Path) -> None:
    (pair,), _ = selected(tmp_path, [judged("a", [1, 2], images=["x.png", "y.png"])])
    assert pair["images"] == ["x.png", "y.png"]
    assert "images" not in pair["meta"]
    assert (pair["chosen"], pair["rejected"]) == ("answer 1", "answer 0")


def test_rows_that_were_not_judged_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="judge the file first with `data score --by`"):
        selected(tmp_path, [drawn("a", "x", "y")])


def test_the_command_line_refuses_what_a_kind_does_not_read(tmp_path: Path) -> None:
    source = write(tmp_path / "judged.jsonl", [judged("a", [0, 1])])
    ask = ["data", "select", str(source), "--out", str(tmp_path / "pairs.jsonl")]
    for more, told in (
        (["--by", "best"], "data select: kind: must be 'best_worst'"),
        (["--beta", "1"], "`beta` is only read with kind: rso"),
        (["--labels", "score"], "`labels` is only read with kind: targets"),
        (["--by", "rso", "--keep", "1"], "rso needs keep of 2 or more"),
        (["--margin", "-1"], "margin: must be at least 0"),
    ):
        result = CliRunner().invoke(app, [*ask, *more])
        assert result.exit_code == 1
        assert told in result.output
    done = CliRunner().invoke(app, [*ask, "--margin", "0.5"])
    assert done.output == f"{tmp_path}/pairs.jsonl: 1 pairs of 1 of 1 rows\n"
