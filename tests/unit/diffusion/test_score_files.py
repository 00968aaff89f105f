"""`mmalign data score`: labels from scores, files in and out, and going on after a kill."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from tiny_scorers import picture, write_pickscore
from torch import Tensor
from typer.testing import CliRunner

from mmalign.cli import app
from mmalign.data.jobs import Journal, Source
from mmalign.data.records import read_records
from mmalign.diffusion.scorers import load_scorer
from mmalign.diffusion.scorers.files import (
    PUBLISHED_RANGE,
    label_list,
    label_pair,
    parse_smooth,
    score_file,
    score_range,
    smoothed,
)
from mmalign.errors import ConfigError, DataError

GOLDEN = json.loads(
    (Path(__file__).parents[2] / "golden" / "diffusion.json").read_text(encoding="utf-8")
)["smpo"]


def test_golden_smoothed_labels() -> None:
    """The release's winner by score, its probability and its weight 10 (2p - 1)."""
    assert pytest.approx((GOLDEN["ps_min"], GOLDEN["ps_max"])) == PUBLISHED_RANGE
    for case in GOLDEN["probs"]:
        pair = (case["ps_score_0"], case["ps_score_1"])
        winner, loser = max(pair), min(pair)
        p = smoothed(winner, loser, *PUBLISHED_RANGE)
        assert p == pytest.approx(case["p_win"], rel=1e-10)
        assert 10 * (2 * p - 1) == pytest.approx(case["weight_code"], rel=1e-9, abs=1e-12)
        labelled = label_pair(
            {"image_chosen": "0", "image_rejected": "1"},
            {"pickscore": pair},
            relabel=True,
            limits=PUBLISHED_RANGE,
        )
        first_won = labelled.record["image_chosen"] == "0"
        # The release makes the second of equal images the winner; here they are a tie.
        assert first_won == bool(case["ps_label_0"]) or labelled.tied
        assert labelled.record["p_chosen"] == pytest.approx(case["p_win"], rel=1e-10)


def test_smoothing_is_symmetric_and_survives_extremes() -> None:
    assert smoothed(1.0, 3.0, 0.0, 2.0) + smoothed(3.0, 1.0, 0.0, 2.0) == pytest.approx(1.0)
    assert smoothed(1e6, 0.0, 0.0, 1.0) == 1.0
    assert smoothed(0.0, 1e6, 0.0, 1.0) == 0.0


PAIR: Mapping[str, Any] = {
    "id": "a",
    "prompt": "x",
    "image_chosen": "c.png",
    "image_rejected": "r.png",
    "prompt_chosen": "cc",
    "prompt_rejected": "rr",
    "votes_chosen": 3,
    "votes_rejected": 1,
    "meta": {"from": "there"},
}


def test_without_relabel_the_label_stays() -> None:
    got = label_pair(PAIR, {"clip": (0.1, 0.3), "hps-v2": (1, 2)}, relabel=False, limits=None)
    assert not got.swapped
    assert got.record["votes_chosen"] == 3
    assert (got.record["score_chosen"], got.record["score_rejected"]) == (0.1, 0.3)
    assert got.record["meta"] == {"from": "there", "scores": {"clip": [0.1, 0.3], "hps-v2": [1, 2]}}


def test_relabel_swaps_all_that_belongs_to_a_side() -> None:
    got = label_pair(PAIR, {"clip": (0.1, 0.3), "hps-v2": (1, 2)}, relabel=True, limits=None)
    assert got.swapped
    row = got.record
    assert (row["image_chosen"], row["image_rejected"]) == ("r.png", "c.png")
    assert (row["prompt_chosen"], row["prompt_rejected"]) == ("rr", "cc")
    assert (row["score_chosen"], row["score_rejected"]) == (0.3, 0.1)
    assert row["meta"]["scores"] == {"clip": [0.3, 0.1], "hps-v2": [2, 1]}
    assert row["meta"]["human"] == {"swapped": True, "votes_chosen": 3, "votes_rejected": 1}
    assert "votes_chosen" not in row
    assert "tie" not in row


