"""Every video file in configs/ trains: dry-run on a tiny model of its class.

Only what makes it large is exchanged: the model, the data, frames and their size, the width of the
clue aggregator.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from selected import some_configs
from video_runs import KIND_OF, row, shrunk, write_rows

from mmalign import config as configs
from mmalign.inference import write_cache

if TYPE_CHECKING:
    from collections.abc import Callable

CONFIGS = sorted(
    path
    for model in KIND_OF
    for path in (Path(__file__).resolve().parents[2] / "configs").glob(f"*_{model}.yaml")
)
DATA = {
    "clips.jsonl": "pair",
    "long_clips.jsonl": "pair",
    "sounding_clips.jsonl": "pair",
    "ambiguous.jsonl": "pair",
    "instructions.jsonl": "plain",
    "rrpo.jsonl": "spans",
    "counterfactual.jsonl": "counterfactual",
    "vista.jsonl": "vista",
}
"""The names that configs give their data, to the kind of record in them."""

ROWS = 6


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("rows")
    return {
        name: write_rows(folder / name, (row(i, kind) for i in range(ROWS)))
        for name, kind in DATA.items()
    }


REPEATED = ("rrpo_qwen3vl", "rrpo_llavaov")
"""Their method is dry-run on another class by default, and their class by another method."""


@pytest.mark.parametrize("path", some_configs(CONFIGS, slow=REPEATED))
def test_config_dry_runs(
    path: Path,
    data: dict[str, Path],
    video_models: Callable[[str], Path],
    clips_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from mmalign.train.loop import train

    model = video_models(KIND_OF[path.stem.rpartition("_")[2]])
    (source,) = configs.load(path).data.train
    config = shrunk(path, model, data[Path(source.path).name], clips_dir, tmp_path)
    if config.reference.kind == "cached":
        write_cache(config)
    train(config, dry_run=True)
    said = capsys.readouterr().out
    found = re.search(r"loss\s+(-?[\d.e+-]+|nan|-?inf)", said)
    assert found, said
    loss = float(found[1])
    assert math.isfinite(loss)
    if config.objective.name in LOG_2:
        assert loss == pytest.approx(math.log(2), abs=2e-3)
    norm = re.search(r"gradient\s+norm ([\d.e+-]+)", said)
    assert norm, said
    assert float(norm[1]) > 0
    assert not config.output.exists(), "a dry run writes nothing"


LOG_2 = ("dpo", "adpo", "f_dpo", "rrpo", "tdpo2", "vdpo", "vdpo_symmetric", "pami_vdpo")
"""Objectives that say log 2 where policy and reference are equal."""


def test_data_files_are_those_that_exist_here() -> None:
    named = {Path(source.path).name for path in CONFIGS for source in configs.load(path).data.train}
    assert named == set(DATA)
