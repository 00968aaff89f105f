"""The clue aggregator in a run: trained alone or with LoRA, its own copy in the reference."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from video_rows import ALL, make_adapter, pair

from mmalign.core import Needs, presets
from mmalign.data.example import Clip, Media, Picture, Sound
from mmalign.video.clues import CLUE_TOKEN
from mmalign.video.tools import VideoTools

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Models = Callable[[str], Path]

SMALL = {"num_queries": 3, "width": 32, "num_layers": 2, "cross_every": 2, "num_heads": 2}
CLASSES = (
    "qwen2_5_vl",
    pytest.param("llava_onevision", marks=pytest.mark.slow),
    "qwen2_5_omni_thinker",
)


@pytest.mark.runs
@pytest.mark.parametrize("shared", ["on", "off"])
@pytest.mark.parametrize("kind", CLASSES)
def test_clues_reach_every_class_and_gradients_reach_the_aggregator(
    kind: str, shared: str, video_models: Models, clips_dir: Path
) -> None:
    settings: dict[str, Any] = {"video": {"clues": SMALL}, "text": {"shared_prefix": shared}}
    adapter = make_adapter(video_models(kind), moved=False, **settings)
    row = pair(clips_dir / "clip0.mp4")
    batch = adapter.collate([row])
    scored = adapter(batch, ALL)
    assert presets.adpo()(scored).value.item() == pytest.approx(math.log(2.0), abs=1e-9)
    assert adapter.clues is not None
    clue_id = adapter.clues.clue_id
    heard = kind == "qwen2_5_omni_thinker"
    prompt = batch.inputs.prompt_ids[0, 0].tolist()
    assert prompt.count(clue_id) == (8 if heard else 4)
    presets.adpo()(scored).value.backward()
    lacking = [n for n, p in adapter.clues.named_parameters() if p.grad is None or not p.grad.any()]
    # The last layer's norm and such move with all others; a head no one hears with does not.
    assert [n for n in lacking if heard or ".audio." not in n] == []


def test_policy_moves_and_the_reference_stays(video_models: Models, clips_dir: Path) -> None:
    video = {"clues": SMALL, "train": []}
    adapter = make_adapter(
        video_models("llava_onevision"), moved=False, video=video, model={"lora": None}
    )
    assert adapter.clues is not None
    groups = adapter.parameter_groups(adapter.config.train)
    assert [len(group["params"]) for group in groups] == [len(list(adapter.clues.parameters()))]
    batch = adapter.collate([pair(clips_dir / "clip0.mp4")])
    before = adapter(batch, ALL)
    for parameter in adapter.clues.parameters():
        parameter.data += 0.1
    after = adapter(batch, ALL)
    assert before.reference is not None
    assert after.reference is not None
    torch.testing.assert_close(after.reference, before.reference, rtol=0, atol=0)
    assert (after.policy - before.policy).abs().max() > 1e-3


@pytest.mark.runs
def test_a_trained_aggregator_is_saved_and_started_from(
    video_models: Models, clips_dir: Path, tmp_path: Path
) -> None:
    model = video_models("llava_onevision")
    adapter = make_adapter(model, moved=False, video={"clues": SMALL})
    assert adapter.clues is not None
    for parameter in adapter.clues.parameters():
        parameter.data += 0.1
    adapter.save(tmp_path)
    assert {path.name for path in (tmp_path / "clues").iterdir()} == {
        "clues.json", "clues.safetensors"
    }  # fmt: skip
    batch = adapter.collate([pair(clips_dir / "clip0.mp4")])
    expected = adapter(batch, ALL).policy
    fresh = make_adapter(model, moved=False, video={"clues": SMALL})
    assert (fresh(batch, ALL).policy - expected).abs().max() > 1e-6
    fresh.restore(tmp_path)
    torch.testing.assert_close(fresh(batch, ALL).policy, expected, rtol=0, atol=1e-12)
    again = make_adapter(model, moved=False, video={"clues": {"path": str(tmp_path / "clues")}})
    scored = again(batch, ALL)
    torch.testing.assert_close(scored.reference, scored.policy, rtol=0, atol=1e-12)


@pytest.mark.runs
def test_clues_follow_what_is_shown(video_models: Models, clips_dir: Path, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (60, 60), "red").save(tmp_path / "a.png")
    adapter = make_adapter(video_models("qwen2_5_omni_thinker"), Needs(), video={"clues": SMALL})
    assert adapter.clues is not None
    clip = clips_dir / "clip0.mp4"
    shown = {
        "seen and heard": (Media((Clip(clip),)), 8),
        "picture": (Media(images=(Picture(tmp_path / "a.png"),)), 4),
        "sound": (Media(sounds=(Sound(clip),)), 4),
        "text": (Media(), 0),
    }
    rows = [pair(clip, name, media=media) for name, (media, _) in shown.items()]
    batch = adapter.collate(rows)
    counts = (batch.inputs.prompt_ids[:, 0] == adapter.clues.clue_id).sum(1).tolist()
    assert counts == [count for _, count in shown.values()]
    assert adapter(batch, Needs()).policy.isfinite().all()


def test_answers_are_generated_with_clues(video_models: Models, clips_dir: Path) -> None:
    adapter = make_adapter(video_models("llava_onevision"), video={"clues": SMALL}, moved=False)
    row = pair(clips_dir / "clip0.mp4")
    questions = [VideoTools().to_prompt(row), VideoTools().to_prompt(pair(clips_dir / "clip1.mp4"))]
    answers = adapter.sample(questions, max_new_tokens=4)
    assert answers == [adapter.sample([q], max_new_tokens=4)[0] for q in questions]
    # The first generated token is the likeliest one under the adapter's own scores.
    first = adapter.encoder.tokenizer.encode(answers[0], add_special_tokens=False)[:1]
    assert first
    assert CLUE_TOKEN not in answers[0]
