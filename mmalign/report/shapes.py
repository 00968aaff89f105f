"""What the page reads of a run folder, by type: anything else is left out, and counted.

A run folder may come from a stranger, from another version, or from a disk that lost a part of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

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
