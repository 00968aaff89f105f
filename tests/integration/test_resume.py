"""Kill a real process in the middle of an epoch, resume, and compare bit for bit."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from toy_adapter import TOY, TOY_TOOLS, toy_config

from mmalign.data.jobs import only_writer
from mmalign.errors import CheckpointError, ConfigError
from mmalign.models.adapter import ADAPTERS, TOOLS
from mmalign.train.checkpoint import checkpoints
from mmalign.train.loop import train
from mmalign.train.metrics import read_json

pytestmark = [pytest.mark.usefixtures("toy"), pytest.mark.runs]
RUN_TOY = Path(__file__).with_name("run_toy.py")

# An epoch is 6 steps: step 5 to 9 lie in the middle of one and across a boundary. BCO has running
# state, noise uses the random stream, three micro-batches a log line fill the averages.
SETTINGS = (
    "objective={name: bco, beta: 0.5}",
    "train.num_steps=12",
    "train.batch_size=2",
    "train.accumulate=2",
    "train.save_every=3",
    "train.log_every=2",
    "train.eval_every=5",
    "train.warmup=2",
)


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(RUN_TOY), str(folder / "config.json"), *SETTINGS, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for_step(process: subprocess.Popen[str], run_dir: Path, step: int) -> None:
    """Wait until the run has logged `step`."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if any(line["step"] >= step for line in read_json(run_dir / "metrics.jsonl")):
            return
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.02)
    raise AssertionError("the run does not get on")


def lines(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics without what a clock decides."""
    return [
        {key: value for key, value in line.items() if not key.endswith("_per_second")}
        for line in read_json(run_dir / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a run with noise that nothing interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ADAPTERS, "text", TOY)
        patch.setitem(TOOLS, "text", TOY_TOOLS)
        config = toy_config(tmp_path_factory.mktemp("noisy"), *SETTINGS, noise=0.1)
        train(config)
    return config.output


def require_same_run(found: Path, expected: Path) -> None:
    for name in ("model.safetensors",):
        assert (found / "final" / name).read_bytes() == (expected / "final" / name).read_bytes()
    last = "checkpoint-12"
    for name in ("weights.safetensors", "state.safetensors"):
        ours, theirs = load_file(found / last / name), load_file(expected / last / name)
        assert ours.keys() == theirs.keys()
        assert all(ours[key].equal(theirs[key]) for key in ours), name
    assert lines(found) == [pytest.approx(line, rel=1e-6) for line in lines(expected)]
    for name in ("samples.jsonl", "eval.jsonl"):
        assert read_json(found / name) == read_json(expected / name)


def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path, noisy: Path) -> None:
    config = toy_config(tmp_path, *SETTINGS, noise=0.1, seconds=0.05)
    process = start(tmp_path)
    wait_for_step(process, config.output, 8)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    newest = checkpoints(config.output)[-1]
    assert newest.name in ("checkpoint-6", "checkpoint-9"), "nothing after the last one counts"
    assert not (config.output / "final").exists()

    result = train(config, resume=True)
    assert result.steps == 12
    require_same_run(config.output, noisy)
    assert not list(config.output.glob(".*"))


@pytest.mark.parametrize("mode", ["stochastic", "master"])
def test_weights_in_bfloat16_resume_to_the_same_bits(tmp_path: Path, mode: str) -> None:
    """The float32 copies come back, and what is drawn to round at random depends on the step."""
    half = (*SETTINGS, "model.dtype=bfloat16", f"train.bf16_weights={mode}", "train.lr=1e-5")
    half += ("train.keep_checkpoints=4",)
    config = toy_config(tmp_path, *half, "train.check_reference=false")
    train(config)
    whole = tmp_path / "whole"
    shutil.copytree(config.output, whole)
    shutil.rmtree(config.output / "final")
    for step in (9, 12):
        shutil.rmtree(config.output / f"checkpoint-{step}", ignore_errors=True)
    result = train(config.model_copy(), resume=True)
    assert result.steps == 12
    require_same_run(config.output, whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_any_number_of_kills_at_any_moment(tmp_path: Path, seed: int) -> None:
    """Killed again and again after a random time, often while a checkpoint is being written."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    knobs = {"noise": 0.1, "seconds": 0.03}
    train(toy_config(whole, *SETTINGS, **knobs))
    config = toy_config(killed, *SETTINGS, **knobs)
    draw = random.Random(seed)
    kills = 0
    resume: tuple[str, ...] = ()
    while not (config.output / "final").exists():
        process = start(killed, "train.save_every=1", *resume)
        read_until(process, "agree", "resuming")  # then comes the loop
        time.sleep(draw.uniform(0.0, 0.4))
        kills += process.poll() is None
        process.kill()
        process.communicate()
        resume = ("--resume",) if (config.output / "config.yaml").exists() else ()
    assert kills >= 2
    train(config, resume=True)
    for name in ("weights.safetensors", "state.safetensors"):
        ours = load_file(config.output / "checkpoint-12" / name)
        theirs = load_file(whole / "run/checkpoint-12" / name)
        assert all(ours[key].equal(theirs[key]) for key in theirs), name
    assert lines(config.output) == [pytest.approx(line, rel=1e-6) for line in lines(whole / "run")]


@pytest.mark.slow
def test_ctrl_c_saves_and_tells_how_to_go_on(tmp_path: Path, noisy: Path) -> None:
    config = toy_config(tmp_path, *SETTINGS, noise=0.1, seconds=0.1)
    process = start(tmp_path, "train.save_every=1000")
    wait_for_step(process, config.output, 4)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 0
    (saved,) = checkpoints(config.output)
    assert f"saved in {saved}" in told
    assert f"mmalign train {config.output / 'config.yaml'} --resume" in told
    assert read_json(config.output / "metrics.jsonl")[-1]["step"] < 12

    train(config, resume=True)
    require_same_run(config.output, noisy)


def read_until(process: subprocess.Popen[str], *texts: str) -> None:
    """Read what a run tells until a line holds one of `texts`, or it has ended."""
    assert process.stderr is not None
    while line := process.stderr.readline():
        if any(text in line for text in texts):
            return


@pytest.mark.slow
def test_a_second_ctrl_c_quits_at_once(tmp_path: Path) -> None:
    config = toy_config(tmp_path, seconds=60.0)
    process = start(tmp_path)
    read_until(process, "held out at step 0")  # then comes step 1, which takes a minute
    process.send_signal(signal.SIGINT)
    read_until(process, "once more quits at once")
    assert process.poll() is None, "the first one lets the step finish"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) != 0
    assert checkpoints(config.output) == []


