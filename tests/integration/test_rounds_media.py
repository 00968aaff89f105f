"""The same command for images and for clips: judged by ink, and by a yes or no."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mmalign import config as configs
from mmalign.config import RunConfig
from mmalign.rounds import engine

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "rounds"


def run(path: Path, folder: Path, **changed: Any) -> Path:
    """Run the rounds of a config with other sections or settings; its folder."""
    whole = configs.load(path).model_dump(exclude_defaults=True)
    shutil.copy(CONFIGS / "rules.py", folder / "rules.py")
    for key, value in changed.items():
        section, _, name = key.partition("__")
        whole[section] = whole[section] | {name: value} if name else value
    whole["output"] = str(folder / "rounds")
    config = RunConfig.model_validate(whole)
    engine.run(config, where=str(folder / "c.yaml"), say=lambda line: None)
    return config.output


def first(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text().split("\n")[0])


@pytest.mark.runs
@pytest.mark.parametrize("lora", [False, True])
def test_digits_of_two_rounds(lora: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All weights, and a LoRA with momentum."""
    monkeypatch.chdir(ROOT)
    more = {"between": {"kind": "momentum", "alpha": 0.3}} if lora else {}
    output = run(
        CONFIGS / "iterative_dpo_digits.yaml",
        tmp_path,
        model={"path": "mmalign/quickstart/digits_model"}
        | ({"lora": {"rank": 4, "alpha": 8}} if lora else {}),
        data__max_samples=12,
        data__max_eval_samples=6,
        diffusion__sampling={"num_steps": 3, "guidance": 2.0, "sampler": "ddim"},
        rounds={
            "num": 2, "prompts": {"how": "all"}, "generate": {"num": 3},
            "judge": [{"rule": "rules:ink"}], **more,
        },
    )  # fmt: skip
    measured = json.loads((output / "round-02" / "measured.json").read_text())
    assert "kl" not in measured
    assert "log_ratio" in measured
    held = output / "round-02" / "held_out"
    images = first(held / "candidates.jsonl")["images"]
    assert len(images) == 3  # its own, the last round's, the base's
    assert all((held / name).is_file() for name in images)
    pair = first(output / "round-02" / "pairs.jsonl")
    assert pair["image_chosen"] != pair["image_rejected"]
    from mmalign.report import write_report

    assert "The same prompts and noise" in write_report([output], tmp_path / "p.html").read_text()


@pytest.mark.runs
def test_clips_of_two_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmalign.quickstart import clips, video_pairs

    monkeypatch.chdir(ROOT)
    folder = tmp_path / "clips"
    drawn = clips.make(folder, 16, 0)
    train = video_pairs.write(folder / "pairs.jsonl", drawn[:12], 0)
    held = video_pairs.write(folder / "held_out.jsonl", drawn[12:], 0)
    output = run(
        CONFIGS / "iterative_dpo_clips.yaml",
        tmp_path,
        data={"train": [{"path": str(train)}], "eval": [{"path": str(held)}]},
        rounds={
            "num": 2, "prompts": {"per_round": 12}, "generate": {"num": 4, "max_new_tokens": 12},
            "judge": [{"rule": "rules:first_word"}], "select": {"cut": "wins"},
        },
    )  # fmt: skip
    measured = json.loads((output / "round-02" / "measured.json").read_text())
    assert measured["kl"]["mean"] > 0
    pair = first(output / "round-02" / "pairs.jsonl")
    assert (output / "round-02" / pair["video"]).is_file()
