"""Answers under altered clips: which candidates a row gets, and what they are scored under."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from accelerate import Accelerator
from video_rows import make_adapter, pair
from video_runs import configured, row, write_rows

from mmalign.config import VideoConfig
from mmalign.core import presets
from mmalign.data.example import Clip, Media, Picture, Sound
from mmalign.errors import DataError
from mmalign.train.run import build_run
from mmalign.video.candidates import Perturbation

if TYPE_CHECKING:
    from collections.abc import Callable

    from mmalign.data.example import Example

    Models = Callable[[str], Path]

KIND = "llava_onevision"


def plain(clip: Path, name: str = "row") -> Example:
    one = pair(clip, name)
    return replace(one, candidates=one.candidates[:1], labels=(1.0,), kind="plain")


def test_a_row_gets_the_candidates_of_the_roles(clips_dir: Path) -> None:
    donors = tuple(Clip(clips_dir / f"clip{i}.mp4") for i in range(3))
    made = Perturbation(VideoConfig(), uses_audio=False, donors=donors)
    row = pair(clips_dir / "clip0.mp4")
    roles = ("corrupted", "rejected_corrupted", "corrupted_video")
    full = made(row, roles, 7)
    assert [c.role for c in full.candidates] == ["", "", *roles]
    assert [c.response for c in full.candidates[2:]] == [
        row.candidates[0].response,
        row.candidates[1].response,
        row.candidates[0].response,
    ]
    corrupted, rejected, video = (c.media for c in full.candidates[2:])
    assert corrupted == rejected, "both answers meet the same corrupted clip"
    assert video is not None
    assert video.change is not None
    assert video.change.operation == "swap_video"
    assert video.change.donor in donors[1:], "never its own clip"
    assert made(row, roles, 7) == full
    assert made(row, roles, 8) != full


def test_augmented_candidates_are_different_operations(clips_dir: Path) -> None:
    made = Perturbation(VideoConfig(), uses_audio=False)
    row = made(plain(clips_dir / "clip0.mp4"), ("augmented",), 0)
    changes = [c.media.change for c in row.candidates[1:] if c.media]
    assert len({change.operation for change in changes if change}) == 4
    assert made.roles(("augmented",)) == ("augmented",) * 4


def test_what_a_record_brings_is_kept(clips_dir: Path) -> None:
    made = Perturbation(VideoConfig(), uses_audio=False)
    row = pair(clips_dir / "clip0.mp4")
    own = replace(
        row.candidates[0], role="corrupted", media=Media((Clip(clips_dir / "clip1.mp4"),))
    )
    row = replace(row, candidates=(*row.candidates, own), labels=(1.0, 0.0, 0.0))
    full = made(row, ("corrupted", "rejected_corrupted"), 0)
    assert full.candidates[2] is own
    assert full.candidates[3].media == own.media


def test_a_row_that_shows_nothing_is_refused() -> None:
    row = replace(pair(Path("none")), media=Media())
    with pytest.raises(DataError, match="shows none"):
        Perturbation(VideoConfig(), uses_audio=False)(row, ("corrupted",), 0)


def test_sound_alone_is_corrupted_as_sound(clips_dir: Path) -> None:
    row = replace(
        pair(clips_dir / "clip0.mp4"), media=Media(sounds=(Sound(clips_dir / "clip0.mp4"),))
    )
    full = Perturbation(VideoConfig(), uses_audio=True)(row, ("corrupted",), 0)
    change = full.candidates[2].media.change if full.candidates[2].media else None
    assert change is not None
    assert change.operation in ("silence", "noise")


@pytest.mark.runs
@pytest.mark.parametrize("name", [
    "mdpo", "vdpo", "chip",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("vdpo_symmetric", "povid")),
])  # fmt: skip
def test_objectives_on_cells_start_at_log_2(
    name: str, video_models: Models, clips_dir: Path
) -> None:
    objective = presets.build(name)
    masks = {"masks": {"kind": "spans"}} if objective.needs.weight else {}
    adapter = make_adapter(video_models(KIND), objective.needs, moved=False, text=masks)
    row = plain(clips_dir / "clip0.mp4") if name == "vdpo" else pair(clips_dir / "clip0.mp4")
    logps = adapter(adapter.collate([row]), objective.needs)
    loss = objective(logps)
    for term, coef in zip(objective.terms.values(), objective.coefs, strict=True):
        if hasattr(term, "link"):
            assert term(logps).item() == pytest.approx(math.log(2.0), abs=1e-9), (term, coef)
    loss.value.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())
    # The same answer under another clip is another score.
    same = [k for k in range(2, logps.policy.shape[1])] or [1]
    assert all((logps.policy[0, k] - logps.policy[0, 0]).abs().max() > 1e-6 for k in same)


@pytest.mark.runs
@pytest.mark.parametrize("mode", ["hard", "soft", pytest.param("mean", marks=pytest.mark.slow)])
def test_pami_trains_on_the_clips_it_chose(
    mode: str, video_models: Models, clips_dir: Path
) -> None:
    objective = presets.pami_vdpo(beta=0.5)
    selection = {"mode": mode, "num_candidates": 3, "tau_close": -1.0}
    adapter = make_adapter(video_models(KIND), objective.needs, video={"selection": selection})
    rows = [plain(clips_dir / f"clip{i}.mp4", f"row-{i}") for i in range(2)]
    batch = adapter.collate(rows, [11, 12])
    assert batch.labels.shape == (2, 4)
    scored = adapter(batch, objective.needs)
    loss = objective(scored)
    loss.value.backward()
    choice = adapter._choice
    assert choice is not None
    assert (choice.far > 1e-9).any()
    torch.testing.assert_close(choice.weights.sum(1), torch.ones(2))
    # By hand, from all four clips scored at once.
    full = super(type(adapter), adapter).forward(batch, objective.needs)
    assert full.reference is not None
    h = (full.policy - full.reference).sum(2)  # [B, 1 + K]
    bag = -torch.nn.functional.logsigmoid(0.5 * (h[:, :1] - h[:, 1:]))
    expected = (choice.weights * bag).sum(1).mean()
    assert loss.value.item() == pytest.approx(expected.item(), abs=1e-6)
    assert scored.policy.shape[1] == (2 if mode == "hard" else 4)
    found = adapter.metrics(batch, scored)
    shares = {k: v.item() for k, v in found.items() if k.startswith(("altered/", "pami/op/"))}
    for start in ("altered/", "pami/op/"):
        each = {k.removeprefix(start): v for k, v in shares.items() if k.startswith(start)}
        assert list(each) == adapter.config.video.corruption.operations
        assert sum(each.values()) == pytest.approx(1.0)
    assert found["pami/far_max"] == choice.far.amax(1).mean()
    # Every clip has one operation: the means of the operations give the mean over clips.
    number = batch.inputs.context_operation[batch.inputs.context_index]
    assert (number[:, 0] == 0).all()
    assert (number[:, 1:] > 0).all()
    total = sum(
        shares[f"altered/{name}"] * found[f"pami/far/{name}"].nan_to_num().item()
        for name in adapter.config.video.corruption.operations
    )
    assert total == pytest.approx(choice.far.mean().item())


def test_pami_gate_moves_with_the_steps(video_models: Models, clips_dir: Path) -> None:
    objective = presets.pami_vdpo()
    selection = {"tau_close": 0.5, "tau_start": 0.9}
    adapter = make_adapter(
        video_models(KIND),
        objective.needs,
        video={"selection": selection},
        train={"num_steps": 5},
    )
    adapter.setup([plain(clips_dir / "clip0.mp4")])
    seen = []
    for step in range(5):
        seen.append(adapter.tau())
        adapter.after_step(step + 1)
    assert seen == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5])


@pytest.mark.parametrize(("processes", "steps"), [(1, 4), (2, 2)])
def test_pami_gate_counts_the_steps_that_a_run_takes(
    processes: int, steps: int, video_models: Models, clips_dir: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Of training rows, over accumulation and processes; held-out rows take none."""
    learned, kept = (
        write_rows(tmp_path / name, [row(i, "plain") for i in range(count)])
        for name, count in (("learned.jsonl", 6), ("kept.jsonl", 5))
    )
    pictures = {"pictures": str(clips_dir)}
    config = configured(
        tmp_path, video_models(KIND), {"path": str(learned), **pictures},
        data={"eval": {"path": str(kept), **pictures}},
        objective={"name": "pami_vdpo"},
        video={"selection": {"tau_close": 0.5, "tau_start": 0.9}},
        train={"num_steps": None, "num_epochs": 2, "batch_size": 1, "accumulate": 3},
    )  # fmt: skip
    monkeypatch.setattr(Accelerator, "num_processes", processes)
    adapter: Any = build_run(config, presets.pami_vdpo()).adapter
    taus = []
    for step in range(steps):
        taus.append(adapter.tau())
        adapter.after_step(step + 1)
    assert taus == pytest.approx([0.9 - 0.4 * i / (steps - 1) for i in range(steps)])
    later = make_adapter(
        video_models(KIND), presets.pami_vdpo().needs, video=config.video.model_dump()
    )
    later.load_extra_state(adapter.extra_state())
    assert later.tau() == pytest.approx(0.5), "of a checkpoint that is evaluated"


