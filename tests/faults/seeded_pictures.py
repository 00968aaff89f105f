"""Faults of runs on images: each changes a good run and returns what has to be said of it."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import tiny_pictures
from seeded import GoodRun, Row
from seeded_text import scale_a_tensor

if TYPE_CHECKING:
    import random
    from pathlib import Path


def good_run(folder: Path, model: Path, rng: random.Random) -> GoodRun:
    """Two steps of Diffusion-DPO with a LoRA on eight pairs."""
    config: dict[str, Any] = {
        "modality": "diffusion",
        "model": {"path": str(model), "lora": {"rank": 2, "alpha": 4}},
        "data": {"train": "data.jsonl"},
        "objective": {"name": "diffusion_dpo", "beta": 2000},
        "train": {"num_steps": 2, "batch_size": 2, "lr": 1e-5, "num_threads": 1},
        "diffusion": {"resolution": 32, "eval_draws": 1, "sampling": {"num_steps": 1}},
        "sample": {"num_prompts": 0},
        "output": "run",
    }
    return GoodRun(folder, config, [pair(folder, number) for number in range(8)], rng)


def pair(folder: Path, number: int) -> Row:
    names = [f"{number}-{side}.png" for side in ("good", "bad")]
    for side, name in enumerate(names):
        tiny_pictures.picture(folder, name, size=(32, 32), seed=2 * number + side)
    caption = tiny_pictures.caption(number)
    return {"prompt": caption, "image_chosen": names[0], "image_rejected": names[1]}


def rate_of_a_thousand_pairs(run: GoodRun) -> str:
    """The release's rate is of 2,048 pairs a step; here there are two."""
    del run.config["model"]["lora"]
    run.set("train.lr", run.rng.choice([2e-5, 1e-5]))
    return r"train\.lr is .* at 2 rows a step"


def beta_of_text(run: GoodRun) -> str:
    name = run.rng.choice(["diffusion_dpo", "dpo", "hinge"])
    run.config["objective"] = {"name": name, "beta": run.rng.choice([0.1, 0.5, 2.5])}
    return r"objective\.beta is .* below the lowest published"


def labels_that_contradict(run: GoodRun) -> str:
    run.rows = [_numbered(row) for row in run.rows]
    for row in run.some():
        row |= {"label": 1, "label_0": 1}
    return r"label.* against label"


def _numbered(row: Row) -> Row:
    images = {"image_0": row["image_chosen"], "image_1": row["image_rejected"]}
    return {"prompt": row["prompt"], **images, "label": 0}


def sides_that_scores_contradict(run: GoodRun) -> str:
    for row in run.some():
        row |= {"score_chosen": 0.1, "score_rejected": 0.2 + run.rng.random()}
    return r"score_chosen below score_rejected"


def pictures_that_are_not_there(run: GoodRun) -> str:
    (run.folder / run.rng.choice(run.rows)["image_chosen"]).unlink()
    return r"-good\.png"


def pictures_that_are_cut(run: GoodRun) -> str:
    file = run.folder / run.rng.choice(run.rows)["image_rejected"]
    data = file.read_bytes()
    file.write_bytes(data[: run.rng.randint(0, len(data) // 2)])
    return r"-bad\.png"


def no_captions(run: GoodRun) -> str:
    for row in run.some():
        row["prompt"] = run.rng.choice(["", " ", None])
    return r"prompt|caption"


def one_shape_beside_another(run: GoodRun) -> str:
    for number, row in enumerate(run.some()):
        name = f"wide-{number}.png"
        tiny_pictures.picture(run.folder, name, size=(32, 128), seed=number)
        row["image_rejected"] = name
    return r"aspect|cut off|area"


def ratings_of_one_kind(run: GoodRun) -> str:
    run.config["objective"] = {"name": "diffusion_kto", "beta": 1000}
    run.rows = [
        {"prompt": row["prompt"], "image": row["image_chosen"], "desirable": True}
        for row in run.rows
    ]
    return r"all 8 responses are desirable"


def latents_of_another_encoder(run: GoodRun) -> str:
    model, run.first = run.folder / "model", "cache"
    shutil.copytree(run.config["model"]["path"], model)
    run.config["model"]["path"] = "model"
    run.set("diffusion.cache", "on")
    (weights,) = (model / "vae").glob("*.safetensors")
    run.then = lambda: scale_a_tensor(weights, run.rng)
    return r"lacks .* mmalign cache"


def errors_of_another_size(run: GoodRun) -> str:
    run.first = "cache"
    run.config["reference"] = {"kind": "cached"}
    run.then = lambda: run.set("diffusion.resolution", 64)
    return r"mmalign cache"
