"""`mmalign data generate` for images and for answers about clips."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import picture_runs
import pytest
import video_runs
from PIL import Image
from typer.testing import CliRunner

from mmalign.cli.app import app
from mmalign.inference import trained_adapter

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.runs


def generated(config: Path, data: Path, out: Path, *given: str) -> tuple[str, list[dict[str, Any]]]:
    told = ["data", "generate", str(config), "--data", str(data), "--out", str(out), *given]
    done = CliRunner().invoke(app, told)
    assert done.exit_code == 0, done.output
    return done.output, [json.loads(line) for line in out.read_text("utf-8").splitlines()]


def test_images_by_seed(digits_dir: Path, tmp_path: Path) -> None:
    data = tmp_path / "prompts.jsonl"
    rows = [{"id": f"d{i}", "prompt": f"a {i}", "digit": i} for i in range(3)]
    data.write_text("\n".join(map(json.dumps, rows)))
    small = {"resolution": 8, "sampling": {"num_steps": 2}}
    config = picture_runs.write_config(tmp_path, digits_dir, data, diffusion=small)
    _, lines = generated(config, data, tmp_path / "a" / "c.jsonl", "--num", "2")
    assert [line["digit"] for line in lines] == [0, 1, 2]
    files = [tmp_path / "a" / name for line in lines for name in line["images"]]
    assert len({file.read_bytes() for file in files}) == 6
    assert all(about["logp"] is None and not about["cut"] for about in lines[0]["about"])
    _, again = generated(config, data, tmp_path / "b" / "c.jsonl", "--num", "2")
    assert again == lines
    first = (tmp_path / "b" / name for line in again for name in line["images"])
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in files]
    loaded = picture_runs.configured(tmp_path, digits_dir, data, diffusion=small)
    adapter = trained_adapter(loaded, None, base=True)
    (own,) = adapter.sample(["a 2"], seeds=[lines[2]["about"][1]["seed"]])
    assert own.tobytes() == Image.open(files[5]).tobytes()


def test_answers_about_clips(
    video_models: Callable[[str], Path], clips_dir: Path, tmp_path: Path
) -> None:
    model = video_models("qwen2_5_vl")
    rows = [video_runs.row(number, "plain") for number in range(3)]
    rows[1]["video"] = "broken.mp4"
    (clips_dir / "broken.mp4").write_bytes(b"no video")
    data = clips_dir / "asked.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    config = video_runs.write_config(tmp_path, model, data)
    given = ("--num", "3", "--max-new-tokens", "5")
    said, lines = generated(config, data, tmp_path / "out" / "c.jsonl", *given)
    assert [line["id"] for line in lines] == ["row-0", "row-2"]
    assert "1 prompts have no responses" in said
    assert "broken.mp4" in said
    for line in lines:
        assert (tmp_path / "out" / line["video"]).is_file()
        assert len(set(line["responses"])) == 3
        assert all(about["logp"] < 0 and 0 < about["tokens"] <= 5 for about in line["about"])
        assert [a["cut"] for a in line["about"]] == [a["tokens"] == 5 for a in line["about"]]
