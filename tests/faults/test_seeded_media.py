"""Every fault of a run on images or clips is told before its first step; good runs are silent."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import seeded_clips
import seeded_pictures
from harness import stream
from seeded import cases, faults_of, heard, require_told

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

OF_PICTURES, OF_CLIPS = faults_of(seeded_pictures), faults_of(seeded_clips)


@pytest.mark.runs
def test_a_fault_of_pictures_is_told(sd15_dir: Path, tmp_path: Path) -> None:
    name = stream("quick").choice(sorted(OF_PICTURES))
    require_told(OF_PICTURES[name], seeded_pictures.good_run(tmp_path, sd15_dir, stream(name)))


@pytest.mark.runs
def test_a_fault_of_clips_is_told(
    video_models: Callable[[str], Path], clips_dir: Path, tmp_path: Path
) -> None:
    name = stream("quick").choice(sorted(OF_CLIPS))
    model = video_models("qwen2_5_vl")
    require_told(OF_CLIPS[name], seeded_clips.good_run(tmp_path, model, clips_dir, stream(name)))


def test_good_runs_say_nothing(
    sd15_dir: Path, video_models: Callable[[str], Path], clips_dir: Path, tmp_path: Path
) -> None:
    folders = [tmp_path / name for name in ("pictures", "clips")]
    for folder in folders:
        folder.mkdir()
    model = video_models("qwen2_5_vl")
    assert heard(seeded_pictures.good_run(folders[0], sd15_dir, stream("good"))) == ([], "")
    assert heard(seeded_clips.good_run(folders[1], model, clips_dir, stream("good"))) == ([], "")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(OF_PICTURES))
def test_every_fault_of_pictures_is_told(name: str, sd15_dir: Path, tmp_path: Path) -> None:
    for number, folder in cases(tmp_path, 2):
        require_told(
            OF_PICTURES[name], seeded_pictures.good_run(folder, sd15_dir, stream(name, number))
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(OF_CLIPS))
def test_every_fault_of_clips_is_told(
    name: str, video_models: Callable[[str], Path], clips_dir: Path, tmp_path: Path
) -> None:
    model = video_models("qwen2_5_vl")
    for number, folder in cases(tmp_path, 2):
        run = seeded_clips.good_run(folder, model, clips_dir, stream(name, number))
        require_told(OF_CLIPS[name], run)
