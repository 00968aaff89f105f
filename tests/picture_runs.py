"""Configurations of whole runs on tiny pipelines, written to a file."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import tiny_pictures

from mmalign import config as configs

if TYPE_CHECKING:
    from pathlib import Path

    from mmalign.config import RunConfig

Data = dict[str, "Path"]


def write_data(folder: Path, *kinds: str, num: int = 4, side: int = 32) -> Data:
    """Data sets of the kinds that `tiny_pictures` has, each in a folder of its own."""
    files: Data = {}
    for kind in kinds:
        (folder / kind).mkdir(parents=True)
        files[kind] = getattr(tiny_pictures, kind)(folder / kind, num, size=(side, side))
    return files


def write_config(folder: Path, pipeline: Path, train: Any, /, **sections: Any) -> Path:
    """Two steps of two pairs, with a LoRA of rank 2 and no samples; the run is `folder/run`.

    Args:
        folder: Where the file goes.
        pipeline: `model.path`.
        train: `data.train`.
        sections: Settings to change; a whole section replaces where it is not a mapping.
    """
    given: dict[str, Any] = {
        "modality": "diffusion",
        "model": {"path": str(pipeline), "lora": {"rank": 2, "alpha": 4}},
        "data": {"train": str(train) if hasattr(train, "parts") else train},
        "objective": {"name": "diffusion_dpo", "beta": 2000},
        "train": {"num_steps": 2, "batch_size": 2, "lr": 1e-3, "num_threads": 1},
        "diffusion": {"resolution": 32, "eval_draws": 1, "sampling": {"num_steps": 1}},
        "sample": {"num_prompts": 0},
        "output": str(folder / "run"),
    }
    for name, section in sections.items():
        both = isinstance(section, dict) and name != "objective"
        given[name] = {**given.get(name, {}), **section} if both else section
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(given, default=str), encoding="utf-8")
    return path


def configured(folder: Path, pipeline: Path, train: Any, /, **sections: Any) -> RunConfig:
    """The same, loaded."""
    return configs.load(write_config(folder, pipeline, train, **sections))