def test_equal_scores_stay_a_tie() -> None:
    got = label_pair(PAIR, {"clip": (0.2, 0.2)}, relabel=True, limits=None)
    assert got.tied
    assert got.record["tie"] is True
    assert got.record["image_chosen"] == "c.png"
    soft = label_pair(PAIR, {"clip": (0.2, 0.2)}, relabel=True, limits=(0.0, 1.0))
    assert soft.record["p_chosen"] == 0.5


def test_smoothing_alone_doubts_a_label_that_the_scores_contradict() -> None:
    got = label_pair({**PAIR, "tie": True}, {"clip": (0.1, 0.3)}, relabel=False, limits=(0.0, 0.4))
    assert got.record["p_chosen"] == pytest.approx(1 / (1 + np.exp(0.5)))
    assert "tie" not in got.record
    assert got.record["meta"]["human"]["tie"] is True


def test_lists_are_ranked_anew_only_on_request() -> None:
    record = {"images": ["a", "b", "c"], "scores": [3, 2, 1]}
    kept = label_list(record, {"clip": (0.1, 0.2, 0.2)}, relabel=False).record
    assert kept["scores"] == [3, 2, 1]
    assert kept["meta"] == {"scores": {"clip": [0.1, 0.2, 0.2]}}
    anew = label_list(record, {"clip": (0.1, 0.2, 0.2)}, relabel=True).record
    assert anew["scores"] == [0.1, 0.2, 0.2]
    assert anew["meta"]["human"] == {"scores": [3, 2, 1]}


def test_ranges() -> None:
    assert parse_smooth("0.1,0.4", "clip") == (0.1, 0.4)
    assert score_range("published", []) == PUBLISHED_RANGE
    assert score_range(parse_smooth("data", "clip"), [0.3, 0.1, 0.2]) == (0.1, 0.3)
    assert score_range(None, [1.0]) is None
    for text, scorer in (("0.4,0.1", "clip"), ("x", "clip"), ("0,inf", "clip"), ("0.1", "clip")):
        with pytest.raises(ConfigError, match="--smooth"):
            parse_smooth(text, scorer)
    with pytest.raises(ConfigError, match="that of pickscore"):
        parse_smooth("published", "hps-v2")
    with pytest.raises(DataError, match="all images have the score"):
        score_range("data", [1.0, 1.0])


