"""A tiny model's answers to the questions of a benchmark, as `mmalign bench score` reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tiny_video import write_clip
from typer.testing import CliRunner

from mmalign.cli import app
from mmalign.errors import DataError
from mmalign.pairs import answers
from mmalign.pairs.predict import find_clip

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Models = Callable[[str], Path]


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["bench", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def entry(basic: str, made_up: str) -> dict[str, Any]:
    sides = {"basic": ("yes", basic), "hallucination": ("no", made_up)}
    return {
        side: {"video": video, "question": "Does it move?", "answer": answer}
        for side, (answer, video) in sides.items()
    }


@pytest.fixture
def command(tmp_path: Path, video_models: Models) -> list[object]:
    """Six questions: two about a clip that is broken, one about a clip that is not there."""
    torch.set_num_threads(1)
    (tmp_path / "clips").mkdir()
    for seed in range(2):
        write_clip(tmp_path / "clips" / f"{seed}.mp4", seed=seed, frames=8)
    (tmp_path / "clips" / "bad.mp4").write_bytes(b"no clip")
    entries = [entry("0.mp4", "1.avi"), entry("bad.mp4", "bad.mp4"), entry("gone.mp4", "1.mp4")]
    (tmp_path / "asked.json").write_text(json.dumps(entries))
    config = {
        "modality": "video",
        "model": {"path": str(video_models("llava_onevision")), "lora": {"rank": 2}},
        "video": {"num_frames": 4},
        "data": {"train": "none.jsonl"},
        "objective": {"name": "dpo"},
        "sample": {"max_new_tokens": 4},
        "train": {"batch_size": 2, "num_threads": 1},
        "output": str(tmp_path / "run"),
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    return [
        "predict", tmp_path / "config.yaml", "--base", "--benchmark", "videohallucer",
        "--questions", tmp_path / "asked.json", "--media", tmp_path / "clips",
    ]  # fmt: skip


@pytest.mark.runs
def test_predictions_are_a_common_file_also_after_an_interruption(
    command: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "whole.jsonl"
    said = run(*command, "--out", out)
    assert "6 questions answered" in said
    assert "3 of them have no answer" in said
    assert said.count("bad.mp4") == said.count("gone.mp4") == 1
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    texts = [line["prediction"] for line in lines]
    assert [text is None for text in texts] == [False, False, True, True, True, False]
    assert texts[1] == texts[5]  # one clip under two endings, one question
    assert lines[0]["id"] == "asked/0/basic"
    assert "3 questions have no answer" in run("score", out, "--benchmark", "videohallucer")

    plain, batches = answers.ask, list[int]()

    def stops(adapter: Any, questions: Sequence[Any], seeds: Sequence[int], **options: Any) -> Any:
        batches.append(len(questions))
        if len(batches) == 2:
            raise KeyboardInterrupt
        return plain(adapter, questions, seeds, **options)

    monkeypatch.setattr(answers, "ask", stops)
    parts = tmp_path / "parts.jsonl"
    assert "run it again to go on" in run(*command, "--out", parts, code=130)
    assert not parts.exists()
    assert "(config differs)" in run(*command, "sample.top_p=0.5", "--out", parts, code=1)
    said = run(*command, "--out", parts)
    assert "6 questions answered, of which 2 had been before" in said
    assert parts.read_bytes() == out.read_bytes()
    assert batches[:3] == [2, 2, 2]
    assert "already exists" in run(*command, "--out", parts, code=1)


@pytest.mark.slow
def test_a_drawn_prediction_is_the_same_in_every_batch(
    command: list[object], tmp_path: Path
) -> None:
    found: list[bytes] = []
    for size in (1, 2, 6):
        out = tmp_path / f"{size}.jsonl"
        run(*command, "sample.temperature=1", "--batch", size, "--out", out)
        found.append(out.read_bytes())
    assert found[0] == found[1] == found[2]
    lines = [json.loads(line) for line in found[0].decode().splitlines()]
    assert lines[1]["prediction"] != lines[5]["prediction"], "one clip, but two questions' draws"
    run(*command, "sample.temperature=1", "train.seed=1", "--out", tmp_path / "other.jsonl")
    assert (tmp_path / "other.jsonl").read_bytes() != found[0]


def test_what_cannot_be_asked_is_told_before_a_model_loads(
    command: list[object], tmp_path: Path
) -> None:
    out = ["--out", tmp_path / "x.jsonl"]
    twice = [*command, "--questions", tmp_path / "asked.json", *out]
    assert "'asked/0/basic' comes twice" in run(*twice, code=1)
    assert "has no --checkpoint" in run(*command, *out, "--checkpoint", tmp_path, code=1)
    assert "has neither a complete checkpoint" in run(
        *(part for part in command if part != "--base"), *out, code=1
    )
    (tmp_path / "clips" / "0.mp4").unlink()
    (tmp_path / "clips" / "1.mp4").unlink()
    (tmp_path / "clips" / "bad.mp4").unlink()
    assert "no question can be asked; the first: " in run(*command, *out, code=1)
    write_clip(tmp_path / "clips" / "0.mp4", frames=8)  # repaired: asked again
    assert "5 of them have no answer" in run(*command, *out)


@pytest.mark.parametrize("name", ["../clips/0.mp4", "/etc/passwd", "a/../../0.mp4"])
def test_a_question_file_names_clips_of_its_folder_alone(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must lie below"):
        find_clip(tmp_path, name)
