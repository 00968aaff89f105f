"""A run folder, read for the report, and what in it a reader should look at first.

A run folder may come from a stranger, from another version, or from a disk that lost a part of it:
what an interrupted run left out is simply absent, and a value of another type than it must have is
left out and counted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal

from mmalign.config import yaml
from mmalign.data.fields import left_out, read_lines
from mmalign.errors import ConfigError
from mmalign.safe import read_bytes

Record = dict[str, Any]
Scores = Literal["tokens", "errors"]
"""What candidates are scored by: log-probabilities of tokens, or denoising errors."""

_LARGEST = 2.0**53  # what a float counts exactly
_LARGEST_ENV = 64 * 2**20  # bytes of env.json


class OddError(ValueError):
    """A value of another type than it must have."""


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) < 1e300 if isinstance(value, int) else math.isfinite(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST


def _are_rows(value: Any) -> bool:
    """Held-out rows, of which a table is made: all have the same columns of the same lengths."""
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        return False
    if not value:
        return True
    columns = ("labels", "logps", "lengths", "ref_logps", "kl")
    first = value[0]
    names = [name for name in columns if name in first]
    labels = first.get("labels")
    size = len(labels) if isinstance(labels, list) else 0

    def fits(row: Record) -> bool:
        lists = [row.get(name) for name in names]
        return (
            all(isinstance(x, list) and len(x) == size and all(map(_is_real, x)) for x in lists)
            and ("loss" not in first or _is_real(row.get("loss")))
            and isinstance(row.get("row", ""), str)
            and isinstance(row.get("id"), _SCALAR)
        )

    return size > 0 and {"logps", "lengths"} <= set(names) and all(map(fits, value))


def _is_real(value: Any) -> bool:
    """Whether a value of a row is a number, which may be no finite one."""
    return is_number(value) or isinstance(value, float)


@dataclass(frozen=True, slots=True)
class _Object:
    """The shape of an object: of members by name, which it must have, and of those not named."""

    members: Mapping[str, Any]
    must: tuple[str, ...] = ()
    others: Any = object
    keeps_null: bool = False  # else a null member counts as absent


@dataclass(frozen=True, slots=True)
class _Either:
    shapes: tuple[Any, ...]


_SCALAR = str | int | float | bool | None
_SOURCE = _Either((str, _Object({"path": str}, must=("path",))))
_SOURCES = _Either((_SOURCE, [_SOURCE]))

CONFIG = _Object(
    {
        "modality": str,
        "model": _Object({"path": str, "lora": _Object({"rank": _SCALAR}, must=("rank",))}),
        "reference": _Object({"kind": str}),
        "data": _Object({"train": _SOURCES, "eval": _SOURCES, "eval_fraction": is_number}),
        "objective": _Object({"name": str, "mix": _Object({})}),
        "train": _Object({"batch_size": _is_count, "accumulate": _is_count, "seed": _SCALAR}),
        "text": _Object({"masks": _Object({"kind": str})}),
        "diffusion": _Object({"logp_scale": is_number}),
    }
)
"""`config.yaml`."""

ENV = _Object({"data": _Object({"train_rows": _is_count, "eval_rows": _is_count, "notes": [str]})})
"""`env.json`."""

METRICS = _Object({"step": _is_count}, must=("step",), keeps_null=True)
"""A line of `metrics.jsonl`; whether the others are numbers is asked for each curve, and null is
what was not finite."""

EVAL = _Object(
    {
        "step": _is_count,
        "intervals": _Object({}, others=(is_number, is_number)),
        "rows": _are_rows,
    },
    must=("step",),
)
"""A line of `eval.jsonl`."""

SAMPLE = _Object(
    {
        "step": _is_count,
        "prompt": _Either((str, [_Object({"role": _SCALAR, "content": _SCALAR})])),
        "media": [_Object({"times": [is_number], "tokens": is_number})],
        "answers": [_Object({"spans": [(_is_count, _is_count)]})],
        "altered": [_Object({"weight": is_number, "role": str})],
    },
    must=("step",),
)
"""A line of `samples.jsonl`."""


def _fit(shape: Any, value: Any, odd: list[str]) -> Any:
    """A value without what does not fit, the names of which are added to `odd`.

    Args:
        shape: A type; a predicate; `[shape]` for a list of any length; `(shape, shape)` for one of
            two; an `_Object`; or an `_Either`.
        value: What JSON or YAML gave.
        odd: Names of the members that were left out.

    Raises:
        OddError: The value as a whole does not fit.
    """
    if isinstance(shape, _Either):
        for one in shape.shapes:
            with suppress(OddError):
                return _fit(one, value, odd)
        raise OddError
    if isinstance(shape, _Object) and isinstance(value, dict):
        found: Record = {}
        for name, member in value.items():
            try:
                if member is not None:
                    found[name] = _fit(shape.members.get(name, shape.others), member, odd)
                elif shape.keeps_null:
                    found[name] = None
            except OddError:
                odd.append(name)
        if found.keys() >= set(shape.must):
            return found
    elif isinstance(shape, list) and isinstance(value, list):
        members: list[Any] = []
        for item in value:
            try:
                members.append(_fit(shape[0], item, odd))
            except OddError:
                odd.append("a member of a list")
        return members
    elif isinstance(shape, tuple) and isinstance(value, list) and len(value) == len(shape):
        return [_fit(one, item, odd) for one, item in zip(shape, value, strict=True)]
    elif isinstance(shape, type | UnionType):
        if isinstance(value, shape):
            return value
    elif callable(shape) and shape(value):
        return value
    raise OddError


def _fitting(shape: Any, value: Any, file: str, problems: list[str]) -> Any:
    """The value as the page may use it, or None; what was left out becomes a problem."""
    odd: list[str] = []
    try:
        found = _fit(shape, value, odd)
    except OddError:
        problems.append(f"{file} holds something else than it should, and was left out")
        return None
    if odd:
        names = ", ".join(dict.fromkeys(name[:40] for name in odd[:20]))
        problems.append(
            f"{file}: {len(odd)} odd value{'s' if len(odd) > 1 else ''} left out: {names}"
        )
    return found


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
        """Whether candidates are images, so that scores are denoising errors."""
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
        """The last optimizer step that left a log line."""
        return int(self.metrics[-1].get("step", 0)) if self.metrics else 0

    def series(self, key: str, *, held_out: bool = False) -> tuple[list[float], list[float]]:
        """Steps and values of one metric; values that are missing or not finite are left out."""
        pairs = [
            (float(record["step"]), float(record[key]))
            for record in (self.evals if held_out else self.metrics)
            if "step" in record and is_number(record.get(key))
        ]
        return [step for step, _ in pairs], [value for _, value in pairs]

    def last(self, key: str) -> float | None:
        """A metric's value at the last evaluation that has it."""
        _, values = self.series(key, held_out=True)
        return values[-1] if values else None


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
            f"{folder}: has neither config.yaml nor metrics.jsonl, so it is not a run folder"
        )
    problems: list[str] = []
    config = yaml.read(folder / "config.yaml") if (folder / "config.yaml").is_file() else {}
    return Run(
        folder=folder,
        config=_fitting(CONFIG, config, "config.yaml", problems) or {},
        env=_read_env(folder / "env.json", problems),
        metrics=_read_lines(folder / "metrics.jsonl", METRICS, problems),
        evals=_read_lines(folder / "eval.jsonl", EVAL, problems),
        samples=_read_lines(folder / "samples.jsonl", SAMPLE, problems),
        problems=tuple(problems),
    )


