"""Scores of video models: the model's own, shared or not, moved by what is shown."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tiny_video import KINDS, OMNI
from transformers import GenerationConfig
from video_rows import ALL, gradients, make_adapter, pair

from mmalign.core import Needs, presets
from mmalign.data.example import Candidate, Clip, Media, Message, Picture, Sound
from mmalign.errors import ConfigError, DataError
from mmalign.text.model import causal_model
from mmalign.video.adapter import VideoAdapter
from mmalign.video.tools import VideoTools

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from mmalign.data.example import Example

    Models = Callable[[str], Path]


FEW = ("qwen3_vl", OMNI)
"""Classes that differ most: deep features and turned positions, sound."""

SEVERAL = [kind if kind in FEW else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]


def own_logps(adapter: VideoAdapter, row: Example, answer: str, count: int) -> Tensor:
    """Log-probabilities of an answer's tokens by the model's own forward, pixels and all."""
    processor = adapter.encoder.processor
    shown = adapter.encoder.reader.decode(row.media)
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
        videos=[frames.pixels.copy()],
        videos_kwargs=processor._video_options(shown),
        return_tensors="pt",
        **heard,
    )
    wide = {
        k: v.double() if v.is_floating_point() and v.dim() > 1 else v for k, v in inputs.items()
    }
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


@pytest.mark.runs
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [pytest.param("float32", 1e-5, marks=pytest.mark.slow), ("float64", 1e-9)],
)
@pytest.mark.parametrize("kind", SEVERAL)
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
@pytest.mark.parametrize("kind", SEVERAL)
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


@pytest.mark.runs
@pytest.mark.parametrize("kind", SEVERAL)
def test_another_clip_moves_the_score(kind: str, video_models: Models, clips_dir: Path) -> None:
    adapter = make_adapter(video_models(kind), Needs())
    rows = [pair(clips_dir / f"clip{i}.mp4", f"row-{i}") for i in (0, 1)]
    first, second = adapter(adapter.collate(rows), Needs()).policy
    assert (first - second).abs().max() > 1e-3
    again = adapter(adapter.collate(rows[:1]), Needs()).policy[0]
    torch.testing.assert_close(first, again, rtol=0, atol=1e-12)


@pytest.mark.runs
@pytest.mark.parametrize("kind", SEVERAL)
def test_pictures_and_several_media_are_seen(
    kind: str, video_models: Models, clips_dir: Path, tmp_path: Path
) -> None:
    from PIL import Image

    for name, value in (("a", 40), ("b", 200)):
        Image.effect_noise((80, 60), value).convert("RGB").save(tmp_path / f"{name}.png")
    pictures = [Picture(tmp_path / f"{name}.png") for name in "ab"]
    first, second = (Clip(clips_dir / f"clip{i}.mp4") for i in (0, 1))
    adapter = make_adapter(video_models(kind), Needs())
    shown = [
        Media(images=(pictures[0],)),
        Media(images=(pictures[1],)),
        Media((first,), (pictures[0],)),
        Media((first,), (pictures[1],)),
        Media((first, second)),
        Media((second, first)),
    ]
    rows = [pair(first.path, f"row-{i}", media=media) for i, media in enumerate(shown)]
    scores = adapter(adapter.collate(rows), Needs()).policy.sum((1, 2)).tolist()
    assert len({round(score, 6) for score in scores}) == len(scores)


def test_media_stand_where_the_prompt_names_them(video_models: Models, clips_dir: Path) -> None:
    adapter = make_adapter(video_models("qwen2_5_vl"), Needs())
    clip = clips_dir / "clip0.mp4"
    words = "Look at <video> and say what the cat does."
    rows = [
        pair(clip, "front"),
        pair(clip, "named", prompt=words),
        pair(clip, "turns", prompt=(Message("user", "Hi"), Message("user", words))),
    ]
    ids = [adapter.encoder.encode_example(row)[0].prompt for row in rows]
    token = adapter.encoder.processor.token_ids["video"]
    assert [row.count(token) for row in ids] == [16, 16, 16]
    starts = [row.index(token) for row in ids]
    assert starts[0] < starts[1] < starts[2]
    with pytest.raises(DataError, match="names <video> 2 times, but the row has 1"):
        adapter.encoder.encode_example(pair(clip, prompt="<video> or <video>?"))


def test_a_text_that_writes_the_model_s_own_token_is_refused(
    video_models: Models, clips_dir: Path
) -> None:
    adapter = make_adapter(video_models("qwen2_5_vl"), Needs())
    clip = clips_dir / "clip0.mp4"
    with pytest.raises(DataError, match="the text itself writes the token"):
        adapter.collate([pair(clip, prompt="What is <|video_pad|>?")])
    sides = (Candidate("A <|video_pad|>."), Candidate("None."))
    with pytest.raises(DataError, match="response writes one of the model's own tokens"):
        adapter.collate([pair(clip, candidates=sides)])


@pytest.mark.runs
def test_a_long_question_is_cut_behind_the_clip(video_models: Models, clips_dir: Path) -> None:
    words = " ".join(f"word{i}" for i in range(60))
    row = pair(clips_dir / "clip0.mp4", prompt=words)
    whole = make_adapter(video_models("qwen2_5_vl"), Needs())
    full = whole.encoder.encode_example(row)[0].prompt
    token = whole.encoder.processor.token_ids["video"]
    for keep in ("keep_end", "keep_start"):
        data = {"max_prompt_length": 40, "truncate_prompt": keep}
        adapter = make_adapter(video_models("qwen2_5_vl"), Needs(), data=data)
        cut = adapter.encoder.encode_example(row)[0].prompt
        assert cut.count(token) == 16
        assert len(cut) == 40 + 16
        assert adapter.encoder.counts["prompts_cut"] == 1
        last = len(full) - full[::-1].index(token)
        assert cut[:last] == full[:last]
        assert (cut[-8:] == full[-8:]) == (keep == "keep_end")
        assert adapter(adapter.collate([row]), Needs()).policy.isfinite().all()
    narrow = make_adapter(video_models("qwen2_5_vl"), Needs(), data={"max_prompt_length": 3})
    with pytest.raises(DataError, match="raise it, or shorten the prompt"):
        narrow.collate([row])


@pytest.mark.runs
def test_sound_is_heard_and_never_dropped(video_models: Models, clips_dir: Path) -> None:
    adapter = make_adapter(video_models(OMNI), Needs())
    clip, other = Clip(clips_dir / "clip0.mp4"), Sound(clips_dir / "clip1.mp4")
    rows = [
        pair(clip.path, "own"),
        pair(clip.path, "other", media=Media((clip,), sounds=(other,))),
        pair(clip.path, "alone", media=Media(sounds=(other,))),
    ]
    scores = adapter(adapter.collate(rows), Needs()).policy.sum((1, 2)).tolist()
    off = make_adapter(video_models(OMNI), Needs(), video={"sound": "off"})
    scores += off(off.collate(rows[:1]), Needs()).policy.sum((1, 2)).tolist()
    assert len({round(score, 6) for score in scores}) == 4
    with pytest.raises(DataError, match=r"mute\.mp4"):
        adapter.collate([pair(clips_dir / "mute.mp4")])
    mute = make_adapter(video_models(OMNI), Needs(), video={"no_sound": "mute"})
    assert mute(mute.collate([pair(clips_dir / "mute.mp4")]), Needs()).policy.isfinite().all()
    deaf = make_adapter(video_models("qwen2_5_vl"), Needs())
    with pytest.raises(DataError, match=r"takes .* but the row has audio"):
        deaf.collate(rows[1:2])


def test_features_are_made_once_for_all_that_look_at_a_clip(
    video_models: Models, clips_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmalign.video import contexts
    from mmalign.video.model import encode

    made: list[int] = []
    encode = encode

    def counted(*arguments: Any) -> Any:
        made.append(1)
        return encode(*arguments)

    monkeypatch.setattr(contexts, "encode", counted)
    rows = [pair(clips_dir / "clip0.mp4", f"row-{i}", prompt=f"Question {i}?") for i in range(3)]
    adapter = make_adapter(video_models("qwen2_5_vl"), text={"shared_prefix": "off"})
    adapter._arrange(adapter.collate([pair(clips_dir / "clip1.mp4", "trial")]))  # tries the model
    made.clear()
    first = adapter(adapter.collate(rows), ALL)
    assert len(made) == 1, "six answers, policy and reference"
    batch = adapter.collate(rows)
    assert not [name for name in batch.inputs.flat() if "pixel" in name], "kept for the next time"
    torch.testing.assert_close(adapter(batch, ALL).policy, first.policy, rtol=0, atol=0)
    assert len(made) == 1
    trained = make_adapter(
        video_models("qwen2_5_vl"), text={"shared_prefix": "off"},
        video={"train": ["language", "projector", "tower"]},
    )  # fmt: skip
    trained._arrange(trained.collate(rows[:1]))
    made.clear()
    scored = trained(trained.collate(rows[:1]), ALL)
    assert len(made) == 2, "policy and reference have towers of their own"
    presets.dpo()(scored).value.backward()
    reached = {n for n, p in trained.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("visual.blocks" in name for name in reached)
    assert any("visual.merger" in name for name in reached)


def test_a_frozen_copy_shares_what_is_not_trained(video_models: Models) -> None:
    adapter: Any = make_adapter(video_models("llava_onevision"), model={"lora": None})
    copied = dict(adapter.reference.module.named_parameters())
    for name, parameter in adapter.policy.named_parameters():
        assert (copied[name] is parameter) == (not parameter.requires_grad), name


@pytest.mark.runs
def test_a_row_alone_scores_as_in_a_batch_and_answers_are_given(
    video_models: Models, clips_dir: Path
) -> None:
    adapter = make_adapter(video_models("qwen2_5_omni_thinker"), Needs())
    rows = [pair(clips_dir / f"clip{i}.mp4", f"row-{i}") for i in range(3)]
    asked = [VideoTools().to_prompt(row) for row in rows]
    for options in ({}, {"temperature": 1.0}):
        together = adapter.sample(asked, max_new_tokens=6, **options)
        alone = [adapter.sample([one], max_new_tokens=6, **options)[0] for one in asked]
        assert together == alone
        assert len(set(together)) > 1
    several = adapter.sample([asked[0], asked[0]], max_new_tokens=6, temperature=1.0)
    assert several[0] == together[0] != several[1]


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_no_setting_that_a_model_ships_changes_an_answer(
    lora: Any, video_models: Models, clips_dir: Path
) -> None:
    adapter = make_adapter(video_models("llava_onevision"), Needs(), model={"lora": lora})
    asked = [VideoTools().to_prompt(pair(clips_dir / "clip0.mp4"))]

    def answers() -> list[str]:
        greedy = adapter.sample(asked, max_new_tokens=6)
        return [*greedy, *adapter.sample(asked, max_new_tokens=6, temperature=1.0)]

    bare = answers()
    shipped = GenerationConfig(
        bad_words_ids=[[token] for token in range(20, 200)], max_length=2, min_p=0.9, num_beams=2,
        repetition_penalty=5.0, suppress_tokens=list(range(20, 200)), top_k=1, typical_p=0.1,
    )  # fmt: skip
    inner = causal_model(adapter.policy)
    inner.generation_config = shipped
    assert answers() == bare
    assert inner.generation_config is shipped


def test_a_question_is_the_same_wherever_its_clip_lies(clips_dir: Path, tmp_path: Path) -> None:
    rows = [
        pair(folder / "clip0.mp4", name) for folder, name in ((clips_dir, "a"), (tmp_path, "b"))
    ]
    first, second = (repr(VideoTools().to_prompt(row)) for row in rows)
    assert first == second
    assert "clip0.mp4" in first
    assert repr(VideoTools().to_prompt(pair(clips_dir / "clip1.mp4"))) != first


def test_a_model_of_text_alone_is_refused(tiny_llama_dir: Path) -> None:
    with pytest.raises(ConfigError, match="modality: text"):
        make_adapter(tiny_llama_dir)


@pytest.mark.runs
def test_of_a_whole_omni_model_the_thinker_is_taken(
    video_models: Models, clips_dir: Path, tmp_path: Path
) -> None:
    """The released checkpoints hold a talker beside it, and name its weights `thinker.*`."""
    import json
    import shutil

    from safetensors.torch import load_file, save_file
    from transformers import Qwen2_5OmniConfig

    thinker = video_models(OMNI)
    shutil.copytree(thinker, tmp_path, dirs_exist_ok=True)
    settings = json.loads((thinker / "config.json").read_text())
    Qwen2_5OmniConfig(thinker_config=settings).save_pretrained(tmp_path)
    weights = load_file(thinker / "model.safetensors")
    named = {f"thinker.{name}": tensor for name, tensor in weights.items()}
    save_file(named, tmp_path / "model.safetensors", metadata={"format": "pt"})
    rows = [pair(clips_dir / "clip0.mp4")]
    whole, alone = (make_adapter(folder, Needs()) for folder in (tmp_path, thinker))
    torch.testing.assert_close(
        whole(whole.collate(rows), Needs()).policy, alone(alone.collate(rows), Needs()).policy
    )
