"""Scores of video models: the model's own, shared or not, moved by what is shown."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tiny_video import KINDS, OMNI
from video_rows import ALL, gradients, make_adapter, pair

from mmalign.core import Needs, presets
from mmalign.data.example import Candidate, Clip, Media, Message, Picture, Sound
from mmalign.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from mmalign.data.example import Example
    from mmalign.video.adapter import VideoAdapter

    Models = Callable[[str], Path]


def own_logps(adapter: VideoAdapter, row: Example, answer: str, count: int) -> Tensor:
    """Log-probabilities of an answer's tokens by the model's own forward, pixels and all."""
    processor = adapter.encoder.processor
    shown = adapter.encoder.reader.show(row.media)
    frames, wave = shown.clips[0]
    asked: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": row.prompt}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
    text = processor.inner.apply_chat_template(asked, tokenize=False).rstrip("\n")
    heard: dict[str, Any] = {}
    if wave is not None:
        heard = {"audio": [wave.samples], "load_audio_from_video": True}
        heard["audio_from_video_indices"] = [0]
    inputs = processor.inner(
        text=[text],
        videos=[frames.pixels],
        videos_kwargs=processor._video_options(shown),
        return_tensors="pt",
        **heard,
    )
    wide = {k: v.double() if v.is_floating_point() and v.dim() > 1 else v for k, v in inputs.items()}
    played = {"use_audio_in_video": True} if wave is not None else {}
    logits = adapter.policy(**wide, **played).logits[0, :-1]
    return logits.log_softmax(-1).gather(-1, inputs["input_ids"][0, 1:, None])[-count:, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_gradients_are_those_of_the_model_s_own_forward(
    kind: str, video_models: Models, clips_dir: Path
) -> None:
    """Shared prompt and shared features against a pass for each answer with its own pixels."""
    adapter = make_adapter(video_models(kind), text={"shared_prefix": "on"})
    rows = [pair(clips_dir / f"clip{i}.mp4", f"row-{i}") for i in range(2)]
    scored = adapter(adapter.collate(rows), ALL)
    presets.dpo(beta=0.5)(scored).value.backward()
    ours = gradients(adapter)
    adapter.zero_grad()
    margins = []
    for b, row in enumerate(rows):
        sides = []
        for k, candidate in enumerate(row.candidates):
            count = int(scored.mask[b, k].sum())
            logps = own_logps(adapter, row, str(candidate.response), count)
            torch.testing.assert_close(scored.policy[b, k, :count], logps, rtol=0, atol=1e-9)
            reference = scored.reference
            assert reference is not None
            sides.append(logps.sum() - reference[b, k, :count].sum())
        margins.append(sides[0] - sides[1])
    torch.nn.functional.logsigmoid(0.5 * torch.stack(margins)).mean().neg().backward()
    torch.testing.assert_close(ours, gradients(adapter), rtol=0, atol=1e-9)
    assert ours.abs().max() > 1e-3


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-9)])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_equal_plain_ones(
    kind: str, dtype: str, tolerance: float, video_models: Models, clips_dir: Path
) -> None:
    rows = [pair(clips_dir / f"clip{i}.mp4", f"row-{i}") for i in range(2)]
    rows.append(pair(clips_dir / "clip0.mp4", "text", media=Media()))  # nothing shown
    results: list[tuple[Tensor, Tensor]] = []
    for shared in ("on", "off"):
        settings: dict[str, Any] = {"text": {"shared_prefix": shared}}
        if shared == "off":
            settings["video"] = {"feature_cache": 0}
        model = {"dtype": dtype}
        adapter = make_adapter(video_models(kind), model=model, **settings)
        scored = adapter(adapter.collate(rows), ALL)
        weighted = scored.replace(weight=scored.mask.to(scored.policy.dtype))
        loss = presets.rrpo(beta=0.5, alpha=0.05)(weighted).value
        loss.backward()
        results.append((loss.detach(), gradients(adapter)))
    (loss, grads), (plain_loss, plain_grads) = results
    scale = float(plain_grads.abs().max())
    torch.testing.assert_close(loss, plain_loss, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grads, plain_grads, rtol=0, atol=tolerance * max(scale, 1.0))


@pytest.mark.parametrize("trained", ["lora", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_policy_equals_reference_at_the_start(
    kind: str, trained: str, video_models: Models, clips_dir: Path
) -> None:
    model = {} if trained == "lora" else {"lora": None}
    adapter = make_adapter(video_models(kind), moved=False, model=model).train()
    scored = adapter(adapter.collate([pair(clips_dir / "clip0.mp4")]), ALL)
    assert scored.reference is not None
    assert scored.kl is not None
    torch.testing.assert_close(scored.policy, scored.reference, rtol=0, atol=1e-12)
    assert scored.kl.abs().max() < 1e-12
    assert presets.dpo()(scored).value.item() == pytest.approx(math.log(2.0), abs=1e-12)
    trainable = {n for n, p in adapter.policy.named_parameters() if p.requires_grad}
    assert trainable
    assert not [n for n in trainable if any(t in n for t in ("visual", "tower", "projector"))]


@pytest.mark.parametrize("kind", KINDS)
def test_another_clip_moves_the_score(kind: str, video_models: Models, clips_dir: Path) -> None:
    adapter = make_adapter(video_models(kind), Needs())
    rows = [pair(clips_dir / f"clip{i}.mp4", f"row-{i}") for i in (0, 1)]
    first, second = adapter(adapter.collate(rows), Needs()).policy
    assert (first - second).abs().max() > 1e-3
    again = adapter(adapter.collate(rows[:1]), Needs()).policy[0]
    torch.testing.assert_close(first, again, rtol=0, atol=1e-12)