def test_spans_hold_under_a_corrupted_clip(video_models: Models, clips_dir: Path) -> None:
    needs = replace(presets.mdpo().needs, weight=True)
    adapter = make_adapter(video_models(KIND), needs, text={"masks": {"kind": "spans"}})
    batch = adapter.collate([pair(clips_dir / "clip0.mp4")])
    spans = batch.inputs.span_mask[0]
    assert spans[0].any()
    assert torch.equal(spans[0], spans[2]), "the chosen answer again, under another clip"


@pytest.mark.runs
def test_only_clips_that_come_again_are_remembered(video_models: Models, clips_dir: Path) -> None:
    objective = presets.pami_vdpo()
    adapter = make_adapter(video_models(KIND), objective.needs)
    rows = [plain(clips_dir / "clip0.mp4")]
    for draw in range(5):
        adapter(adapter.collate(rows, [draw]), objective.needs)
    assert len(adapter.features._kept) == 1
    assert len(adapter.encoder.reader._small) == 1


@pytest.mark.parametrize("shown", ["picture", "sound"])
def test_a_row_without_a_clip_is_altered_in_what_it_has(
    shown: str, video_models: Models, clips_dir: Path, tmp_path: Path
) -> None:
    from PIL import Image

    Image.effect_noise((80, 60), 90).convert("RGB").save(tmp_path / "a.png")
    media = {
        "picture": Media(images=(Picture(tmp_path / "a.png"),)),
        "sound": Media(sounds=(Sound(clips_dir / "clip0.mp4"),)),
    }[shown]
    objective = presets.mdpo()
    adapter = make_adapter(video_models("qwen2_5_omni_thinker"), objective.needs)
    row = pair(clips_dir / "clip0.mp4", media=media)
    logps = adapter(adapter.collate([row]), objective.needs)
    assert objective(logps).value.isfinite()
    assert (logps.policy[0, 2] - logps.policy[0, 0]).abs().max() > 1e-6
