"""The scorers of images as judges, on a tiny PickScore."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_scorers import picture, write_pickscore

from mmalign.config.judges import parse_judges
from mmalign.diffusion.scorers import load_scorer
from mmalign.errors import DataError
from mmalign.judging.base import Drawn
from mmalign.judging.build import build
from mmalign.judging.score import score_file


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rewards_are_the_published_score(tmp_path: Path) -> None:
    weights = write_pickscore(tmp_path / "weights")
    for k in range(3):
        picture(k).save(tmp_path / f"{k}.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    rows = [
        {"id": "a", "prompt": "a b", "images": ["0.png", "1.png", "0.png"]},
        {"id": "b", "prompt": "c", "images": ["2.png", "broken.png"]},
        {"id": "p", "prompt": "d", "image_chosen": "1.png", "image_rejected": "2.png"},
    ]
    judge = build(parse_judges([f"scorer:pickscore={weights}"]))
    out = tmp_path / "out.jsonl"
    result = score_file(write(tmp_path / "in.jsonl", rows), out, judge)
    first, second, pair = read(out)
    scorer = load_scorer("pickscore", weights, "cpu", torch.float32)
    images = [Image.open(tmp_path / f"{k}.png").convert("RGB") for k in range(3)]
    own = scorer(images[:2], ["a b"] * 2).tolist()
    assert first["rewards"]["pickscore"] == pytest.approx([*own, own[0]], rel=1e-4)
    assert second["scores"] == [None, None]
    assert "broken.png" in result.lost["b"]
    assert (pair["images"], pair["human"]) == (["1.png", "2.png"], [1.0, 0.0])
    assert pair["scores"] == pytest.approx(scorer(images[1:], ["d"] * 2).tolist(), rel=1e-4)
    with pytest.raises(DataError, match="its responses are texts"):
        judge([Drawn("t", "p", responses=("x", "y"))])
    (tmp_path / "sub").mkdir()
    with pytest.raises(DataError, match="must lie in"):
        score_file(tmp_path / "in.jsonl", tmp_path / "sub/out.jsonl", judge)
