"""Every number of the schema at its ends: refused in one sentence, or the run starts."""

from __future__ import annotations

import json
import typing
from typing import TYPE_CHECKING, Any

import pytest
import seeded_clips
import seeded_pictures
import seeded_text
from forked import fork
from harness import SEED, require_sentence, stream
from pydantic import BaseModel
from seeded import at

from mmalign import config as configs
from mmalign.config import RunConfig
from mmalign.errors import MmalignError
from mmalign.preflight.check import check_config

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from seeded import GoodRun

ENDS = (-1, 0, 1e-300, 0.999999, 1, 3, 10**6, 2**31, 2**63, 10**30, 1e300)
OWN_SECTION = ("diffusion.", "video.")
NEVER = ("train.num_threads", "data.num_workers")  # what they cost is the machine's
SECONDS = 30.0


def settings(
    model: type[BaseModel], above: str = "", within: tuple[type[BaseModel], ...] = ()
) -> Iterator[tuple[str, bool]]:
    """Every number of a schema, of lists the first, and whether it must be whole.

    A model that holds others of its own kind (judges of judges) is entered once.
    """
    for name, field in model.model_fields.items():
        at, kinds, todo = f"{above}{name}", set[Any](), [field.annotation]
        while todo:
            kind = todo.pop()
            if typing.get_origin(kind) in (list, tuple):
                at += ".0"
            elif isinstance(kind, type) and issubclass(kind, BaseModel):
                if kind not in (model, *within):
                    yield from settings(kind, f"{at}.", (model, *within))
            elif kind in (int, float):
                kinds.add(kind)
            todo += typing.get_args(kind)
        if kinds:
            yield at, float not in kinds


def cases(modality: str) -> list[str]:
    """Settings of a modality at their ends, as overrides; those of all belong to text."""
    found: list[str] = []
    for key, whole in settings(RunConfig):
        own = next((start for start in OWN_SECTION if key.startswith(start)), "")
        if own != {"text": "", "diffusion": "diffusion.", "video": "video."}[modality]:
            continue
        ends = [end for end in ENDS if not (whole and isinstance(end, float))]
        found += [f"{key}={json.dumps(end)}" for end in ends if key not in NEVER]
    return found


def check(run: GoodRun, overrides: list[str]) -> None:
    from mmalign.train.loop import train

    run.write()
    file, said = run.folder / "config.json", run.folder / "said.txt"
    for override in overrides:
        try:
            config = configs.load(file, [override])
            check_config(config)
        except MmalignError as error:
            require_sentence(str(error), override)
            continue
        with at(run.folder):
            status = fork(lambda c=config: train(c, dry_run=True), said).wait(SECONDS)
        text = said.read_text(encoding="utf-8")
        assert status in (0, 2), f"{override}, seed {SEED}: exit {status}: {text[-600:]}"
        if status == 2:
            require_sentence(text.splitlines()[-1], override)


def run_on_text(folder: Path, model: Path) -> GoodRun:
    """A good run that reads the numbers of sources, of momenta and of a moving average too."""
    run = seeded_text.good_run(folder, model, stream("extremes"))
    run.set("data.train", [{"path": "data.jsonl"}])
    run.set("train.betas", [0.9, 0.999])
    run.set("reference.kind", "ema")
    return run


def test_a_few_numbers_at_their_ends(tiny_llama_dir: Path, tmp_path: Path) -> None:
    run = run_on_text(tmp_path, tiny_llama_dir)
    check(run, stream("extremes", "few").sample(cases("text"), 3))


@pytest.mark.slow
def test_numbers_of_all_runs_at_their_ends(tiny_llama_dir: Path, tmp_path: Path) -> None:
    run = run_on_text(tmp_path, tiny_llama_dir)
    check(run, cases("text"))


@pytest.mark.slow
def test_numbers_of_pictures_at_their_ends(sd15_dir: Path, tmp_path: Path) -> None:
    run = seeded_pictures.good_run(tmp_path, sd15_dir, stream("extremes"))
    check(run, cases("diffusion"))


@pytest.mark.slow
def test_numbers_of_clips_at_their_ends(
    video_models: Callable[[str], Path], clips_dir: Path, tmp_path: Path
) -> None:
    folder = video_models("qwen2_5_vl")
    run = seeded_clips.good_run(tmp_path, folder, clips_dir, stream("extremes"))
    check(run, cases("video"))