class Brightness:
    """Mean of the pixels; counts what it is asked."""

    name = "brightness"

    def __init__(self, fail_after: int = 1000) -> None:
        self.prompts: list[str] = []
        self.fail_after = fail_after

    def __call__(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        if len(self.prompts) >= self.fail_after:
            raise KeyboardInterrupt
        self.prompts += prompts
        return torch.tensor([float(np.asarray(p, dtype=np.float64).mean()) for p in pictures])


def write_pairs(folder: Path, greys: Sequence[tuple[int, int]]) -> Path:
    folder.mkdir(exist_ok=True)
    lines = []
    for i, (chosen, rejected) in enumerate(greys):
        names = {"image_chosen": f"{i}-c.png", "image_rejected": f"{i}-r.png"}
        for name, grey in zip(names.values(), (chosen, rejected), strict=True):
            Image.new("L", (8, 8), grey).save(folder / name)
        lines.append(json.dumps({"id": f"row{i}", "prompt": f"p{i}", **names}))
    file = folder / "pairs.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def score(file: Path, out: Path, scorer: Any = None, **options: Any) -> Any:
    scorer = scorer or Brightness()
    return score_file(
        Source(str(file)), out, ["brightness"], lambda: {"brightness": scorer}, **options
    )


def test_a_file_in_and_out(tmp_path: Path) -> None:
    file = write_pairs(tmp_path / "data", [(200, 100), (50, 90), (30, 30)])
    result = score(file, tmp_path / "data" / "out.jsonl", relabel=True, smooth="data")
    assert (result.num_written, result.swapped, result.tied) == (3, 1, 1)
    records = list(read_records(tmp_path / "data" / "out.jsonl"))
    assert [r.problems for r in records] == [(), (), ()]
    rows = lines_of(tmp_path / "data" / "out.jsonl")
    assert [row["image_chosen"] for row in rows] == ["0-c.png", "1-r.png", "2-c.png"]
    assert rows[1]["score_chosen"] == 90.0
    example = records[0].example
    assert example is not None
    p = smoothed(200.0, 100.0, 30.0, 200.0)
    assert example.labels == pytest.approx((p, 1 - p))
    assert records[2].example is not None
    assert records[2].example.is_tie
    assert not (tmp_path / "data" / "out.jsonl.partial").exists()
    with pytest.raises(DataError, match="already exists"):
        score(file, tmp_path / "data" / "out.jsonl")


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    file = write_pairs(tmp_path / "data", [(i + 1, i) for i in range(10)])
    out = tmp_path / "data" / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        score(file, out, Brightness(fail_after=8), batch_size=2)
    partial = out.with_name("out.jsonl.partial")
    assert not out.exists()
    assert len(lines_of(partial)) == 1 + 4  # what was asked, and two batches
    with partial.open("a") as handle:
        handle.write('{"id": "row4", "sco')  # as a killed process leaves it
    second = Brightness()
    seen: list[tuple[int, int]] = []
    result = score(
        file, out, second, batch_size=4, progress=lambda done, total: seen.append((done, total))
    )
    assert sorted(set(second.prompts)) == [f"p{i}" for i in range(4, 10)]
    assert seen == [(4, 10), (4, 10), (2, 10)]
    assert (result.num_written, result.resumed) == (10, 4)
    assert "of which 4 had been before" in result.text()
    whole = tmp_path / "data" / "whole.jsonl"
    score(file, whole)
    assert out.read_bytes() == whole.read_bytes()


def test_a_run_killed_at_the_very_end_loads_nothing(tmp_path: Path) -> None:
    file = write_pairs(tmp_path / "data", [(1, 2)])
    out = tmp_path / "data" / "out.jsonl"
    score(file, out)
    expected = out.read_bytes()
    source = Source(str(file))
    journal = Journal(
        out.with_name("out.jsonl.partial"), {**source.facts(), "scorers": ["brightness"]}
    )
    journal.add({"row0": {"scores": {"brightness": [1.0, 2.0]}}})
    journal.close()

    def load() -> Any:
        raise AssertionError("nothing is left to score")

    score_file(source, out, ["brightness"], load)
    assert out.read_bytes() == expected


def test_another_job_does_not_go_on_with_these_scores(tmp_path: Path) -> None:
    file = write_pairs(tmp_path / "data", [(i + 1, i) for i in range(4)])
    out = tmp_path / "data" / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        score(file, out, Brightness(fail_after=2), batch_size=1)
    with pytest.raises(DataError, match=r"begun for something else \(weights differs\)"):
        score(file, out, settings={"weights": {"brightness": "other"}})
    file.write_text(file.read_text() + "\n")
    with pytest.raises(DataError, match="source_size"):
        score(file, out)
    out.with_name("out.jsonl.partial").write_text("nonsense\n")
    with pytest.raises(DataError, match="damaged"):
        score(file, out)


def test_broken_pictures_are_left_out_counted_and_named(tmp_path: Path) -> None:
    file = write_pairs(tmp_path / "data", [(1, 2), (3, 4), (5, 6)])
    (tmp_path / "data" / "1-r.png").write_bytes(b"not an image")
    out = tmp_path / "data" / "out.jsonl"
    result = score(file, out)
    assert [row["id"] for row in lines_of(out)] == ["row0", "row2"]
    assert "1 rows left out: row1" in result.text()
    assert "1-r.png" in result.text()
    for i in (0, 2):
        (tmp_path / "data" / f"{i}-c.png").write_bytes(b"")
    with pytest.raises(DataError, match="no row can be scored"):
        score(file, tmp_path / "data" / "none.jsonl")


def test_rows_that_cannot_be_compared_are_refused_before_scoring(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    with pytest.raises(DataError, match=r"text\.jsonl:1: is not a pair or list of images"):
        score(tmp_path / "text.jsonl", tmp_path / "out.jsonl")
    picture(0).save(tmp_path / "x.png")
    picture(1).save(tmp_path / "y.png")
    listed = {"prompt": "a", "images": ["x.png", "y.png"], "scores": [1, 2]}
    (tmp_path / "list.jsonl").write_text(json.dumps(listed) + "\n")
    with pytest.raises(DataError, match="this is a list"):
        score(tmp_path / "list.jsonl", tmp_path / "out.jsonl", smooth="data")
    result = score(tmp_path / "list.jsonl", tmp_path / "out.jsonl", relabel=True)
    assert result.num_pairs == 0
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "image_chosen": "x.png"}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:1"):
        score(tmp_path / "bad.jsonl", tmp_path / "bad-out.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="no records"):
        score(tmp_path / "empty.jsonl", tmp_path / "empty-out.jsonl")


def test_a_scorer_that_overflows_is_told(tmp_path: Path) -> None:
    file = write_pairs(tmp_path / "data", [(1, 2)])

    def broken(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        return torch.full((len(pictures),), float("inf"))

    with pytest.raises(DataError, match="score in float32"):
        score(file, tmp_path / "data" / "out.jsonl", broken)


def png(grey: int) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (8, 8), grey).save(stream, "PNG")
    return stream.getvalue()


def test_pick_a_pic_columns(tmp_path: Path) -> None:
    """Cells of a parquet file come out as image files beside the JSONL."""
    table = pyarrow.table(
        {
            "jpg_0": [png(10), png(90), png(5)],
            "jpg_1": [png(20), png(80), png(6)],
            "label_0": [1.0, 0.0, 0.5],
            "label_1": [0.0, 1.0, 0.5],
            "caption": ["a", "b", "c"],
            "image_0_uid": ["x", "y", "z"],
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "pick.parquet")
    out = tmp_path / "scored" / "out.jsonl"
    result = score(tmp_path / "pick.parquet", out, relabel=True, smooth=(0.0, 100.0))
    assert (result.num_written, result.swapped) == (3, 3)
    assert [record.problems for record in read_records(out)] == [(), (), ()]
    rows = lines_of(out)
    values = [(row["score_chosen"], row["score_rejected"]) for row in rows]
    assert values == [(20.0, 10.0), (90.0, 80.0), (6.0, 5.0)]
    assert [row["meta"]["human"].get("tie") for row in rows] == [None, None, True]
    for row in rows:
        assert (out.parent / row["image_chosen"]).is_file()


def test_the_command(tmp_path: Path) -> None:
    weights = write_pickscore(tmp_path / "pickscore")
    data = tmp_path / "data"
    data.mkdir()
    for i in range(4):
        picture(i).save(data / f"{i}.png")
    records = [
        {"prompt": "a cat", "image_chosen": "0.png", "image_rejected": "1.png"},
        {"prompt": "a dog", "image_chosen": "2.png", "image_rejected": "3.png"},
    ]
    (data / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    arguments = ["data", "score", str(data / "pairs.jsonl"), "--out", str(data / "out.jsonl")]
    run = CliRunner().invoke(
        app,
        [
            *(*arguments, "--scorer", f"pickscore={weights}", "--device", "cpu"),
            *("--relabel", "--smooth", "published"),
        ],
    )
    assert run.exit_code == 0, run.output
    assert "2 rows scored" in run.stdout
    rows = lines_of(data / "out.jsonl")
    scorer: Any = load_scorer("pickscore", weights, "cpu")
    raw = scorer.cosine([picture(0), picture(1)], ["a cat", "a cat"]).tolist()
    assert sorted((rows[0]["score_chosen"], rows[0]["score_rejected"])) == pytest.approx(
        sorted(raw), abs=1e-6
    )
    assert rows[0]["score_chosen"] >= rows[0]["score_rejected"]
    assert rows[0]["p_chosen"] == pytest.approx(smoothed(max(raw), min(raw), *PUBLISHED_RANGE))

    again = CliRunner().invoke(app, [*arguments, "--scorer", "clip"])
    assert again.exit_code == 1
    assert "already exists" in again.stderr
    wrong = CliRunner().invoke(app, [*arguments, "--scorer", "clip", "--smooth", "published"])
    assert "that of pickscore" in wrong.stderr
