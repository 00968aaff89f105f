"""A run folder, read for the report; whatever an interrupted run left out is simply absent."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from mmalign.config import yaml
from mmalign.data.fields import left_out, read_lines
from mmalign.errors import ConfigError
from mmalign.safe import read_bytes

# What the page reads of a run folder, by type: anything else is left out, and counted.
#
# A run folder may come from a stranger, from another version, or from a disk that lost a part of
# it.

Shape = Callable[[Any, list[str]], Any]
"""The value as the page may use it, the names of what was left out added; raises `OddError`."""

_LARGEST = 2.0**53  # what a float counts exactly


class OddError(ValueError):
    """A value of another type than it must have."""


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) < 1e300 if isinstance(value, int) else math.isfinite(value)


def _number(value: Any, odd: list[str]) -> float:
    if not is_number(value):
        raise OddError
    return value


def _real(value: Any, odd: list[str]) -> float:
    """A number of a row, which may be no finite one."""
    if not is_number(value) and not isinstance(value, float):
        raise OddError
    return value


def _count(value: Any, odd: list[str]) -> int:
    if type(value) is not int or not 0 <= value <= _LARGEST:
        raise OddError
    return value


def _text(value: Any, odd: list[str]) -> str:
    if not isinstance(value, str):
        raise OddError
    return value


def _scalar(value: Any, odd: list[str]) -> Any:
    if not isinstance(value, str | int | float | bool | None):
        raise OddError
    return value


def _any(value: Any, odd: list[str]) -> Any:
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise OddError
    return cast("list[Any]", value)


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise OddError
    return cast("dict[str, Any]", value)


def _several(member: Shape) -> Shape:
    """A list, without the members that are odd."""

    def read(value: Any, odd: list[str]) -> list[Any]:
        found: list[Any] = []
        for item in _list(value):
            try:
                found.append(member(item, odd))
            except OddError:
                odd.append("a member of a list")
        return found

    return read


def _exactly(number: int, member: Shape) -> Shape:
    """A list of so many, all of which must fit."""

    def read(value: Any, odd: list[str]) -> list[Any]:
        if len(_list(value)) != number:
            raise OddError
        return [member(item, odd) for item in value]

    return read


def _either(*shapes: Shape) -> Shape:
    def read(value: Any, odd: list[str]) -> Any:
        for shape in shapes:
            try:
                return shape(value, odd)
            except OddError:
                continue
        raise OddError

    return read


def _keyed(
    known: Mapping[str, Shape],
    *,
    must: tuple[str, ...] = (),
    others: Shape = _any,
    keep_null: bool = False,
) -> Shape:
    """An object, without the members that are odd; null ones count as absent, or are kept."""

    def read(value: Any, odd: list[str]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, member in _object(value).items():
            if member is None:
                if keep_null:
                    found[name] = None
                continue
            try:
                found[name] = known.get(name, others)(member, odd)
            except OddError:
                odd.append(name)
        if any(name not in found for name in must):
            raise OddError
        return found

    return read


def _rows(value: Any, odd: list[str]) -> list[dict[str, Any]]:
    """Held-out rows, of which a table is made: all have the same columns of the same lengths."""
    rows = [_object(row) for row in _list(value)]
    columns = ("labels", "logps", "lengths", "ref_logps", "kl")
    first = rows[0] if rows else {}
    sizes = {name: len(_list(first[name])) for name in columns if name in first}
    if rows and not (
        {"labels", "logps", "lengths"} <= set(sizes) and len(set(sizes.values())) == 1
    ):
        raise OddError
    for row in rows:
        for name, size in sizes.items():
            _exactly(size, _real)(row.get(name), odd)
        if sizes["labels"] < 1:
            raise OddError
        if "loss" in first:
            _real(row.get("loss"), odd)
        _text(row.get("row", ""), odd)
        _scalar(row.get("id"), odd)
    return rows


_SOURCE = _either(_text, _keyed({"path": _text}, must=("path",)))

CONFIG = _keyed(
    {
        "modality": _text,
        "model": _keyed({"path": _text, "lora": _keyed({"rank": _scalar}, must=("rank",))}),
        "reference": _keyed({"kind": _text}),
        "data": _keyed(
            {
                "train": _either(_SOURCE, _several(_SOURCE)),
                "eval": _either(_SOURCE, _several(_SOURCE)),
                "eval_fraction": _number,
            }
        ),
        "objective": _keyed({"name": _text, "mix": _keyed({})}),
        "train": _keyed({"batch_size": _count, "accumulate": _count, "seed": _scalar}),
        "text": _keyed({"masks": _keyed({"kind": _text})}),
        "diffusion": _keyed({"logp_scale": _number}),
    }
)
"""`config.yaml`."""

ENV = _keyed(
    {"data": _keyed({"train_rows": _count, "eval_rows": _count, "notes": _several(_text)})}
)
"""`env.json`."""

METRICS = _keyed({"step": _count}, must=("step",), keep_null=True)
"""A line of `metrics.jsonl`; whether the others are numbers is asked for each curve, and null is
what was not finite."""

EVAL = _keyed(
    {
        "step": _count,
        "intervals": _keyed({}, others=_exactly(2, _number)),
        "rows": _rows,
    },
    must=("step",),
)
"""A line of `eval.jsonl`."""

_TURN = _keyed({"role": _scalar, "content": _scalar})
_MEDIUM = _keyed({"times": _several(_number), "tokens": _number})
_ANSWER = _keyed({"spans": _several(_exactly(2, _count))})
_CLIP = _keyed({"weight": _number, "role": _text})

SAMPLE = _keyed(
    {
        "step": _count,
        "prompt": _either(_text, _several(_TURN)),
        "media": _several(_MEDIUM),
        "answers": _several(_ANSWER),
        "altered": _several(_CLIP),
    },
    must=("step",),
)
"""A line of `samples.jsonl`."""


def fitting(shape: Shape, value: Any, file: str, problems: list[str]) -> Any:
    """The value as the page may use it, or None; what was left out becomes a problem."""
    odd: list[str] = []
    try:
        found = shape(value, odd)
    except OddError:
        problems.append(f"{file} holds something else than it should, and was left out")
        return None
    if odd:
        names = ", ".join(dict.fromkeys(name[:40] for name in odd[:20]))
        problems.append(
            f"{file}: {len(odd)} odd value{'s' if len(odd) > 1 else ''} left out: {names}"
        )
    return found


def fitting_lines(
    shape: Shape, records: list[dict[str, Any]], file: str, problems: list[str]
) -> list[dict[str, Any]]:
    """The same of all records of a file, in the order of their steps."""
    return sorted(
        fitting(_several(shape), records, file, problems) or [], key=lambda record: record["step"]
    )


# A run folder, read for the report; whatever an interrupted run left out is simply absent.

Record = dict[str, Any]
Scores = Literal["tokens", "errors"]
"""What candidates are scored by: log-probabilities of tokens, or denoising errors."""

_LARGEST_ENV = 64 * 2**20  # bytes of env.json


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
    def scores(self) -> Scores:
        """What stands for the log-probability of a candidate."""
        return "errors" if self.has_pictures else "tokens"

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
    config: Record = {}
    if (folder / "config.yaml").is_file():
        config = yaml.read(folder / "config.yaml")
        config = fitting(CONFIG, config, "config.yaml", problems) or {}
    env = _read_object(folder / "env.json", problems)
    return Run(
        folder=folder,
        config=config,
        env=fitting(ENV, env, "env.json", problems) or {},
        metrics=_read_lines(folder / "metrics.jsonl", METRICS, problems),
        evals=_read_lines(folder / "eval.jsonl", EVAL, problems),
        samples=_read_lines(folder / "samples.jsonl", SAMPLE, problems),
        problems=tuple(problems),
    )


def _read_object(path: Path, problems: list[str]) -> Record:
    if not path.is_file():
        return {}
    try:
        value = json.loads(read_bytes(path, _LARGEST_ENV))
    except (ValueError, OSError, RecursionError):  # JSONDecodeError and UnicodeDecodeError too
        problems.append(f"{path.name} is not readable JSON and was left out")
        return {}
    if not isinstance(value, dict):
        problems.append(f"{path.name} holds no object and was left out")
        return {}
    return cast("Record", value)


def _read_lines(path: Path, shape: Shape, problems: list[str]) -> list[Record]:
    """The records of a JSONL file; a run killed while writing leaves its last line torn."""
    records, odd = read_lines(path)
    if odd:
        problems.append(left_out(path, odd))
    return fitting_lines(shape, records, path.name, problems)


# What in a run's numbers a reader should look at first.

_NATS_PER_NAT = 5.0
"""Fall of the rejected answers per gain of the chosen ones from which a run is suspect."""


@dataclass(frozen=True, slots=True)
class Remark:
    """A sentence about a run; a warning where something went wrong."""

    text: str
    is_warning: bool = True


def remarks(run: Run) -> list[Remark]:
    """What went wrong or may mislead; empty for a run without anything to explain."""
    checks = [check for check, of in _CHECKS if of in (None, run.scores)]
    found = [remark for check in checks if (remark := check(run)) is not None]
    return found + [Remark(problem) for problem in run.problems]


def _unfinished(run: Run) -> Remark | None:
    if run.is_finished:
        return None
    if not run.metrics:
        return Remark("The run stopped before its first log line.")
    return Remark(
        f"The run stopped at step {run.last_step:,}, before its end. "
        "Go on with `mmalign train CONFIG --resume`."
    )


def _not_finite(run: Run) -> Remark | None:
    bad = [r.get("step") for r in run.metrics if "loss" in r and not is_number(r["loss"])]
    return Remark(f"The loss was not finite at step {bad[0]}.") if bad else None


def _chosen_falls(run: Run) -> Remark | None:
    for good, bad in (("chosen", "rejected"), ("desirable", "undesirable")):
        gain, other = _last(run, f"drift/{good}"), _last(run, f"drift/{bad}")
        if gain is not None and gain < 0:
            beside = f" (the {bad} ones: {other:+.1f})" if other is not None else ""
            return Remark(
                f"The {good} answers became less likely than under the reference: held out they "
                f"lost {-gain:.1f} nats{beside}. Then a growing margin says little about better "
                "answers. A larger beta, a smaller learning rate or an NLL term on the "
                f"{good} answer holds them up."
            )
    return None


def _loss_rises(run: Run) -> Remark | None:
    _, values = run.series("loss", held_out=True)
    if len(values) < 2 or values[-1] <= values[0]:
        return None
    return Remark(
        f"The held-out loss rose from {values[0]:.3f} to {values[-1]:.3f}: what was learned does "
        "not carry over to new rows. Try a smaller learning rate, fewer steps or a larger beta."
    )


def _coin(run: Run) -> Remark | None:
    accuracy = _last(run, "reward_accuracy")
    interval = (run.evals[-1].get("intervals") or {}).get("reward_accuracy") if run.evals else None
    if accuracy is None or interval is None or not interval[0] <= 0.5 <= interval[1]:
        return None
    if run.evals[-1].get("step") == 0:  # nothing was trained yet
        return None
    return Remark(
        f"Held out, reward accuracy is {accuracy:.0%} ({interval[0]:.0%} to {interval[1]:.0%}), "
        "which a coin would reach: these rows show no effect of the training."
    )


def _preferred_explained_worse(run: Run) -> Remark | None:
    key, where = "errors/chosen_diff", "held out"
    value = _last(run, key)
    if value is None:  # no held-out rows: the mean of the last tenth of the log lines
        _, values = run.series(key)
        last = values[-max(1, len(values) // 10) :]
        value, where = (sum(last) / len(last) if last else None), "in training"
    if value is None or value <= 0:
        return None
    return Remark(
        "The model now explains the preferred images worse than the reference does: "
        f"{where}, its denoising error on them is {value:.2g} higher. Images lose quality soon "
        "after this, while implicit accuracy stays high. Fewer steps, a smaller learning rate or a "
        "larger beta prevent it."
    )


def _rejected_dominates(run: Run) -> Remark | None:
    chosen, rejected = _last(run, "drift/chosen"), _last(run, "drift/rejected")
    if chosen is None or rejected is None or chosen <= 0 or -rejected < _NATS_PER_NAT * chosen:
        return None
    return Remark(
        f"Held out, the rejected answers fell {-rejected / chosen:.1f} nats for every nat that the "
        "chosen ones gained. Runs that collapsed looked like this; read the completions."
    )


def _accuracies_disagree(run: Run) -> Remark | None:
    reward, ranking = _last(run, "reward_accuracy"), _last(run, "ranking_accuracy")
    if reward is None or ranking is None or reward - ranking < 0.15:
        return None
    return Remark(
        f"Reward accuracy is {reward:.0%}, ranking accuracy only {ranking:.0%}: in most pairs the "
        "gap moved the right way, in fewer it changed sign. The second tells what it prefers.",
        is_warning=False,
    )


def _accuracy_is_spent(run: Run) -> Remark | None:
    _, values = run.series("rewards/accuracies")
    last = values[-max(1, len(values) // 10) :]
    if len(values) < 5 or sum(last) < 0.999 * len(last):
        return None
    shown = "images" if run.has_pictures else "completions"
    return Remark(
        "Training reward accuracy is 100 %, so it can tell nothing more: good and ruined runs both "
        f"reach it. Judge by the {shown} and the held-out numbers.",
        is_warning=False,
    )


def _last(run: Run, key: str) -> float | None:
    _, values = run.series(key, held_out=True)
    return values[-1] if values else None


_CHECKS: tuple[tuple[Callable[[Run], Remark | None], Scores | None], ...] = (
    (_unfinished, None),
    (_not_finite, None),
    (_preferred_explained_worse, "errors"),
    (_loss_rises, None),
    (_coin, None),
    (_chosen_falls, "tokens"),
    (_rejected_dominates, "tokens"),
    (_accuracies_disagree, "tokens"),
    (_accuracy_is_spent, None),
)
"""What is looked at in this order, and in which runs; None: in all."""
