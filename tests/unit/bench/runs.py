"""Hand-made files of benchmarks, and how tests score them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmalign.bench import Score, find, read_files, score


def write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(item) + "\n" for item in value), encoding="utf-8")
    else:
        path.write_text(json.dumps(value), encoding="utf-8")
    return path


def scored(
    name: str, file: Path, *more: Path, questions: Path | None = None, legacy: bool = False
) -> Score:
    kind = find(name)
    rows = read_files(kind, [file, *more], [questions] if questions else [])
    return score(kind, rows, legacy=legacy, num_resamples=50)


def both(name: str, file: Path, metric: str, questions: Path | None = None) -> tuple[float, float]:
    """A metric read strictly and as the published code reads it."""
    found = [scored(name, file, questions=questions, legacy=legacy) for legacy in (False, True)]
    return found[0].metrics[metric], found[1].metrics[metric]


def videohallucer_pair(category: str, basic: str | None, made_up: str | None) -> dict[str, Any]:
    sides = {"basic": ("yes", basic), "hallucination": ("no", made_up)}
    entry: dict[str, Any] = {"category": category}
    for side, (answer, predict) in sides.items():
        entry[side] = {"video": "v.mp4", "question": "Is it so?", "answer": answer}
        if predict is not None:
            entry[side]["predict"] = predict
    return entry


VIDEOHALLUCER = [
    videohallucer_pair("obj_rel", "Yes.", "No."),
    videohallucer_pair("obj_rel", "Yes, it is.", "Yes, it is."),
    videohallucer_pair("obj_rel", "No.", "no"),
    videohallucer_pair("temporal", "Yes or no: yes.", "Yes and no."),
]
