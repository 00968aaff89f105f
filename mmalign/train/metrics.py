"""What a run writes down: JSON lines and running averages."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign.data.fields import left_out, read_lines
from mmalign.safe import replacing

log = logging.getLogger(__name__)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested sections as (dotted key, value)."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def append_json(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Append one JSON line a record, all in one write, so a line is never torn by another writer.

    A value that is not finite becomes null: `NaN` is not JSON.
    """
    text = "".join(json.dumps(_plain(record), ensure_ascii=False) + "\n" for record in records)
    data = text.encode()
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            while data:  # a full disk takes a part, and refuses when asked to take the rest
                data = data[file.write(data) :]
        except OSError:
            file.truncate(before)
            raise


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def read_json(path: Path) -> list[dict[str, Any]]:
    """The records of a file written by `append_json`; lines that hold none are left out."""
    return read_lines(path)[0]


def keep_until(path: Path, step: int) -> None:
    """Drop the lines after `step`, which a run that resumes there will write again.

    Those that hold no record go too, and are counted.
    """
    if not path.exists():
        return
    records, odd = read_lines(path)
    if odd:
        log.warning("%s", left_out(path, odd))
    with replacing(path) as temporary:
        append_json(temporary, [record for record in records if record["step"] <= step])


def last_values(path: Path) -> dict[str, float]:
    """The last value of every metric of a file."""
    values: dict[str, float] = {}
    for record in read_json(path):
        values |= record
    return values


class Averages:
    """Running means since the last log line; nothing is copied off the device before it is read.

    A metric that is nan in one micro-batch (no undesirable row in it) does not count there.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def add(self, metrics: Mapping[str, Tensor | float], share: float = 1.0) -> None:
        """Count one micro-batch's or one step's metrics in, or those of a share of its rows."""
        for name, value in metrics.items():
            one = torch.as_tensor(value).detach()
            present = ~one.isnan()
            self._sums[name] = self._sums.get(name, 0) + torch.where(present, one, 0.0) * share
            self._counts[name] = self._counts.get(name, 0) + present * share

    def pop(self) -> dict[str, tuple[float, float]]:
        """(sum, count) of every metric on this process; starts afresh."""
        state = self.state()
        self._sums, self._counts = {}, {}
        return state

    def state(self) -> dict[str, tuple[float, float]]:
        """(sum, count) of every metric, for a checkpoint between two log lines."""
        return {
            name: (float(total), float(self._counts[name])) for name, total in self._sums.items()
        }

    def load(self, state: Mapping[str, tuple[float, float]]) -> None:
        """Continue from what `state` gave."""
        self._sums = {name: torch.tensor(total) for name, (total, _) in state.items()}
        self._counts = {name: torch.tensor(count) for name, (_, count) in state.items()}


def means(sums: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """The mean of every metric that occurred; nan where it never had a value."""
    return {name: total / count if count else math.nan for name, (total, count) in sums.items()}