def test_a_run_without_a_checkpoint_yet_starts_again(tmp_path: Path) -> None:
    config = toy_config(tmp_path, *SETTINGS)
    first = train(config)
    for path in checkpoints(config.output):
        shutil.rmtree(path)
    again = train(config, resume=True)
    for name in ("rows_per_second", "tokens_per_second"):
        first.metrics.pop(name), again.metrics.pop(name)
    assert again.metrics == first.metrics
    assert len(read_json(config.output / "eval.jsonl")) == 4  # steps 0, 5, 10, 12


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_killed_before_its_config_was_written_begins_anew(
    tmp_path: Path, resume: bool
) -> None:
    """There is no moment after which neither a start nor a resume works."""
    config = toy_config(tmp_path, "train.num_steps=2")
    train(config)
    told = (config.output / "env.json").read_text()
    shutil.rmtree(config.output)
    config.output.mkdir()
    (config.output / "env.json").write_text(told)
    (config.output / "inputs.json").write_text("{}")
    (config.output / ".config.yaml.tmp").write_text("modality: te")
    (config.output / ".mmalign.lock").write_text("")
    assert train(config, resume=resume).steps == 2
    assert not list(config.output.glob(".*"))


def test_a_folder_of_somebody_elses_settings_is_not_begun_in(tmp_path: Path) -> None:
    config = toy_config(tmp_path)
    config.output.mkdir()
    (config.output / "env.json").write_text('{"token": "mine"}')
    with pytest.raises(ConfigError, match=r"holds env\.json"):
        train(config)
    with pytest.raises(CheckpointError, match="no run to resume"):
        train(config, resume=True)
    assert (config.output / "env.json").read_text() == '{"token": "mine"}'


def test_a_folder_that_is_being_written_to_is_left_alone(tmp_path: Path) -> None:
    config = toy_config(tmp_path, "train.num_steps=2")
    with only_writer(config.output, "output"):
        for resume in (False, True):
            with pytest.raises(ConfigError, match="is writing there"):
                train(config, resume=resume)
    train(config)


