from __future__ import annotations

from pathlib import Path

import pytest

from mmalign import config as configs
from mmalign.errors import CheckpointError
from mmalign.inference import trained_folder


def test_trained_weights_may_be_named_by_path_or_within_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = configs.RunConfig.model_validate(
        {
            "model": {"path": "m"},
            "data": {"train": "d.jsonl"},
            "objective": {"name": "dpo"},
            "output": str(tmp_path / "run"),
        }
    )
    (tmp_path / "run" / "final").mkdir(parents=True)
    assert trained_folder(config, None) == tmp_path / "run" / "final"
    assert trained_folder(config, Path("final")) == tmp_path / "run" / "final"
    assert trained_folder(config, Path("run/final")) == Path("run/final")
    with pytest.raises(CheckpointError, match=r"checkpoint-7: there is no such folder, here or"):
        trained_folder(config, Path("checkpoint-7"))
    (tmp_path / "final").mkdir()  # what lies here goes first
    assert trained_folder(config, Path("final")) == Path("final")
