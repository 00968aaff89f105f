"""Win rates of two sets of same-seed images: the golden, the folders, the command."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_scorers import picture, write_pickscore
from torch import Tensor
from typer.testing import CliRunner

from mmalign.cli import app
from mmalign.diffusion.compare import compare
from mmalign.diffusion.scorers import load_scorer
from mmalign.errors import DataError
from mmalign.stats import win_rate

GOLDEN = json.loads(
    (Path(__file__).parents[2] / "golden" / "diffusion.json").read_text(encoding="utf-8")
)["evaluation"]["win_rate"]


class Brightness:
    """Mean of the pixels; a scorer that anyone can check by eye."""

    name = "brightness"

    def __call__(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        assert len(pictures) == len(prompts)
        return torch.tensor([float(np.asarray(p, dtype=np.float64).mean()) for p in pictures])


def test_golden_win_rate_counts_ties_for_nobody() -> None:
    rate = win_rate(GOLDEN["a"], GOLDEN["b"])
    assert (rate.a, rate.b) == pytest.approx((GOLDEN["win_a"], GOLDEN["win_b"]))
    assert rate.ties == pytest.approx(0.2)
    assert rate.num_prompts == 5
    assert rate.mean_difference == pytest.approx(0.008)
    assert rate.mean_a - rate.mean_b == pytest.approx(rate.mean_difference)


def test_swapping_the_sets_swaps_all() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=60), rng.normal(size=60)
    one, other = win_rate(a, b), win_rate(b, a)
    assert (one.a, one.b, one.ties) == (other.b, other.a, other.ties)
    low, high = one.difference_interval
    assert other.difference_interval == pytest.approx((-high, -low), abs=0.02)


def test_intervals_are_paired() -> None:
    """What all prompts share does not widen them: a tiny but constant gain is certain."""
    rng = np.random.default_rng(1)
    easy = rng.normal(scale=10.0, size=80)
    rate = win_rate(easy + 0.1, easy)
    assert rate.interval == (1.0, 1.0)
    assert rate.difference_interval == pytest.approx((0.1, 0.1))
    a, b = rng.normal(size=80), rng.normal(size=80)
    unsure = win_rate(a, b)
    assert unsure.interval[0] < unsure.a < unsure.interval[1]
    assert unsure == win_rate(a, b)


@pytest.mark.parametrize("bad", [([1.0], [1.0, 2.0]), ([], []), ([[1.0]], [[1.0]])])
def test_scores_must_belong_together(bad: tuple[Any, Any]) -> None:
    with pytest.raises(DataError, match="cannot be compared"):
        win_rate(*bad)


def test_scores_must_be_finite() -> None:
    with pytest.raises(DataError, match="finite"):
        win_rate([1.0, float("nan")], [1.0, 2.0])


def write_samples(folder: Path, greys: Sequence[int], **changes: Any) -> Path:
    folder.mkdir()
    records = []
    for i, grey in enumerate(greys):
        Image.new("L", (8, 8), grey).save(folder / f"{i}.png")
        record = {"id": f"p{i}", "prompt": f"a {i}", "seed": i, "image": f"{i}.png", **changes}
        records.append(json.dumps(record))
    (folder / "samples.jsonl").write_text("\n".join(records) + "\n", encoding="utf-8")
    return folder


def test_two_folders(tmp_path: Path) -> None:
    a = write_samples(tmp_path / "a", [10, 200, 50, 70])
    b = write_samples(tmp_path / "b", [20, 100, 50, 60])
    seen: list[tuple[int, int]] = []
    found = compare(
        a,
        b,
        {"brightness": Brightness()},
        batch_size=3,
        progress=lambda done, total: seen.append((done, total)),
    )
    rate = found.rates["brightness"]
    assert (rate.a, rate.b, rate.ties) == (0.5, 0.25, 0.25)
    assert found.rows[1] == {
        "image": "1.png",
        "id": "p1",
        "prompt": "a 1",
        "seed": 1,
        "brightness": [200.0, 100.0],
    }
    assert seen == [(3, 4), (1, 4)]
    assert "50.0%" in found.text()
    table = found.write(tmp_path / "new" / "compare.json")
    assert len(table.read_text().splitlines()) == 4
    summary = json.loads((tmp_path / "new" / "compare.json").read_text())
    assert summary["scorers"]["brightness"]["b"] == 0.25
    assert summary["rows"] == "compare.jsonl"


def test_how_the_pictures_were_made_is_told(tmp_path: Path) -> None:
    common = {"num_steps": 25, "sampler": "ddim"}
    a = write_samples(tmp_path / "a", [1, 2], settings={**common, "guidance": 7.5})
    b = write_samples(tmp_path / "b", [2, 1], settings={**common, "guidance": 5.0})
    found = compare(a, b, {"brightness": Brightness()})
    text = found.text()
    assert "num_steps 25, sampler ddim" in text
    assert "differs: guidance is 7.5 in A, 5.0 in B" in text
    assert "settings" not in found.rows[0]
    found.write(tmp_path / "c.json")
    written = json.loads((tmp_path / "c.json").read_text())["settings"]
    assert written["b"] == {**common, "guidance": 5.0}


def test_a_broken_picture_leaves_with_its_twin(tmp_path: Path) -> None:
    a = write_samples(tmp_path / "a", [10, 200])
    b = write_samples(tmp_path / "b", [20, 100])
    (b / "0.png").write_bytes(b"\x89PNG broken")
    found = compare(a, b, {"brightness": Brightness()})
    assert [row["image"] for row in found.rows] == ["1.png"]
    assert len(found.dropped) == 1
    assert "0.png" in found.text()
    (b / "1.png").write_bytes(b"")
    with pytest.raises(DataError, match="no image can be decoded"):
        compare(a, b, {"brightness": Brightness()})


def test_other_names_prompts_or_seeds_are_refused(tmp_path: Path) -> None:
    a = write_samples(tmp_path / "a", [10, 200])
    scorers = {"brightness": Brightness()}
    for other, message in (
        (write_samples(tmp_path / "more", [1, 2, 3]), r"2\.png not in"),
        (write_samples(tmp_path / "seed", [1, 2], seed=7), "the seeds differ in 0.png"),
        (write_samples(tmp_path / "prompt", [1, 2], prompt="x"), "the prompts differ"),
        (tmp_path / "none", "mmalign sample"),
    ):
        with pytest.raises(DataError, match=message):
            compare(a, other, scorers)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "samples.jsonl").write_text("")
    with pytest.raises(DataError, match="names no images"):
        compare(a, tmp_path / "empty", scorers)
    with pytest.raises(DataError, match="at least one scorer"):
        compare(a, a, {})


def test_names_in_a_samples_file_stay_in_the_folder(tmp_path: Path) -> None:
    a = write_samples(tmp_path / "a", [1], image="../secret.png")
    with pytest.raises(DataError, match="without folders"):
        compare(a, a, {"brightness": Brightness()})
    b = write_samples(tmp_path / "b", [1, 2], image="0.png")
    with pytest.raises(DataError, match="twice"):
        compare(b, b, {"brightness": Brightness()})


def test_pictures_of_others_with_a_prompts_file(tmp_path: Path) -> None:
    a = write_samples(tmp_path / "a", [10, 200])
    b = write_samples(tmp_path / "b", [20, 100])
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text((a / "samples.jsonl").read_text())
    for folder in (a, b):
        (folder / "samples.jsonl").unlink()
        picture(0).save(folder / "grid.png")
    found = compare(a, b, {"brightness": Brightness()}, prompts=prompts)
    assert found.rates["brightness"].a == 0.5
    picture(0).save(a / "extra.png")
    with pytest.raises(DataError, match=r"extra\.png not in"):
        compare(a, b, {"brightness": Brightness()}, prompts=prompts)
    picture(0).save(b / "extra.png")
    with pytest.raises(DataError, match=r"no prompt for extra\.png"):
        compare(a, b, {"brightness": Brightness()}, prompts=prompts)
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        compare(a, tmp_path / "none", {"brightness": Brightness()}, prompts=prompts)


def test_the_command(tmp_path: Path) -> None:
    weights = write_pickscore(tmp_path / "pickscore")
    a = write_samples(tmp_path / "a", [10, 200])
    b = write_samples(tmp_path / "b", [10, 100])
    run = CliRunner().invoke(
        app,
        [
            *("compare", str(a), str(b), "--scorer", f"pickscore={weights}"),
            *("--out", str(tmp_path / "c.json"), "--device", "cpu"),
        ],
    )
    assert run.exit_code == 0, run.output
    assert "pickscore" in run.stdout
    assert "2 prompts, same seeds" in run.stdout
    rows = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert rows[0]["pickscore"][0] == pytest.approx(rows[0]["pickscore"][1], abs=1e-4)
    scorer = load_scorer("pickscore", weights, "cpu")
    alone = scorer([Image.open(a / "1.png").convert("RGB")], ["a 1"])
    assert rows[1]["pickscore"][0] == pytest.approx(float(alone[0]), rel=1e-5)


def test_the_command_refuses_before_it_loads(tmp_path: Path) -> None:
    a = write_samples(tmp_path / "a", [10])

    def message(*arguments: str) -> str:
        run = CliRunner().invoke(app, ["compare", *arguments])
        assert run.exit_code == 1
        return run.stderr

    nowhere = str(tmp_path / "b")
    assert "there is no such file" in message(str(a), nowhere, "--scorer", "clip")
    assert "no scorer 'x'" in message(str(a), str(a), "--scorer", "x")
    assert "twice" in message(str(a), str(a), "--scorer", "clip", "--scorer", "clip=dir")
    assert "float32" in message(str(a), str(a), "--scorer", "clip", "--dtype", "int8")
    assert ".json" in message(str(a), str(a), "--scorer", "clip", "--out", "table.csv")
    assert "clip=DIR" in message(str(a), str(a), "--scorer", "clip")
