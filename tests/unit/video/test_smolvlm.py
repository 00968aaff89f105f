"""SmolVLM2: images in tiles, clips by the processor's own template, sides for sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from tiny_video import SMOL
from video_rows import make_adapter, pair, run_config
from video_runs import configured, row, write_rows

from mmalign.core import Needs
from mmalign.data.example import Clip, Media, Picture
from mmalign.errors import ConfigError, DataError
from mmalign.text.model import causal_model
from mmalign.train.loop import train
from mmalign.video.processing import Processor, load_processor

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PLAIN: dict[str, Any] = {"model": {"dtype": "float32", "lora": None}}


@pytest.fixture(scope="module")
def folder(video_models: Callable[[str], Path]) -> Path:
    return video_models(SMOL)


@pytest.fixture(scope="module")
def shown(clips_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Media]:
    from PIL import Image

    made = tmp_path_factory.mktemp("pictures")
    for name, level in (("a", 40), ("b", 200)):
        Image.effect_noise((84, 60), level).convert("RGB").save(made / f"{name}.png")
    a, b = (Picture(made / f"{name}.png") for name in "ab")
    clips = [Clip(clips_dir / f"clip{i}.mp4") for i in range(2)]
    return {
        "image": Media(images=(a,)),
        "two images": Media(images=(a, b)),
        "clip": Media((clips[0],)),
        "two clips": Media((clips[1], clips[0])),
    }


@pytest.mark.parametrize("what", ["image", "two images", "clip", "two clips"])
def test_scores_are_those_of_the_model_on_its_processor_s_own_output(
    what: str, folder: Path, shown: dict[str, Media], clips_dir: Path
) -> None:
    adapter = make_adapter(folder, Needs(), moved=False, **PLAIN)
    media = shown[what]
    example = pair(clips_dir, what, media=media)
    batch = adapter.collate([example, pair(clips_dir / "clip2.mp4", "beside")])
    scored = adapter(batch, Needs()).policy.detach()

    model, inner = causal_model(adapter.policy), adapter.encoder.processor.inner
    kinds = ["video"] * len(media.videos) + ["image"] * len(media.images)
    content = [*({"type": kind} for kind in kinds), {"type": "text", "text": example.prompt}]
    text = inner.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    assert text.startswith("<|im_start|>User:")
    decoded = adapter.encoder.reader.decode(media)
    given: dict[str, Any] = {"images": list(decoded.images) or None}
    if decoded.clips:
        frames = [frames for frames, _ in decoded.clips]
        given["videos"] = [f.pixels.copy() for f in frames]
        about = {"fps": 8.0, "total_num_frames": 16, "duration": 2.0}
        numbers = [{**about, "frames_indices": list(f.indices)} for f in frames]
        given["videos_kwargs"] = {"do_sample_frames": False, "video_metadata": numbers}
    inputs = dict(inner(text=[text], return_tensors="pt", **given))
    asked = inputs.pop("input_ids")
    for k in range(2):
        mask = batch.inputs["response_mask"][0, k]
        answer = batch.inputs["response_ids"][0, k][mask][None]
        prompt = batch.inputs["prompt_ids"][0, k][batch.inputs["prompt_mask"][0, k]]
        assert prompt.tolist() == asked[0].tolist()
        ids = torch.cat([asked, answer], 1)
        inputs["attention_mask"] = torch.ones_like(ids)
        with torch.no_grad():
            logps = model(input_ids=ids, **inputs).logits[0, :-1].log_softmax(-1)
        truth = logps[asked.shape[1] - 1 :].gather(-1, answer[0, :, None])[:, 0]
        torch.testing.assert_close(scored[0, k][mask], truth, rtol=0, atol=1e-4)
    assert adapter.encoder.tokenizer.eos_token_id in adapter.encoder.end_ids


def test_what_is_shown_has_an_influence(
    folder: Path, shown: dict[str, Media], clips_dir: Path
) -> None:
    adapter = make_adapter(folder, Needs(), moved=False, **PLAIN)
    rows = [pair(clips_dir, name, media=media) for name, media in shown.items()]
    scores = adapter(adapter.collate(rows), Needs()).policy.sum((1, 2)).tolist()
    assert len({round(score, 3) for score in scores}) == len(scores)


def test_a_clip_beside_an_image_is_refused_and_not_lost(
    folder: Path, shown: dict[str, Media], clips_dir: Path
) -> None:
    adapter = make_adapter(folder, Needs(), moved=False, **PLAIN)
    both = Media(shown["clip"].videos, shown["image"].images)
    with pytest.raises(DataError, match=r"clips and images as one pixel_\w+ and keeps the clips"):
        adapter.collate([pair(clips_dir, media=both)])


@pytest.mark.runs
def test_two_steps_of_lora_move_the_language_model_alone(
    folder: Path, clips_dir: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    data = write_rows(clips_dir / "smolvlm.jsonl", (row(i) for i in range(4)))
    sections = {"train": {"num_steps": 2, "lr": 1e-2}, "sample": {"num_prompts": 2}}
    result = train(configured(tmp_path, folder, data, data={"eval_fraction": 0.5}, **sections))
    assert result.steps == 2
    samples = (result.run_dir / "samples.jsonl").read_text()
    assert samples.count('"tokens": ') in (2, 4), "one question or two, before and after"
    weights = load_file(result.run_dir / "final/adapter_model.safetensors")
    assert weights
    assert all(".text_model." in name for name in weights)
    assert all(w.abs().max() > 0 for name, w in weights.items() if "lora_B" in name)


def test_the_size_of_a_frame_is_a_side(folder: Path) -> None:
    def sizes(**video: Any) -> Any:
        config = run_config(folder, video=video)
        return Processor(load_processor(config), config).sizes

    assert sizes().size(8, 64, 128) == (56, 56)
    kept = sizes(frame_pixels=56 * 56)
    assert kept.options(8, 64, 128, None)["size"] == {"longest_edge": 112}
    assert kept.size(8, 64, 128) == (56, 56)
    with pytest.raises(ConfigError, match=r"frame_pixels is 3000: .* the least is 56 x 56"):
        sizes(frame_pixels=3000)
