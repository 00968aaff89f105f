"""What the demonstrations share: a folder, timed stages, arms that train, a table, parts of a page.

A demonstration starts a `Demo`, names its stages with `lap`, trains its arms with `train_arm`, and
hands what it measured to `finish`, which has the page written and prints the table. Its data, its
arms and its words are its own.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from mmalign import __version__
from mmalign.errors import ConfigError
from mmalign.report import blocks
from mmalign.safe import write_text

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from mmalign.config import RunConfig


class Demo:
    """A demonstration under way.

    Attributes:
        output: Its folder.
        stages: Seconds of each stage that is over.
    """

    def __init__(self, name: str, output: Path | None, seed: int, fast: bool) -> None:
        """Begin.

        Args:
            name: Of the command: `text`.
            output: An empty folder or a new one; None: runs/quickstart-NAME, with a number behind
                it where that is taken.
            seed: For the summary.
            fast: A smoke run, for the summary.

        Raises:
            ConfigError: `output` is not an empty folder.
        """
        self._began = self._clock = time.perf_counter()
        self.name, self.seed, self.fast = name, seed, fast
        self.output = free_folder(output, f"quickstart-{name}")
        self.stages: dict[str, float] = {}

    def lap(self, stage: str, upcoming: str = "") -> None:
        """Note what the stage that ends here took, and say what comes now."""
        now = time.perf_counter()
        self.stages[stage], self._clock = round(now - self._clock, 1), now
        if upcoming:
            print(upcoming, flush=True)

    def finish(
        self,
        numbers: Mapping[str, Any],
        facts: Mapping[str, Any],
        write_page: Callable[[dict[str, Any]], object],
        show: Callable[[dict[str, Any]], str],
    ) -> dict[str, Any]:
        """Write the page and `summary.json`, print the table, and return what the summary holds.

        Args:
            numbers: What was measured, by arm first.
            facts: How it came about.
            write_page: Writes `report.html` of the summary.
            show: The lines to print of the summary.
        """
        result: dict[str, Any] = {
            **numbers,
            "seconds": self._seconds(),
            "stages": self.stages,
            "quickstart": self.name,
            **facts,
            "seed": self.seed,
            "fast": self.fast,
            "mmalign": __version__,
        }
        write_page(result)
        self.lap("report")
        result["seconds"] = self._seconds()
        write_text(self.output / "summary.json", json.dumps(result, indent=2) + "\n")
        print(show(result))
        print(f"Report: {self.output / 'report.html'}  ({result['seconds']} s)")
        return result

    def _seconds(self) -> float:
        return round(time.perf_counter() - self._began, 1)


def free_folder(output: Path | None, name: str) -> Path:
    """An empty folder: the one asked for, or the first of runs/NAME, runs/NAME-2 ... that is free.

    Raises:
        ConfigError: `output` is not an empty folder.
    """
    if output is not None:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise ConfigError(
                f"--output {output} exists and is not an empty folder; choose another, or delete it"
            )
        return output
    default, number = Path("runs") / name, 1
    output = default
    while output.exists():
        number += 1
        output = default.with_name(f"{name}-{number}")
    return output


def train_arm(config: RunConfig) -> Path:
    """Run the project's loop to its end; the folder of the run.

    Raises:
        ConfigError: It was interrupted.
    """
    from mmalign.train.loop import train

    if train(config).stopped:
        raise ConfigError("the quickstart was interrupted; start it again, it takes a new folder")
    return config.output


def evaluation(run_dir: Path, *, first: bool = False) -> dict[str, Any]:
    """What a run's own evaluation says of the held-out rows, at its start or at its end."""
    from mmalign.train.metrics import read_json

    return read_json(run_dir / "eval.jsonl")[0 if first else -1]


def one_thread() -> None:
    """A second thread makes networks as small as those of the demonstrations slower."""
    import torch

    torch.set_num_threads(1)


def table(
    heading: str,
    result: Mapping[str, Mapping[str, float]],
    arms: Sequence[str],
    number: Callable[[float], str],
) -> str:
    """The numbers of each arm for a terminal, a line each."""
    keys = list(result[arms[0]])
    width = max(22, 4 + max(map(len, keys)))
    rows = [(heading, [arm.replace("_", " ") for arm in arms])]
    rows += [(key.replace("_", " "), [number(result[arm][key]) for arm in arms]) for key in keys]
    return "\n".join(
        f"{label:<{width}}" + "".join(f"{cell:>10}" for cell in cells) for label, cells in rows
    )


# Parts of the pages.

Row = tuple[str, str, "Callable[[float], str]"]
"""Key of a number, what the reader sees, and how it is written."""


def arm_table(
    result: Mapping[str, Any], arms: Sequence[str], rows: Sequence[Row], caption: str, of: str = ""
) -> Markup:
    """The numbers of each arm, a column each; `of` names what the rows are about."""
    cells = [[label, *(write(result[arm][key]) for arm in arms)] for key, label, write in rows]
    return blocks.table([of, *(arm.replace("_", " ") for arm in arms)], cells, caption)


def smoke(result: Mapping[str, Any], what: str) -> Markup:
    """A warning on the page of a smoke run; nothing on another."""
    if not result["fast"]:
        return Markup()
    text = f"This was a smoke run with {what}: no number here means anything."
    return blocks.note(text, "warning")


def took(result: Mapping[str, Any]) -> Markup:
    """How long the stages took."""
    stages = ", ".join(f"{name.replace('_', ' ')} {s:g}" for name, s in result["stages"].items())
    return blocks.paragraph(f"{result['seconds']:g} s until here; by stage: {stages}.")


def bullets(notes: Sequence[str]) -> Markup:
    """A list."""
    return Markup("<ul>{}</ul>").format(
        Markup().join(Markup("<li>{}</li>").format(text) for text in notes)
    )


def share(value: float) -> str:
    """A share in per cent."""
    return f"{100 * value:.1f}".removesuffix(".0") + " %"
