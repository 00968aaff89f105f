"""Faults of runs on clips: each changes a good run and returns what has to be said of it."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from seeded import GoodRun
from video_runs import row

if TYPE_CHECKING:
    import random
    from pathlib import Path


def good_run(folder: Path, model: Path, clips: Path, rng: random.Random) -> GoodRun:
    """Two steps of DPO with a LoRA on eight questions about four clips."""
    config: dict[str, Any] = {
        "modality": "video",
        "model": {"path": str(model), "lora": {"rank": 2, "alpha": 4}},
        "data": {"train": "data.jsonl"},
        "objective": {"name": "dpo", "beta": 0.1},
        "video": {"num_frames": 4},
        "train": {"num_steps": 2, "batch_size": 2, "lr": 1e-5, "num_threads": 1},
        "sample": {"num_prompts": 0},
        "output": "run",
    }
    for file in clips.glob("*.mp4"):
        shutil.copy(file, folder)
    return GoodRun(folder, config, [row(number) for number in range(8)], rng)


def prompts_cut_into_media(run: GoodRun) -> str:
    run.set("data.max_prompt_length", run.rng.randint(2, 8))
    return r"max_prompt_length"


def sound_for_a_deaf_model(run: GoodRun) -> str:
    for record in run.some():
        record["audio"] = "clip1.mp4"
    return r"audio|sound"


def clips_that_are_not_there(run: GoodRun) -> str:
    run.rng.choice(run.rows)["video"] = "nowhere.mp4"
    return r"nowhere\.mp4"


def clips_that_are_cut(run: GoodRun) -> str:
    file = run.folder / "clip1.mp4"
    data = file.read_bytes()
    file.write_bytes(data[: run.rng.randint(0, len(data) // 4)])
    return r"clip1\.mp4"


def segments_after_the_end(run: GoodRun) -> str:
    record = run.rng.choice(run.rows)
    record["video"] = {"path": "clip0.mp4", "start": 50 + run.rng.random(), "end": 60}
    return r"clip0\.mp4"


def tokens_of_media_in_answers(run: GoodRun) -> str:
    for record in run.some():
        record["chosen"] += run.rng.choice([" <|video_pad|>", "<|vision_start|>"])
    return r"own tokens for media|special token"


def nothing_to_train(run: GoodRun) -> str:
    run.set("video.train", [])
    return r"video\.train is empty"


def held_out_clips_are_trained_on(run: GoodRun) -> str:
    run.held_out = [{**row(1), "id": "held", "prompt": "And before that?"}]
    return r"also trained on"
