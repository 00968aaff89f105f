"""How long `mmalign` takes to its help, and `mmalign train` to its first finished step.

    python benchmarks/startup.py [--rows N] [--repeats N] [--folder DIR]

The model is the story model of 260 thousand parameters that ships, so that nearly all of the time
is that of starting: libraries, rows, checks. `bare` loads the same model by transformers, runs a
forward and a backward pass over 16 sequences and an optimizer step, and checks nothing.

With `--rows`, rows of random texts are written (20 to 300 tokens a side), and a run is started
twice; the second start reads the rows and what a survey found of them as they were kept. The runs
are watched through a terminal of their own, so that bars are drawn: `silence` is the longest time
in which nothing was written to it.

Times are the shortest of the repeats, wall seconds and processor seconds (user and system, worker
processes that have ended included); `peak` is the largest resident size of the process. Of a start
with many rows there is one repeat.
"""

from __future__ import annotations

import argparse
import json
import os
import pty
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

STORIES = Path(__file__).resolve().parent.parent / "mmalign" / "quickstart" / "stories260k"
HELP = ("--help", "train --help", "data --help", "trian")
BARE = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
ids = torch.randint(3, 500, (16, 300))
model(ids, labels=ids).loss.backward()
optimizer.step()
"""
NAMES = "Tom Lily Ben Mia Sam Anna Max Sue"
WORDS = (
    "little dog cat ball tree park house happy sad big red blue run play jump find see look want "
    "like went said mom dad friend bird flower sun rain day box toy car boat fish water hill night"
)


@dataclass(frozen=True)
class Start:
    """What a start took; seconds and MiB."""

    wall: float
    cpu: float
    silence: float = 0.0
    peak: float = 0.0

    def line(self, name: str) -> str:
        """A line of the table."""
        more = f"   silence {self.silence:4.1f} s   peak {self.peak:,.0f} MiB" if self.peak else ""
        return f"{name:<32} {self.wall:6.2f} s wall {self.cpu:7.2f} s cpu{more}"


def usage_of_children() -> float:
    """Processor seconds of all children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def whole(arguments: list[str]) -> Start:
    """A process from its start to its end."""
    began, before = time.perf_counter(), usage_of_children()
    subprocess.run([sys.executable, *arguments], capture_output=True)
    return Start(time.perf_counter() - began, usage_of_children() - before)


def first_step(config: Path) -> Start:
    """`mmalign train` to the line of its first step, which its end follows."""
    main, side = pty.openpty()
    began = said = time.perf_counter()
    command = [sys.executable, "-m", "mmalign", "train", str(config)]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, stderr=side, stdout=subprocess.DEVNULL, env=environment)
    os.close(side)
    silence, told, found = 0.0, "", None
    while part := _read(main):
        now = time.perf_counter()
        silence, said = max(silence, now - said), now
        told = (told + part)[-4000:]
        if found is None and re.search(r"step 1/1\b", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", told)):
            found = Start(now - began, _cpu(process.pid), silence, _peak(process.pid))
    os.close(main)
    if process.wait() or found is None:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{told[-600:]}")
    return found


def _read(terminal: int) -> str:
    try:
        return os.read(terminal, 1 << 16).decode(errors="replace")
    except OSError:  # Linux says so of a terminal that nobody has open any more
        return ""


def _cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _peak(pid: int) -> float:
    found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


def write_rows(file: Path, count: int) -> None:
    """Pairs of random stories in JSON Lines; the same ones at each call."""
    draw = random.Random(0)
    names, words = NAMES.split(), WORDS.split()

    def story(letters: int) -> str:
        told: list[str] = []
        while sum(map(len, told)) < letters:
            about = draw.choices(words, k=draw.randint(3, 11))
            told.append(f"{draw.choice(names)} {' '.join(about)}.")
        return " ".join(told)

    with file.open("w", encoding="utf-8") as stream:
        for _ in range(count):
            sides = {side: f" {story(draw.randint(40, 500))}" for side in ("chosen", "rejected")}
            row = {"prompt": f"Once upon a time, {story(draw.randint(30, 250))}", **sides}
            stream.write(json.dumps(row) + "\n")


def write_config(folder: Path, rows: int) -> Path:
    """A run of one step of 8 pairs in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "pairs.jsonl", rows)
    config = {
        "model": {"path": str(STORIES)},
        "data": {"train": str(folder / "pairs.jsonl")},
        "objective": {"name": "dpo"},
        "train": {"num_steps": 1, "batch_size": 8, "lr": 1e-5},
        "output": str(folder / "run"),
    }
    (folder / "config.yaml").write_text(json.dumps(config))
    return folder / "config.yaml"


def main() -> None:
    """Print the tables, each line when it is known."""
    parser = argparse.ArgumentParser(description="Times of starting.")
    parser.add_argument("--rows", type=int, default=0, help="start twice with so many rows")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="keep files here; by default a temporary one")
    given = parser.parse_args()

    def best(name: str, starts: list[Start]) -> None:
        print(min(starts, key=lambda start: start.wall).line(name), flush=True)

    for arguments in HELP:
        command = ["-m", "mmalign", *arguments.split()]
        best(f"mmalign {arguments}", [whole(command) for _ in range(given.repeats)])
    few = max(1, given.repeats // 2)
    best("bare transformers", [whole(["-c", BARE, str(STORIES)]) for _ in range(few)])
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        runs = [("64 rows", 64, few), *([(f"{given.rows:,} rows", given.rows, 1)] * 2)]
        for number, (name, rows, repeats) in enumerate(runs if given.rows else runs[:1]):
            config = write_config(folder / str(rows), rows)
            starts: list[Start] = []
            for _ in range(repeats):
                shutil.rmtree(folder / str(rows) / "run", ignore_errors=True)
                starts.append(first_step(config))
            which = ("", ", first start", ", second start")[number]
            best(f"train, {name}{which}", starts)


if __name__ == "__main__":
    main()
