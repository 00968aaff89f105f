"""A run folder, read for the report; whatever an interrupted run left out is simply absent."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from mmalign.config import yaml
from mmalign.data.fields import left_out, read_lines
from mmalign.errors import ConfigError
from mmalign.report import shapes
from mmalign.report.shapes import is_number
from mmalign.safe import read_bytes

Record = dict[str, Any]
_LARGEST = 64 * 2**20  # bytes of env.json


@dataclass(frozen=True)
class Run:
    """What a run folder says."""

    folder: Path
    config: Record
    env: Record
    metrics: list[Record]  # training log lines, in order of the step
    evals: list[Record]  # held-out evaluations, in order of the step
    samples: list[Record]
    problems: tuple[str, ...]  # files that could only be read in part

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    @property
    def has_pictures(self) -> bool:
        """Whether candidates are pictures, so that scores are denoising errors."""
        return self.config.get("modality") == "diffusion"

    @property
    def has_media(self) -> bool:
        """Whether questions show or play something, of which there are sheets."""
        return self.config.get("modality") == "video"

    @property
    def is_finished(self) -> bool:
        """Whether the trained weights were saved at the end."""
        return (self.folder / "final").is_dir()

    @property
    def last_step(self) -> int:
        """The last optimiser step that left a log line."""
        return int(self.metrics[-1].get("step", 0)) if self.metrics else 0

    def series(self, key: str, *, held_out: bool = False) -> tuple[list[float], list[float]]:
        """Steps and values of one metric; values that are missing or not finite are left out."""
        pairs = [
            (float(record["step"]), float(record[key]))
            for record in (self.evals if held_out else self.metrics)
            if "step" in record and is_number(record.get(key))
        ]
        return [step for step, _ in pairs], [value for _, value in pairs]


def read_run(folder: str | Path) -> Run:
    """Read a run folder.

    Raises:
        ConfigError: The folder is missing or holds no run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: there is no such folder; give the `output` of a run")
    if not any((folder / name).is_file() for name in ("config.yaml", "metrics.jsonl")):
        raise ConfigError(
            f"{folder}: has neither config.yaml nor metrics.jsonl, so it is no run folder"
        )
    problems: list[str] = []
    config: Record = {}
    if (folder / "config.yaml").is_file():
        config = yaml.read(folder / "config.yaml")
        config = shapes.fitting(shapes.CONFIG, config, "config.yaml", problems) or {}
    env = _read_object(folder / "env.json", problems)
    return Run(
        folder=folder,
        config=config,
        env=shapes.fitting(shapes.ENV, env, "env.json", problems) or {},
        metrics=_read_lines(folder / "metrics.jsonl", shapes.METRICS, problems),
        evals=_read_lines(folder / "eval.jsonl", shapes.EVAL, problems),
        samples=_read_lines(folder / "samples.jsonl", shapes.SAMPLE, problems),
        problems=tuple(problems),
    )


def _read_object(path: Path, problems: list[str]) -> Record:
    if not path.is_file():
        return {}
    try:
        value = json.loads(read_bytes(path, _LARGEST))
    except (ValueError, OSError, RecursionError):  # JSONDecodeError and UnicodeDecodeError too
        problems.append(f"{path.name} is not readable JSON and was left out")
        return {}
    if not isinstance(value, dict):
        problems.append(f"{path.name} holds no object and was left out")
        return {}
    return cast("Record", value)


def _read_lines(path: Path, shape: shapes.Shape, problems: list[str]) -> list[Record]:
    """The records of a JSONL file; a run killed while writing leaves its last line torn."""
    records, odd = read_lines(path)
    if odd:
        problems.append(left_out(path, odd))
    return shapes.fitting_lines(shape, records, path.name, problems)
