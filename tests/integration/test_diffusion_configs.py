"""Every diffusion file in configs/ trains: dry-run on a tiny pipeline of its family's wiring.

Only what makes it large is exchanged: the model, the data, the resolution, the number of rows a
micro-batch, and the sampler's steps where clean images are generated beforehand.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import tiny_pictures
from selected import some_configs

from mmalign import config as configs

if TYPE_CHECKING:
    from collections.abc import Callable

    from mmalign.config import RunConfig

CONFIGS = sorted(
    path
    for model in ("sd15", "sdxl", "sd3", "flux")
    for path in (Path(__file__).resolve().parents[2] / "configs").glob(f"*_{model}.yaml")
)
DATA: dict[str, Callable[..., Path]] = {
    "pictures.jsonl": tiny_pictures.pairs,
    "scored.jsonl": tiny_pictures.scored_pairs,
    "captioned_pairs.jsonl": tiny_pictures.captioned_pairs,
    "rated.jsonl": tiny_pictures.rated,
    "captioned.jsonl": tiny_pictures.captioned,
    "ranked.jsonl": tiny_pictures.ranked,
    "prompts.txt": tiny_pictures.prompts,
}
"""The names that configs give their data, to what lies under them."""

SIDE, ROWS = 32, 6


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for name, write in DATA.items():
        folder = tmp_path_factory.mktemp(name)
        files[name] = write(folder, ROWS, size=(SIDE, SIDE + 8))
    return files


def shrunk(path: Path, model: Path, data: dict[str, Path], folder: Path) -> RunConfig:
    """The config with a tiny model and tiny images in place of its own, all else as it is."""
    (source,) = configs.load(path).data.train
    layout = f", layout: {source.layout}" if source.layout else ""
    sizes = [f"diffusion.resolution={SIDE}", "train.batch_size=2", "diffusion.sampling.num_steps=2"]
    own = [f"model.path={model}", f"output={folder / 'run'}"]
    train = f"data.train={{path: {data[Path(source.path).name]}{layout}}}"
    return configs.load(path, [*own, train, *sizes])


STEMS = [path.stem for path in CONFIGS]
TWINS = {s for s in STEMS if s.endswith("_sdxl") and s.replace("_sdxl", "_sd15") in STEMS}
"""Configs of SDXL whose method also has one of SD 1.5."""


@pytest.mark.parametrize("path", some_configs(CONFIGS, slow=TWINS))
def test_config_dry_runs(
    path: Path,
    data: dict[str, Path],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from mmalign.train.loop import train

    pipeline = request.getfixturevalue(f"{path.stem.rpartition('_')[2]}_dir")
    config = shrunk(path, pipeline, data, tmp_path)
    train(config, dry_run=True)
    said = capsys.readouterr().out
    found = re.search(r"loss\s+(-?[\d.e+-]+|nan|-?inf)", said)
    assert found, said
    loss = float(found[1])
    assert math.isfinite(loss)
    if config.objective.name in LOG_2:
        assert loss == pytest.approx(math.log(2), abs=1e-5)
    assert not config.output.exists(), "a dry run writes nothing"


LOG_2 = ("diffusion_dpo", "f_dpo", "smpo", "inpo", "diffusion_npo", "dcpo", "flow_dpo")
"""Objectives that say log 2 where policy and reference are equal."""


def test_data_files_are_those_that_exist_here() -> None:
    named = {Path(source.path).name for path in CONFIGS for source in configs.load(path).data.train}
    assert named == set(DATA)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_stated_rows_a_step_are_those_of_the_numbers(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    config = configs.load(path)
    stated = re.search(r"# (\d+) (?:pairs|images) a step", text)
    if stated:
        assert config.train.batch_size * config.train.accumulate == int(stated[1])
    product = re.search(r"1e-8 times (\d+) pairs", text)
    if product:
        assert config.train.lr == pytest.approx(1e-8 * int(product[1]))
        assert stated
        assert stated[1] == product[1]