def _read_env(path: Path, problems: list[str]) -> Record:
    if not path.is_file():
        return {}
    try:
        value = json.loads(read_bytes(path, _LARGEST_ENV))
    except (ValueError, OSError, RecursionError):  # JSONDecodeError and UnicodeDecodeError too
        problems.append(f"{path.name} is not readable JSON and was left out")
        return {}
    return _fitting(ENV, value, path.name, problems) or {}


def _read_lines(path: Path, shape: _Object, problems: list[str]) -> list[Record]:
    """The records of a JSONL file by step; a run killed while writing leaves its last line torn."""
    records, odd = read_lines(path)
    if odd:
        problems.append(left_out(path, odd))
    found = _fitting([shape], records, path.name, problems)
    return sorted(found, key=lambda record: record["step"])


_LOST_PER_GAINED = 5.0
"""Nats that the rejected answers lose for one that the chosen ones gain: suspect from here on."""


@dataclass(frozen=True, slots=True)
class Remark:
    """A sentence about a run; a warning where something went wrong."""

    text: str
    is_warning: bool = True


def remarks(run: Run) -> list[Remark]:
    """What went wrong or may mislead; empty for a run without anything to explain."""
    if run.has_pictures:
        parts = [_on_progress, _on_images, _on_held_out, _on_training]
    else:
        parts = [_on_progress, _on_held_out, _on_answers, _on_training]
    found = [remark for part in parts for remark in part(run)]
    return found + [Remark(problem) for problem in run.problems]


