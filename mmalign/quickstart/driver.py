"""What the demonstrations share: timed stages, arms that train side by side, parts of a page.

A demonstration starts a `Demo` with its plan, names each stage as it begins, trains its arms with
`train_arms`, and hands what it measured to `finish`, which has the page written and prints the
table. Its data, its arms and its words are its own.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from markupsafe import Markup

from mmalign import __version__
from mmalign.config import RunConfig
from mmalign.errors import ConfigError
from mmalign.report import blocks
from mmalign.safe import write_text

T = TypeVar("T")
R = TypeVar("R")

_BETWEEN_LINES = 5.0  # seconds
_LOOK_EVERY = 0.5  # seconds between two looks at how far processes are
_TRUSTED = 10.0  # seconds of the plan that count as if this machine had been measured on them


class Demo:
    """A demonstration under way, which says at each stage how long all of it will still take.

    Attributes:
        output: Its folder.
        stages: Seconds of each stage that is over.
    """

    def __init__(
        self,
        name: str,
        output: Path | None,
        seed: int,
        fast: bool,
        plan: Mapping[str, float] | None = None,
    ) -> None:
        """Begin.

        Args:
            name: Of the command: `text`.
            output: An empty folder or a new one; None: runs/quickstart-NAME, with a number behind
                it where that is taken.
            seed: For the summary.
            fast: A smoke run, for the summary; it takes seconds and does not say how many are left.
            plan: Every stage in its order, the last being `report`, with the seconds it takes on
                two quiet cores; what is left is told from it and from the pace so far.

        Raises:
            ConfigError: `output` is not an empty folder.
        """
        self._began = self._clock = self._line = time.perf_counter()
        self.name, self.seed, self.fast = name, seed, fast
        self.output = free_folder(output, f"quickstart-{name}")
        self.stages: dict[str, float] = {}
        self._plan = dict(plan or {})
        self._stage = ""
        self._pool: ProcessPoolExecutor | None = None

    def stage(self, name: str, what: str) -> None:
        """End the stage before, begin one of the plan, and say what it does and what is left."""
        self._end()
        self._stage = name
        self._say(what, 0.0)

    def at(self, done: int, total: int, unit: str) -> None:
        """Say how far the stage is, unless the last line is a moment old."""
        if time.perf_counter() - self._line >= _BETWEEN_LINES:
            self._say(f"  {done:,} of {total:,} {unit}", done / total)

    def track(self, items: Sequence[T], unit: str) -> Iterator[T]:
        """The items of a stage, unchanged, with a line now and then."""
        for index, item in enumerate(items):
            self.at(index, len(items), unit)
            yield item

    def _end(self) -> None:
        now = time.perf_counter()
        if self._stage:
            self.stages[self._stage] = round(now - self._clock, 1)
        self._clock, self._stage = now, ""

    def _say(self, what: str, share: float) -> None:
        """A line; `share` of the stage is done."""
        self._line = time.perf_counter()
        elapsed = self._line - self._began
        left = ""
        if self._plan and not self.fast:
            planned = self._plan[self._stage]
            # Until something is counted, the stage is believed to be as far as it should be.
            share = share or min(1.0, (self._line - self._clock) / planned)
            done = sum(self._plan[name] for name in self.stages) + share * planned
            pace = (_TRUSTED + elapsed) / (_TRUSTED + done)
            left = f"; about {_minutes(pace * (sum(self._plan.values()) - done))} left"
        print(f"[{_minutes(elapsed)}] {what}{left}", flush=True)

    def spread(
        self,
        work: Callable[[T], R],
        jobs: Sequence[T],
        unit: str,
        far: Callable[[], tuple[int, int]] | None = None,
    ) -> list[R]:
        """Do jobs side by side, as many at a time as there are cores, and return what they return.

        Each runs on one thread of a process of its own, so that a seed gives the same result on any
        number of cores. What they print goes to `OUTPUT/log/`.

        Args:
            work: A function of a module, which processes can find by its name.
            jobs: What to call it with; arguments and results are pickled.
            unit: Of what is counted, for the lines that say how far it is.
            far: How much is done and how much there is in all; by default jobs are counted.

        Raises:
            ConfigError: A process was ended from outside.
        """
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                os.cpu_count(),
                # Not forked: a child of a process that uses several threads or a GPU may hang.
                multiprocessing.get_context("spawn"),
                initializer=_start_worker,
                initargs=(self.output / "log",),
            )
        futures = [self._pool.submit(work, job) for job in jobs]
        try:
            waiting = set(futures)
            while waiting:
                done, waiting = wait(waiting, _LOOK_EVERY, FIRST_EXCEPTION)
                for future in done:
                    future.result()  # raises what went wrong there
                self.at(*(far() if far else (len(jobs) - len(waiting), len(jobs))), unit)
            return [future.result() for future in futures]
        except BrokenProcessPool:
            raise ConfigError(
                "a process of the quickstart was ended from outside; a system without memory left "
                f"does that. {self.output / 'log'} holds what it printed"
            ) from None
        finally:
            if not all(future.done() for future in futures):
                for worker in multiprocessing.active_children():
                    worker.terminate()
                self._end_workers()

    def train_arms(self, configs: Sequence[RunConfig]) -> None:
        """Run the project's loop on each config, side by side as `spread` has it.

        Args:
            configs: Of the arms, with `num_threads: 1`, since the others use the other cores, and
                with `num_steps`, by which progress is told.

        Raises:
            ConfigError: It was interrupted, or an arm cannot train.
        """
        self.spread(train_arm, configs, "steps", lambda: steps_of(configs))

    def _end_workers(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

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
        if self._plan:
            self.stage("report", "Writing the page")
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
        self._stage = "report"
        self._end()
        self._end_workers()
        result["seconds"] = self._seconds()
        write_text(self.output / "summary.json", json.dumps(result, indent=2) + "\n")
        print(show(result))
        print(f"Report: {self.output / 'report.html'}  ({result['seconds']} s)")
        return result

    def _seconds(self) -> float:
        return round(time.perf_counter() - self._began, 1)


_INTERRUPTED = "the quickstart was interrupted; start it again, it takes a new folder"


@contextmanager
def interruptible() -> Iterator[None]:
    """For a whole demonstration: Ctrl-C or SIGTERM ends it, and its processes, with one sentence.

    Raises:
        ConfigError: It was interrupted.
    """
    on_main = threading.current_thread() is threading.main_thread()  # Python's rule for handlers
    before = signal.getsignal(signal.SIGTERM)
    if on_main:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        raise ConfigError(_INTERRUPTED) from None
    finally:
        if on_main:
            signal.signal(signal.SIGTERM, before)


def require(package: str, what: str) -> None:
    """Refuse before anything is written where an optional package is missing.

    Args:
        package: As it is imported.
        what: The quickstart does with it: "scores stories".

    Raises:
        ConfigError: It is not installed.
    """
    if find_spec(package) is None:
        raise ConfigError(
            f"the quickstart {what} with the package {package}, which is not installed; run "
            '`pip install "mmalign[quickstart]"`'
        )


def _minutes(seconds: float) -> str:
    return f"{round(seconds) // 60}:{round(seconds) % 60:02d}"


def _start_worker(log: Path) -> None:
    """One thread, what it prints into a file, and no life beyond that of its parent."""
    log.mkdir(parents=True, exist_ok=True)
    name = multiprocessing.current_process().name
    sys.stdout = sys.stderr = (log / f"{name}.txt").open("w", encoding="utf-8", buffering=1)
    for descriptor in (1, 2):  # what the loop says of a signal, and libraries in C, go by these
        os.dup2(sys.stderr.fileno(), descriptor)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # to clean up behind itself
    from mmalign.models.cpu import keep_memory

    one_thread()
    keep_memory()
    parent = multiprocessing.parent_process()
    if parent is not None:  # killed, it leaves the queue open that a worker waits at
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def steps_of(configs: Sequence[RunConfig]) -> tuple[int, int]:
    """How many steps runs have taken, and how many they will have taken at their ends."""
    from mmalign.train.metrics import last_values

    files = [config.output / "metrics.jsonl" for config in configs]
    taken = sum(int(last_values(file).get("step", 0)) for file in files if file.exists())
    return taken, sum(config.train.num_steps or 0 for config in configs)


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
    folders = (Path("runs") / (name if n == 1 else f"{name}-{n}") for n in count(1))
    return next(folder for folder in folders if not folder.exists())


def train_arm(config: RunConfig) -> Path:
    """Run the project's loop to its end; the folder of the run.

    Raises:
        ConfigError: It was interrupted.
    """
    from mmalign.train.loop import train

    if train(config).stopped:
        raise ConfigError(_INTERRUPTED)
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


Row = tuple[str, str, Callable[[Any], str]]
"""Key of a number, what the reader sees, and how it is written."""


def arm_table(
    result: Mapping[str, Any], arms: Sequence[str], rows: Sequence[Row], caption: str
) -> Markup:
    """The numbers of each arm, a column each."""
    cells = [[label, *(write(result[arm][key]) for arm in arms)] for key, label, write in rows]
    return blocks.table(["", *(arm.replace("_", " ") for arm in arms)], cells, caption)


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


def share(value: float) -> str:
    """A share in per cent."""
    return f"{100 * value:.1f}".removesuffix(".0") + " %"
