"""The tiny video models are real ones: they load by name, see the clip, and hear where they can."""

from __future__ import annotations

import inspect
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import pytest
import tiny_video
import torch
from safetensors.torch import load_file, save_file

from mmalign.config import ModelConfig
from mmalign.errors import ConfigError
from mmalign.video.model import load_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

OMNI = "qwen2_5_omni_thinker"
QUESTION = {"type": "text", "text": "What is it?"}


@dataclass(frozen=True)
class Loaded:
    """A model of a folder, and one row of its processor."""

    kind: str
    model: Any
    processor: Any

    def text(self, *media: str) -> str:
        """A prompt that shows media of these types."""
        content = [*({"type": name} for name in media), QUESTION]
        turns = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)

    def watch(self, frames: np.ndarray[Any, Any], *media: str, **more: Any) -> dict[str, Tensor]:
        """A row that shows eight frames, a quarter of a second apart, and more."""
        options: dict[str, Any] = {
            "do_sample_frames": False,
            "fps": 4.0,
            "video_metadata": [
                {
                    "fps": 8.0,
                    "total_num_frames": 16,
                    "frames_indices": list(range(0, 16, 2)),
                    "duration": 2.0,
                }
            ],
        }
        if self.kind == OMNI:  # its processor has a larger budget than its video part
            options["size"] = dict(self.processor.video_processor.size)
        row = self.processor(
            text=[self.text("video", *media)],
            videos=[frames],
            videos_kwargs=options,
            return_tensors="pt",
            **more,
        )
        return dict(row)

    def logits(self, row: dict[str, Tensor], **more: Any) -> Tensor:
        """[1, S, V]."""
        with torch.no_grad():
            return self.model(**row, **more).logits


def frames_of(path: Path) -> np.ndarray[Any, Any]:
    """Every second frame of a clip, [8, H, W, 3] uint8."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack(frames[::2])


def sound_of(path: Path) -> np.ndarray[Any, Any]:
    """[S] float32."""
    with av.open(str(path)) as container:
        blocks = [frame.to_ndarray()[0] for frame in container.decode(audio=0)]
    return np.concatenate(blocks)


@pytest.fixture(scope="module")
def load(video_models: Callable[[str], Path]) -> Callable[[str], Loaded]:
    """Kind to what the Auto classes make of its folder."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    known: dict[str, Loaded] = {}

    def of(kind: str) -> Loaded:
        if kind not in known:
            folder = video_models(kind)
            model = AutoModelForImageTextToText.from_pretrained(folder).eval()
            known[kind] = Loaded(kind, model, AutoProcessor.from_pretrained(folder))
        return known[kind]

    return of


@pytest.mark.parametrize("kind", tiny_video.KINDS)
def test_loads_as_its_own_class(kind: str, load: Callable[[str], Loaded]) -> None:
    tiny = load(kind)
    assert tiny.model.config.model_type == kind
    assert tiny.model.dtype == torch.float32
    name = type(tiny.model).__name__.replace("ThinkerFor", "For")
    assert type(tiny.processor).__name__ == name.replace("ForConditionalGeneration", "Processor")
    assert len(tiny.processor.tokenizer) <= 400


@pytest.mark.parametrize("kind", tiny_video.KINDS)
def test_a_clip_becomes_as_many_ids_as_features(
    kind: str, load: Callable[[str], Loaded], clips_dir: Path
) -> None:
    tiny = load(kind)
    row = tiny.watch(frames_of(clips_dir / "clip0.mp4"))
    ids = row["input_ids"][0] == tiny.processor.video_token_id
    features = video_features(tiny, row).pooler_output
    flat = torch.cat(features) if isinstance(features, tuple) else features.flatten(0, 1)
    assert ids.sum() == len(flat)
    # One run; Qwen3-VL tells the time before each of the four pairs of frames.
    runs = int((ids[1:] & ~ids[:-1]).sum())
    assert runs == (4 if kind == "qwen3_vl" else 1)


@pytest.mark.parametrize("kind", tiny_video.KINDS)
def test_features_made_beforehand_give_the_same_logits(
    kind: str, load: Callable[[str], Loaded], clips_dir: Path
) -> None:
    tiny = load(kind)
    row = tiny.watch(frames_of(clips_dir / "clip0.mp4"))
    expected = tiny.logits(row)
    features = video_features(tiny, row)
    del row["pixel_values_videos"]
    found = tiny.logits(row, mm_encoder_outputs={"video": features})
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", tiny_video.KINDS)
def test_another_clip_gives_other_logits(
    kind: str, load: Callable[[str], Loaded], clips_dir: Path
) -> None:
    tiny = load(kind)
    frames = [frames_of(clips_dir / f"clip{i}.mp4") for i in range(2)]
    first, second = (tiny.logits(tiny.watch(clip))[0, -1] for clip in frames)
    backwards = tiny.logits(tiny.watch(frames[0][::-1].copy()))[0, -1]
    assert (first - second).abs().max() > 1e-3
    assert (first - backwards).abs().max() > 1e-3