def _on_progress(run: Run) -> Iterator[Remark]:
    if not run.is_finished and not run.metrics:
        yield Remark("The run stopped before its first log line.")
    elif not run.is_finished:
        yield Remark(
            f"The run stopped at step {run.last_step:,}, before its end. "
            "Go on with `mmalign train CONFIG --resume`."
        )
    bad = [r.get("step") for r in run.metrics if "loss" in r and not is_number(r["loss"])]
    if bad:
        yield Remark(f"The loss was not finite at step {bad[0]}.")


def _on_images(run: Run) -> Iterator[Remark]:
    value, where = run.last("errors/chosen_diff"), "held out"
    if value is None:  # no held-out rows
        last = _last_tenth(run, "errors/chosen_diff")
        value, where = (sum(last) / len(last) if last else 0.0), "in training"
    if value > 0:
        yield Remark(
            "The model now explains the preferred images worse than the reference does: "
            f"{where}, its denoising error on them is {value:.2g} higher. Images lose quality soon "
            "after this, while implicit accuracy stays high. Fewer steps, a smaller learning rate "
            "or a larger beta prevent it."
        )


def _on_held_out(run: Run) -> Iterator[Remark]:
    _, losses = run.series("loss", held_out=True)
    if len(losses) > 1 and losses[-1] > losses[0]:
        yield Remark(
            f"The held-out loss rose from {losses[0]:.3f} to {losses[-1]:.3f}: what was learned "
            "does not carry over to new rows. Try a smaller learning rate, fewer steps or a larger "
            "beta."
        )
    accuracy = run.last("reward_accuracy")
    if accuracy is None or run.evals[-1].get("step") == 0:  # nothing was trained yet
        return
    interval = (run.evals[-1].get("intervals") or {}).get("reward_accuracy")
    if interval and interval[0] <= 0.5 <= interval[1]:
        yield Remark(
            f"Held out, reward accuracy is {accuracy:.0%} ({interval[0]:.0%} to "
            f"{interval[1]:.0%}), which a coin would reach: these rows show no effect of the "
            "training."
        )


def _on_answers(run: Run) -> Iterator[Remark]:
    for good, bad in (("chosen", "rejected"), ("desirable", "undesirable")):
        gain, other = run.last(f"drift/{good}"), run.last(f"drift/{bad}")
        if gain is not None and gain < 0:
            beside = f" (the {bad} ones: {other:+.1f})" if other is not None else ""
            yield Remark(
                f"The {good} answers became less likely than under the reference: held out they "
                f"lost {-gain:.1f} nats{beside}. Then a growing margin says little about better "
                "answers. A larger beta, a smaller learning rate or an NLL term on the "
                f"{good} answer holds them up."
            )
            break
    gain, fall = run.last("drift/chosen") or 0.0, -(run.last("drift/rejected") or 0.0)
    if gain > 0 and fall >= _LOST_PER_GAINED * gain:
        yield Remark(
            f"Held out, the rejected answers fell {fall / gain:.1f} nats for every nat that the "
            "chosen ones gained. Runs that collapsed looked like this; read the completions."
        )
    reward, ranking = run.last("reward_accuracy"), run.last("ranking_accuracy")
    if reward is not None and ranking is not None and reward - ranking >= 0.15:
        yield Remark(
            f"Reward accuracy is {reward:.0%}, ranking accuracy only {ranking:.0%}: in most pairs "
            "the gap moved the right way, in fewer it changed sign. The second tells what it "
            "prefers.",
            is_warning=False,
        )


def _on_training(run: Run) -> Iterator[Remark]:
    last = _last_tenth(run, "rewards/accuracies")
    if len(run.series("rewards/accuracies")[1]) >= 5 and sum(last) >= 0.999 * len(last):
        shown = "images" if run.has_pictures else "completions"
        yield Remark(
            "Training reward accuracy is 100 %, so it can tell nothing more: good and ruined runs "
            f"both reach it. Judge by the {shown} and the held-out numbers.",
            is_warning=False,
        )


def _last_tenth(run: Run, key: str) -> list[float]:
    """A metric in the last tenth of the log lines, one at least."""
    _, values = run.series(key)
    return values[-max(1, len(values) // 10) :]
