"""Data about clips and configurations of whole runs on tiny video models, written to files."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from mmalign import config as configs

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from mmalign.config import RunConfig

KIND_OF = {
    "qwen25vl": "qwen2_5_vl",
    "qwen3vl": "qwen3_vl",
    "llavaov": "llava_onevision",
    "qwen25omni": "qwen2_5_omni_thinker",
    "smolvlm2": "smolvlm",
}
"""What the name of a config ends in, to the tiny model of the same class."""

SUBJECTS = ("cat", "dog", "sun", "disc", "yeast", "bread", "bird", "man")


def row(number: int, kind: str = "pair") -> dict[str, Any]:
    """A record about clip `number`; the clips repeat after four.

    Args:
        number: From 0.
        kind: "pair"; "plain" with one response; "spans", a pair with the words that decide; "vista"
            with an answer to another clip; "counterfactual" with a corrupted clip.
    """
    subject = SUBJECTS[number % len(SUBJECTS)]
    good, bad = f"The {subject} plays in the sun.", f"The {subject} sleeps all day."
    record: dict[str, Any] = {
        "id": f"row-{number}",
        "video": f"clip{number % 4}.mp4",
        "prompt": f"What does the {subject} do after second {number}?",
    }
    if kind == "plain":
        return record | {"response": good}
    record |= {"chosen": good, "rejected": bad}
    if kind == "spans":
        start = good.index("plays")
        record |= {"spans_chosen": [[start, start + 16]], "spans_rejected": [[start, start + 14]]}
    if kind == "vista":
        record["rejected_irrelevant"] = "Yeast makes bubbles."
    if kind == "counterfactual":
        record["video_corrupted"] = f"clip{(number + 1) % 4}.mp4"
    return record


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """A JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in rows), encoding="utf-8")
    return path


def write_config(folder: Path, model: Path, train: Any, /, **sections: Any) -> Path:
    """Two steps of two pairs with a LoRA of rank 2 and no samples; the run is `folder/run`.

    Args:
        folder: Where the file goes.
        model: `model.path`.
        train: `data.train`.
        sections: Settings to change; a whole section replaces where it is not a mapping.
    """
    given: dict[str, Any] = {
        "modality": "video",
        "model": {"path": str(model), "lora": {"rank": 2, "alpha": 4}},
        "data": {"train": str(train) if hasattr(train, "parts") else train},
        "objective": {"name": "dpo"},
        "video": {"num_frames": 4},
        "train": {"num_steps": 2, "batch_size": 2, "lr": 1e-3, "num_threads": 1},
        "sample": {"num_prompts": 0, "max_new_tokens": 4},
        "output": str(folder / "run"),
    }
    for name, section in sections.items():
        both = isinstance(section, dict) and name != "objective"
        given[name] = {**given.get(name, {}), **section} if both else section
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(given, default=str), encoding="utf-8")
    return path


def configured(folder: Path, model: Path, train: Any, /, **sections: Any) -> RunConfig:
    """The same, loaded."""
    return configs.load(write_config(folder, model, train, **sections))


def shrunk(path: Path, model: Path, data: Path, clips: Path, folder: Path) -> RunConfig:
    """A shipped config with a tiny model and small frames in place of its own, all else as it is.

    Args:
        path: The config.
        model: Of the same class as its model.
        data: A file of its kind of records.
        clips: Where the paths in there start from.
        folder: The run is `folder/run`.
    """
    config = configs.load(path)
    sizes = ["video.num_frames=4"] if config.video.fps is None else ["video.max_frames=4"]
    if config.video.frame_pixels is not None:
        sizes.append("video.frame_pixels=3136")
    if config.video.clues is not None:
        sizes.append("video.clues.width=64")
    source = json.dumps({"path": str(data), "pictures": str(clips)})
    own = [f"model.path={model}", f"data.train={source}", f"output={folder / 'run'}"]
    return configs.load(path, [*own, *sizes, "train.num_threads=1", "train.batch_size=2"])
