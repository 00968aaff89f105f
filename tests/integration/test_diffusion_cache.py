"""`mmalign cache`, killed again and again, ends with the cache of a run that was left in peace."""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tiny_pictures
from cache_entries import entries

from mmalign.config import yaml
from mmalign.diffusion import pictures

PAIRS = 8


def write_config(pipeline: Path, folder: Path, name: str) -> Path:
    """A run with everything to cache, in a cache folder of its own."""
    data = folder / "data"
    if not data.exists():
        tiny_pictures.pairs(data, PAIRS, size=(40, 32))
    config: dict[str, Any] = {
        "modality": "diffusion",
        "model": {"path": str(pipeline)},
        "data": {"train": str(data / "data.jsonl")},
        "objective": {"name": "diffusion_dpo"},
        "reference": {"kind": "cached"},
        "train": {"batch_size": 2, "num_threads": 1},
        "diffusion": {
            **{"resolution": 32, "buckets": True, "bucket_multiple": 8, "flip": True},
            **{"num_draws": 4, "cache_folder": str(folder / name)},
        },
        "output": str(folder / "run"),
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.dump(config), encoding="utf-8")
    return path


def command(path: Path, seconds: float = 0.0) -> str:
    """The command as a user runs it, in this process, with shards cut every so many seconds."""
    from typer.testing import CliRunner

    from mmalign.cli import app

    usual, pictures.FLUSH_SECONDS = pictures.FLUSH_SECONDS, seconds
    try:
        result = CliRunner().invoke(app, ["cache", str(path)])
    finally:
        pictures.FLUSH_SECONDS = usual  # other tests run in this process too
    assert result.exit_code == 0, result.output
    return result.stdout


def numbers(said: str) -> dict[str, tuple[int, int]]:
    """What the command says of each cache: written, were there."""
    found = re.findall(r"([a-z ]+): (\d+) written, (\d+) were there", said)
    return {name.strip(): (int(new), int(old)) for name, new, old in found}


@pytest.mark.slow
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_killed_at_any_moment_it_goes_on_and_loses_nothing(sd15_dir: Path, tmp_path: Path) -> None:
    """Forked, so that the kills fall into the work and not into imports."""
    quiet = write_config(sd15_dir, tmp_path, "quiet")
    began = time.monotonic()
    said = numbers(command(quiet, seconds=30.0))
    length = time.monotonic() - began
    expected = entries(tmp_path / "quiet")
    totals = {"latents": 4 * PAIRS, "prompts": PAIRS + 1, "reference errors": PAIRS}
    assert said == {name: (number, 0) for name, number in totals.items()}

    path = write_config(sd15_dir, tmp_path, "killed")
    folder = tmp_path / "killed"
    fork = multiprocessing.get_context("fork")
    rng = np.random.default_rng(0)
    before: dict[str, dict[str, bytes]] = {}
    survived = 0
    for _ in range(8):
        child = fork.Process(target=command, args=(path,))
        child.start()
        child.join(timeout=float(rng.uniform(0.1, 0.6)) * length)
        child.kill()  # SIGKILL
        child.join()
        after = entries(folder)
        assert before.items() <= after.items()
        survived += len(after) > len(before)
        before = after
    assert survived >= 2, "no kill fell into the work"

    there = {
        "latents": sum(name.startswith("latents") for name in before),
        "prompts": sum(name.startswith("prompts") for name in before),
        "reference errors": sum(name.startswith("errors") for name in before),
    }
    assert numbers(command(path)) == {
        name: (totals[name] - number, number) for name, number in there.items()
    }
    assert entries(folder) == expected
    assert numbers(command(path)) == {name: (0, number) for name, number in totals.items()}


@pytest.mark.slow
def test_two_processes_killed_and_started_again(sd15_dir: Path, tmp_path: Path) -> None:
    """From the shell, with the processes of the launcher."""
    quiet = write_config(sd15_dir, tmp_path, "quiet")
    command(quiet, seconds=30.0)
    path = write_config(sd15_dir, tmp_path, "killed")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    launch += ["-m", "mmalign", "cache", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    folder = tmp_path / "killed"
    for shards in (2, 5):  # of eight: four kinds from two processes
        child = subprocess.Popen(launch, env=environment, stderr=subprocess.DEVNULL)
        while child.poll() is None and len(list(folder.glob("*/*.safetensors"))) < shards:
            time.sleep(0.02)
        family = [child, *psutil.Process(child.pid).children(recursive=True)]
        for process in family:
            process.kill()
        psutil.wait_procs(family[1:])
        child.wait()
    before = entries(folder)
    assert before
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert entries(folder) == entries(tmp_path / "quiet")
    there = [old for _, old in numbers(done.stdout).values()]
    assert sum(there) == sum(not name.startswith("pictures") for name in before)
