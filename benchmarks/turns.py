"""Arms of a benchmark that take their steps in turn, each in a process of its own.

What else a machine does meets all arms alike then, and no arm's memory counts for another. A
program that is an arm calls `Turns.begin` and `Turns.end` around each step; the parent holds one
`Arm` for each and calls `take_turns`.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence


def resident(field: str) -> float:
    """A field of this process's memory (VmRSS, VmHWM), in MiB."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def device_of(asked: str) -> str:
    """cpu or cuda; auto is a GPU where there is one."""
    import torch

    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if asked == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: there is no GPU that PyTorch could use")
    return asked


Step = tuple[float, float, float, float]
"""Seconds, MiB above the baseline, MiB in all, seconds of CPU over all threads."""


class Turns:
    """Waits for the parent's word before each step, and answers with seconds, MiB, CPU seconds.

    Memory on a CPU is the largest resident size during a step, and the same less that of the
    process after its imports; on a GPU what PyTorch had allocated at most.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.on_gpu = device != "cpu"
        self.baseline = 0.0 if self.on_gpu else resident("VmRSS")
        self.start = self.cpu_start = 0.0

    def begin(self) -> None:
        if sys.stdin.readline().strip() != "step":
            os._exit(0)
        if self.on_gpu:
            import torch

            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the peak
        self.start, self.cpu_start = time.perf_counter(), time.process_time()

    def end(self) -> None:
        if self.on_gpu:
            import torch

            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() / 2**20
        else:
            peak = resident("VmHWM")
        seconds, worked = time.perf_counter() - self.start, time.process_time() - self.cpu_start
        print(f"RESULT {seconds} {peak - self.baseline} {peak} {worked}", flush=True)

    def train(self, run: Any, backward: Callable[..., Any]) -> NoReturn:
        """The steps of train/loop.py, a turn each.

        Args:
            run: Of `build_run`.
            backward: `backward_joint` or `backward_per_candidate`.
        """
        from mmalign.train.loop import _accumulate, _clip

        loader = run.batches()
        while True:
            self.begin()
            _accumulate(run, backward, loader)
            _clip(run)
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=True)
            run.adapter.after_step(1)
            self.end()


class Arm:
    """One arm's process, as its parent sees it."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.name = name
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed with the process
        self.process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        )

    def step(self) -> Step:
        """Seconds, MiB above the baseline, MiB in all, seconds of CPU over all threads."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):  # it has ended; why, it says below
            self.process.stdin.write("step\n")
            self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("RESULT"):
                seconds, added, peak, worked = map(float, line.split()[1:])
                return seconds, added, peak, worked
        self.fail()

    def fail(self) -> NoReturn:
        """End with what the process wrote to its errors."""
        self.errors.seek(0)
        raise SystemExit(f"{self.name} failed:\n{self.errors.read()[-3000:]}")

    def close(self) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


FIRST_TABLE = 60.0  # seconds after which a comparison shows what it has so far


def take_turns(
    arms: Sequence[Arm],
    rounds: int,
    *,
    uncounted: int = 2,
    report: Callable[[dict[str, Any]], Iterable[str]] | None = None,
) -> dict[str, Any]:
    """Steps of all arms in turn; the first ones of each, which prepare things, do not count.

    Args:
        arms: Started.
        rounds: Steps of each that count.
        uncounted: Steps of each before those.
        report: The lines of a table. A long comparison prints one of the first steps, and one of
            the first that count.
    """
    began, shown, steps = time.perf_counter(), set[bool](), dict[str, list[Step]]()
    for number in range(-uncounted, rounds):
        counts = number >= 0
        if number <= 0:
            steps = {arm.name: [] for arm in arms}
        for arm in arms:
            steps[arm.name].append(arm.step())
            if not counts:
                times = f"{steps[arm.name][-1][0]:.2f} s"
                say(f"  {arm.name}: step {number + uncounted + 1}, which does not count, {times}")
        if counts:
            times = ", ".join(f"{name} {taken[-1][0]:.2f} s" for name, taken in steps.items())
            say(f"  round {number + 1} of {rounds}: {times}")
        late = time.perf_counter() - began > FIRST_TABLE
        if report and late and counts not in shown and number + 1 < rounds:
            shown.add(counts)
            what = f"round {number + 1}" if counts else "steps that do not count"
            print("\n".join([*report(_summed_up(steps)), f"  (so far: {what})"]), flush=True)
    for arm in arms:
        arm.close()
    return _summed_up(steps)


def say(line: str) -> None:
    """Progress, beside the tables."""
    print(line, file=sys.stderr, flush=True)


def one_by_one(arms: Sequence[Arm], rounds: int, *, uncounted: int = 2) -> dict[str, Any]:
    """The same, each arm to its end before the next: for a device that holds the work of one.

    An arm that fails is left out, and says why.
    """
    steps: dict[str, list[Step]] = {}
    for arm in arms:
        try:
            say(f"  {arm.name}: {uncounted + rounds} steps")
            taken = [arm.step() for _ in range(uncounted + rounds)]
        except SystemExit as failure:
            print(failure, flush=True)
            continue
        arm.close()
        steps[arm.name] = taken[uncounted:]
    return _summed_up(steps)


def _summed_up(steps: Mapping[str, Sequence[Step]]) -> dict[str, Any]:
    return {
        arm: {
            "seconds": min(s for s, *_ in taken),
            "median_seconds": statistics.median(s for s, *_ in taken),
            "mean_seconds": statistics.mean(s for s, *_ in taken),
            "mebibytes": max(m for _, m, *_ in taken),
            "mebibytes_whole_process": max(m for _, _, m, _ in taken),
            "cpu_seconds": statistics.median(c for *_, c in taken),
            "mean_cpu_seconds": statistics.mean(c for *_, c in taken),
            "all_seconds": [round(s, 4) for s, *_ in taken],
        }
        for arm, taken in steps.items()
    }


def ratio_line(
    what: str, value: float, target: float | None = None, *, at_least: bool = False
) -> str:
    """A ratio, and whether it reaches its target."""
    line = f"  {what:<36}{value:5.2f}x"
    if target is None:
        return line
    reached = value >= target if at_least else value <= target
    bound = "at least" if at_least else "at most"
    return f"{line}  ({bound} {target:g}: {'reached' if reached else 'MISSED'})"
