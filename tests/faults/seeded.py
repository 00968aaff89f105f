"""Good runs, and what it takes to run one with a fault in it and to hear what is said."""

from __future__ import annotations

import json
import logging
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from harness import numbers, require_sentence

from mmalign import config as configs
from mmalign.errors import MmalignError

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from types import ModuleType

Row = dict[str, Any]


@dataclass
class GoodRun:
    """A run with nothing wrong, to be spoilt: change `config`, `rows`, or files in `folder`.

    Attributes:
        folder: Where paths start from.
        config: As in YAML.
        rows: Of `data.jsonl`.
        held_out: Of `held_out.jsonl`, which is evaluated on where there are any.
        rng: The random stream of the case.
        first: What must have happened before, in the good run's folder, e.g. `cache` or `train`.
        then: What changes on the disk after that.
        resume: Whether the run is continued.
    """

    folder: Path
    config: dict[str, Any]
    rows: list[Row]
    rng: random.Random
    held_out: list[Row] = field(default_factory=list[Row])
    first: str = ""
    then: Callable[[], object] | None = None
    resume: bool = False

    def set(self, key: str, value: Any) -> None:
        """Set `train.lr` and its like."""
        *path, name = key.split(".")
        section = self.config
        for part in path:
            section = section.setdefault(part, {})
        section[name] = value

    def some(self, least: int = 1) -> list[Row]:
        """A few of the rows."""
        return self.rng.sample(self.rows, self.rng.randint(least, len(self.rows) - 1))

    def write(self) -> configs.RunConfig:
        """The files of the run."""
        for name, rows in (("data", self.rows), ("held_out", self.held_out)):
            if rows:
                lines = [json.dumps(row, ensure_ascii=False) for row in rows]
                file = self.folder / f"{name}.jsonl"
                file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        if self.held_out:
            self.set("data.eval", "held_out.jsonl")
        file = self.folder / "config.json"
        file.write_text(json.dumps(self.config), encoding="utf-8")
        return configs.load(file)


def faults_of(module: ModuleType) -> dict[str, Callable[[GoodRun], str]]:
    """The faults of a module by name: what takes a good run and returns a pattern."""
    return {
        name: found
        for name, found in vars(module).items()
        if getattr(found, "__module__", "") == module.__name__
        and getattr(found, "__annotations__", {}) == {"run": "GoodRun", "return": "str"}
    }


def heard(run: GoodRun) -> tuple[list[str], str]:
    """What a run says before its first step: warnings, and the error that stops it or ""."""
    from mmalign.inference import write_cache
    from mmalign.train.loop import train

    with at(run.folder), _listening() as lines:
        try:
            config = run.write()
            if run.first == "cache":
                write_cache(config)
            elif run.first == "train":
                train(config)
            lines.clear()
            if run.then is not None:
                run.then()
            if run.resume:
                train(run.write(), resume=True)
            else:
                train(run.write(), dry_run=True)
        except MmalignError as error:
            require_sentence(str(error))
            return lines, str(error)
    for line in lines:
        require_sentence(line)
    return lines, ""


def require_told(fault: Callable[[GoodRun], str], run: GoodRun) -> None:
    """A run with the fault says what the fault returns."""
    wanted = fault(run)
    warnings, error = heard(run)
    assert any(re.search(wanted, line, re.DOTALL) for line in (*warnings, error)), (
        f"in {run.folder} nothing says {wanted!r}; said was {[*warnings, error]}"
    )


def cases(folder: Path, few: int) -> Iterator[tuple[int, Path]]:
    """The numbers of the cases to run, each with a new folder."""
    for number in numbers(few):
        inside = folder / str(number)
        inside.mkdir()
        yield number, inside


@contextmanager
def at(folder: Path) -> Iterator[None]:
    """With another current directory."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def _listening() -> Iterator[list[str]]:
    lines: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, listener = logging.getLogger("mmalign"), Listener(logging.WARNING)
    logger.addHandler(listener)
    try:
        yield lines
    finally:
        logger.removeHandler(listener)
