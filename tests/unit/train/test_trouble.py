"""What a machine does to a run costs a sentence, and nothing half-written stays."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError
from toy_adapter import toy_config

from mmalign.errors import CheckpointError, ConfigError, DataError, MmalignError
from mmalign.preflight.check import check_config
from mmalign.train import checkpoint
from mmalign.train.display import explained
from mmalign.train.run import Run, build_run, require_launcher


@pytest.fixture
def run(tmp_path: Path) -> Run:
    config = toy_config(tmp_path)
    config.output.mkdir()
    run = build_run(config, check_config(config))
    run.position.step = 3
    return run


def refusal(number: int, path: Path | None = None) -> OSError:
    return OSError(number, os.strerror(number), *([] if path is None else [str(path)]))


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (refusal(errno.ENOSPC), CheckpointError, "No space left on device"),
        (refusal(errno.EFBIG), CheckpointError, r"File too large; raise the limit .*ulimit -f"),
        (refusal(errno.EROFS), CheckpointError, "Read-only file system; make it writable"),
        (SafetensorError("I/O error: … (os error 28)"), CheckpointError, "No space left"),
        (RuntimeError("PytorchStreamWriter failed writing file"), CheckpointError, "make room"),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            DataError,
            r"\(pid 7\) is killed by signal: Killed; .*data\.num_workers \(it is 0\)",
        ),
    ],
)
def test_it_is_one_sentence_that_says_how_to_go_on(
    run: Run, error: Exception, kind: type[MmalignError], words: str
) -> None:
    folder = run.config.output
    saved = checkpoint.save(run, {})
    (folder / "config.yaml").write_text("")
    (folder / ".checkpoint-4.tmp").mkdir()
    (folder / ".metrics.jsonl.tmp").write_text("half")
    with pytest.raises(kind, match=words) as caught, explained(run):
        raise error
    text = str(caught.value)
    assert text.startswith("after step 3: ")
    assert text.endswith(f"go on from {saved}, with: mmalign train {folder}/config.yaml --resume")
    assert "\n" not in text
    assert not list(folder.glob(".*"))


def test_a_run_folder_that_is_gone_is_said(run: Run) -> None:
    with pytest.raises(CheckpointError, match="start again"), explained(run):
        raise refusal(errno.ENOENT, run.config.output / "metrics.jsonl")


@pytest.mark.parametrize(
    "error",
    [refusal(errno.ENOENT, Path("/elsewhere")), RuntimeError("a bug"), SafetensorError("x")],
)
def test_what_is_something_else_stays_what_it_is(run: Run, error: Exception) -> None:
    with pytest.raises(type(error)), explained(run):
        raise error


def test_variables_of_a_launcher_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    require_launcher()
    monkeypatch.setenv("MASTER_ADDR", "here")  # of itself it starts nothing
    require_launcher()
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ConfigError, match=r"sets RANK=1.*LOCAL_RANK, WORLD_SIZE, MASTER_PORT are"):
        require_launcher()
    monkeypatch.setenv("WORLD_SIZE", "1")  # as clusters set it for one process
    require_launcher()
    for name in names:
        monkeypatch.setenv(name, "1")
    require_launcher()
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ConfigError, match="WORLD_SIZE must be a whole number"):
        require_launcher()