@pytest.mark.parametrize("kind", tiny_video.KINDS)
def test_the_answer_continues_the_prompt(kind: str, load: Callable[[str], Loaded]) -> None:
    tiny = load(kind)
    turns: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "image"}, QUESTION]}]
    prompt = tiny.processor.apply_chat_template(turns, add_generation_prompt=True)
    assert prompt.count(tiny.processor.image_token) == 1
    parts = [*turns, {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}]
    plain = [*turns, {"role": "assistant", "content": "A cat."}]
    whole = tiny.processor.apply_chat_template(parts)
    assert whole == tiny.processor.apply_chat_template(plain)
    assert whole.startswith(prompt)
    assert whole[len(prompt) :].strip() == "A cat." + tiny.processor.tokenizer.eos_token


@pytest.mark.parametrize("kind", tiny_video.KINDS)
def test_a_picture_is_seen(kind: str, load: Callable[[str], Loaded], clips_dir: Path) -> None:
    from PIL import Image

    tiny = load(kind)
    logits: list[Tensor] = []
    for i in range(2):
        picture = Image.fromarray(frames_of(clips_dir / f"clip{i}.mp4")[0])
        row = tiny.processor(text=[tiny.text("image")], images=[picture], return_tensors="pt")
        logits.append(tiny.logits(dict(row))[0, -1])
    assert (logits[0] - logits[1]).abs().max() > 1e-3


@pytest.mark.parametrize("played", [False, True], ids=["apart", "played with the clip"])
def test_omni_hears(played: bool, load: Callable[[str], Loaded], clips_dir: Path) -> None:
    tiny = load(OMNI)
    frames = frames_of(clips_dir / "clip0.mp4")
    logits: list[Tensor] = []
    for i in range(2):
        more: dict[str, Any] = {"audio": [sound_of(clips_dir / f"clip{i}.mp4")]}
        media = () if played else ("audio",)
        if played:
            more |= {"load_audio_from_video": True, "audio_from_video_indices": [0]}
        row = tiny.watch(frames, *media, **more)
        ids = row["input_ids"][0]
        heard = tiny.model.get_audio_features(row["input_features"], row["feature_attention_mask"])
        assert (ids == tiny.processor.audio_token_id).sum() == len(heard.last_hidden_state) == 51
        logits.append(tiny.logits(row, use_audio_in_video=played)[0, -1])
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_clips_hold_what_they_say(clips_dir: Path) -> None:
    for name, streams in (("clip0", 2), ("clip3", 2), ("mute", 1)):
        with av.open(str(clips_dir / f"{name}.mp4")) as container:
            assert len(container.streams) == streams
            video = container.streams.video[0]
            assert (video.frames, video.average_rate) == (16, 8)
            assert (video.width, video.height) == (64, 64)
    pitches = []
    for seed in range(2):
        sound = sound_of(clips_dir / f"clip{seed}.mp4")
        assert abs(len(sound) / 16_000 - 2.0) < 0.1
        pitches.append(np.abs(np.fft.rfft(sound)).argmax() * 16_000 / len(sound))
    assert pitches == pytest.approx([220.0, 233.1], abs=1.0)


def video_features(tiny: Loaded, row: dict[str, Tensor]) -> Any:
    """What the towers make of the clip of a row."""
    method = tiny.model.model.get_video_features
    known = inspect.signature(inspect.unwrap(method)).parameters
    with torch.no_grad():
        return method(**{name: value for name, value in row.items() if name in known})


@pytest.mark.parametrize("kind", tiny_video.KINDS)
def test_a_whole_model_is_loaded(kind: str, video_models: Callable[[str], Path]) -> None:
    assert load_model(str(video_models(kind)), ModelConfig(path="unused"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensor: None, r"1 of \d+ weights of .* are not in its files, e\.g\. .*q_proj"),
        (lambda tensor: tensor[:-1], "1 weights have another shape .*q_proj"),
    ],
)
def test_weights_that_would_be_noise_are_refused(
    change: Callable[[Tensor], Tensor | None],
    said: str,
    tmp_path: Path,
    video_models: Callable[[str], Path],
) -> None:
    folder = shutil.copytree(video_models("qwen2_5_vl"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    changed = change(tensors.pop(name))
    if changed is not None:
        tensors[name] = changed.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=said):
        load_model(str(folder), ModelConfig(path="unused"))
