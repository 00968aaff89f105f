"""Losses for text on answers about clips, unchanged: divergences, token losses, kinds of rows."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from video_rows import gradients, make_adapter, pair, run_config

from mmalign.core import DIVERGENCES, Needs, presets
from mmalign.video.tools import VideoTools

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from mmalign.core import Objective

    Models = Callable[[str], Path]

KIND = "qwen2_5_vl"


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def scored(
    objective: Objective, folder: Path, clip: Path, *, moved: bool = True, **sections: Any
) -> tuple[Any, Any]:
    adapter = make_adapter(folder, objective.needs, moved=moved, **sections)
    rows = [pair(clip, f"row-{i}", prompt=f"Question {i}?") for i in range(2)]
    return adapter, adapter(adapter.collate(rows), objective.needs)


@pytest.mark.runs
@pytest.mark.parametrize(
    "divergence",
    [
        name if name in ("forward_kl", "js") else pytest.param(name, marks=pytest.mark.slow)
        for name in sorted(DIVERGENCES)
    ],
)
def test_every_divergence_starts_at_log_2_and_moves(
    divergence: str, video_models: Models, clips_dir: Path
) -> None:
    keywords = {"alpha": 0.5} if divergence == "alpha" else {}
    objective = presets.f_dpo(divergence=divergence, beta=0.1, **keywords)
    folder, clip = video_models(KIND), clips_dir / "clip0.mp4"
    _, start = scored(objective, folder, clip, moved=False)
    assert objective(start).value.item() == pytest.approx(math.log(2.0), abs=1e-9)
    adapter, logps = scored(objective, folder, clip)
    objective(logps).value.backward()
    assert gradients(adapter).isfinite().all()
    assert gradients(adapter).abs().max() > 0


@pytest.mark.runs
@pytest.mark.parametrize(
    ("name", "sections"),
    [
        slow("tdpo1", {}),
        ("tdpo2", {}),
        ("sparse_po", {"text": {"masks": {"kind": "learned"}}}),
        slow("sparse_po", {"text": {"masks": {"kind": "activations"}}}),
        ("rrpo", {"text": {"masks": {"kind": "spans"}}}),
        slow("rrpo", {"text": {"masks": {"kind": "diff", "min_match": 1}}}),
        slow("tpo_temporal", {}),
        ("adpo", {}),
        slow("wpo", {}),
        slow("ipo", {}),
        slow("nca", {}),
        ("simpo", {}),
        slow("orpo", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else str(sorted(value)),
)
def test_losses_of_text_apply_to_video(
    name: str, sections: dict[str, Any], video_models: Models, clips_dir: Path
) -> None:
    objective = presets.build(name)
    adapter, logps = scored(objective, video_models(KIND), clips_dir / "clip0.mp4", **sections)
    loss = objective(logps).value
    loss.backward()
    assert loss.isfinite()
    assert gradients(adapter).abs().max() > 0


@pytest.mark.runs
def test_rrpo_without_spans_counts_whole_answers_or_not_at_all(
    video_models: Models, clips_dir: Path
) -> None:
    objective = presets.rrpo()
    row = pair(clips_dir / "clip0.mp4")
    bare = replace(row, candidates=tuple(replace(c, spans=()) for c in row.candidates))
    for on_empty in ("drop", "full"):
        masks = {"masks": {"kind": "spans", "on_empty": on_empty}}
        adapter = make_adapter(video_models(KIND), objective.needs, text=masks)
        kept = VideoTools().survey(adapter.config, objective.needs, [[row, bare], []]).train
        assert kept == ([row] if on_empty == "drop" else [row, bare])
        logps = adapter(adapter.collate(kept), objective.needs)
        if on_empty == "full":
            assert torch.equal(logps.weight[1].bool(), logps.mask[1])
        assert 0 < logps.weight[0].sum() < logps.mask[0].sum()


@pytest.mark.runs
def test_candidates_backward_in_turn_give_the_joint_gradient(
    video_models: Models, clips_dir: Path
) -> None:
    from accelerate import Accelerator

    from mmalign.train.backward import backward_joint, backward_per_candidate

    objective = presets.rrpo(beta=0.5, alpha=0.1)
    found = []
    for backward in (backward_joint, backward_per_candidate):
        adapter = make_adapter(
            video_models(KIND), objective.needs, text={"masks": {"kind": "spans"}}
        )
        batch = adapter.collate([pair(clips_dir / "clip0.mp4")])
        keywords = {} if backward is backward_joint else {"tolerance": 1e-6}
        backward(Accelerator(cpu=True), adapter, objective, batch, **keywords)
        found.append(gradients(adapter))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-9)


@pytest.mark.runs
def test_a_cached_reference_is_the_live_one(
    video_models: Models, clips_dir: Path, tmp_path: Path
) -> None:
    """Its hidden states where a KL is needed, read back for a policy that has moved on."""
    objective = presets.tdpo2()
    folder = video_models(KIND)
    rows = [pair(clips_dir / f"clip{i}.mp4", f"row-{i}") for i in range(2)]
    live = make_adapter(folder, objective.needs)
    expected = live(live.collate(rows), objective.needs)
    cached = make_adapter(
        folder, objective.needs, reference={"kind": "cached", "cache": str(tmp_path)}
    )
    assert cached._cache is not None
    with cached._cache.store:
        for row in rows:
            values = live.reference_values(live.collate([row]), objective.needs)
            cached._cache.put(row, values[cached._cache.name][0])
    logps = cached(cached.collate(rows), objective.needs)
    torch.testing.assert_close(logps.reference, expected.reference, rtol=0, atol=1e-9)
    torch.testing.assert_close(logps.kl, expected.kl, rtol=0, atol=1e-9)


@pytest.mark.runs
def test_features_on_disk_are_found(
    video_models: Models, clips_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmalign.video import contexts, tools

    rows = [pair(clips_dir / f"clip{i}.mp4", f"row-{i}") for i in range(3)]
    sections: dict[str, Any] = {"output": str(tmp_path / "run"), "model": {"dtype": "float32"}}
    config = run_config(video_models(KIND), **sections)
    monkeypatch.setattr(tools, "load_usable", lambda *_: (rows[:2], rows[2:]))
    said = VideoTools().write_cache(config, Needs(reference=True))
    assert "features of 3 media written, 0 were there" in said
    assert "0 media written, 3 were" in VideoTools().write_cache(config, Needs(reference=True))
    fresh = make_adapter(video_models(KIND), model={"dtype": "float32"})
    expected = fresh(fresh.collate(rows), Needs()).policy
    adapter = make_adapter(video_models(KIND), **sections)
    monkeypatch.setattr(contexts, "encode", lambda *_: pytest.fail("they are on disk"))
    batch = adapter.collate(rows)
    assert not [name for name in batch.inputs.flat() if "pixel" in name]
    torch.testing.assert_close(adapter(batch, Needs()).policy, expected, rtol=0, atol=1e-5)