def test_a_run_moves_with_its_rows_and_ends_in_the_same_bits(tmp_path: Path) -> None:
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    whole.mkdir()
    moved.mkdir()
    train(toy_config(whole, *SETTINGS))
    config = toy_config(moved, *SETTINGS)
    train(config)
    for name in ("checkpoint-12", "final"):
        shutil.rmtree(config.output / name)
    there = tmp_path / "there"
    shutil.move(moved, there)
    (there / "pairs.jsonl").rename(there / "rows.jsonl")
    settings = (*SETTINGS, f"data.train={there / 'rows.jsonl'}")
    assert train(toy_config(there, *settings), resume=True).steps == 12
    require_same_run(there / "run", whole / "run")


def test_rows_that_changed_in_place_are_named(tmp_path: Path) -> None:
    config = toy_config(tmp_path, "train.num_steps=2")
    train(config)
    rows = tmp_path / "pairs.jsonl"
    rows.write_text(rows.read_text().replace('"chosen": "', '"chosen": "a', 1))
    with pytest.raises(CheckpointError, match=rf"{rows} was \d+ bytes"):
        train(config, resume=True)


def test_lines_that_are_no_records_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = toy_config(tmp_path, *SETTINGS)
    train(config)
    before = lines(config.output)
    metrics = config.output / "metrics.jsonl"
    metrics.write_bytes(b'{"step": [1]}\n[]\n' + metrics.read_bytes() + b'{"step": 12, "lo')
    train(config, resume=True)
    assert "metrics.jsonl: 3 unreadable lines left out" in caplog.text
    assert lines(config.output) == before


@pytest.mark.slow
def test_a_killed_loader_worker_costs_a_sentence(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    train(toy_config(whole, *SETTINGS))
    config = toy_config(killed, *SETTINGS, seconds=0.1)
    process = start(killed, "data.num_workers=1")
    wait_for_step(process, config.output, 4)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in children:
        os.kill(int(child), signal.SIGKILL)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "DataError: after step" in told
    assert "killed by signal: Killed" in told
    assert "Traceback" not in told
    train(config, resume=True)
    require_same_run(config.output, whole / "run")


@pytest.mark.slow
@pytest.mark.parametrize("limit", [300, 2000, 6000])
def test_a_disk_that_takes_no_more_costs_a_sentence(tmp_path: Path, limit: int) -> None:
    """Files end at `limit` bytes: within env.json, within a checkpoint, within the metrics."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    train(toy_config(whole, *SETTINGS))
    config = toy_config(cut, *SETTINGS)
    command = [sys.executable, str(RUN_TOY), str(cut / "config.json"), *SETTINGS]
    limits = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))}
    done = subprocess.run(command, capture_output=True, text=True, check=False, **limits)
    assert done.returncode == 1
    assert "CheckpointError: after step" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(config.output.glob(".*"))
    train(config, resume=(config.output / "config.yaml").exists())
    require_same_run(config.output, whole / "run")


def test_a_finished_run_only_writes_its_end_again(tmp_path: Path) -> None:
    config = toy_config(tmp_path, *SETTINGS)
    train(config)
    weights = (config.output / "final/model.safetensors").read_bytes()
    before = lines(config.output)
    result = train(config, resume=True)
    assert result.final_dir == config.output / "final"
    assert (config.output / "final/model.safetensors").read_bytes() == weights
    assert lines(config.output) == before


def test_another_config_is_refused_but_reporting_may_change(tmp_path: Path) -> None:
    train(toy_config(tmp_path, *SETTINGS, "train.num_steps=3"))
    with pytest.raises(CheckpointError, match=r"config\.train\.lr: 0\.02 in the checkpoint"):
        train(toy_config(tmp_path, *SETTINGS, "train.num_steps=3", "train.lr=0.1"), resume=True)
    with pytest.raises(CheckpointError, match=r"data\.train_hash"):
        train(toy_config(tmp_path, *SETTINGS, "train.num_steps=3", num_rows=30), resume=True)
    result = train(
        toy_config(tmp_path, *SETTINGS, "train.num_steps=3", "train.log_every=1"), resume=True
    )
    assert result.steps == 3


def test_a_full_folder_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    config = toy_config(tmp_path)
    config.output.mkdir()
    (config.output / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"not empty \(it holds thesis\.txt\)"):
        train(config)
    with pytest.raises(CheckpointError, match="no run to resume"):
        train(config, resume=True)
    assert [path.name for path in config.output.iterdir()] == ["thesis.txt"]


def test_nothing_is_written_when_the_start_is_refused(tmp_path: Path) -> None:
    config = toy_config(tmp_path, shift=0.5)
    with pytest.raises(ConfigError, match="policy and reference differ"):
        train(config)
    assert not config.output.exists()
