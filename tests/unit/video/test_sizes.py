"""What a model sees is what was said: areas a frame, times, steps, whatever its processor means."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_video
import torch
from tiny_video import OMNI, write_clip
from tiny_video_text import make_media_tokenizer
from video_rows import run_config

from mmalign.config import VideoConfig
from mmalign.data.example import Clip
from mmalign.errors import ConfigError, DataError
from mmalign.video.media import FrameCache, read_frames
from mmalign.video.processing import DecodedMedia, Processor, metadata
from mmalign.video.sizes import Frames, Sizes, Wave

QWEN, QWEN3 = "qwen2_5_vl", "qwen3_vl"
CLIPS = [(16, 720, 1280), (5, 1280, 720), (3, 480, 640), (2, 64, 64)]
WIDE = {"shortest_edge": 3136, "longest_edge": 12_845_056}
OWN: dict[str, tuple[str, dict[str, Any]]] = {
    "of a frame": ("Qwen2VL", {"size": WIDE}),
    "of a frame, capped": ("Qwen2VL", {"size": WIDE, "cap_pixels_per_frame": True}),
    "of a clip": ("Qwen3VL", {}),
    "of a clip, capped": ("Qwen3VL", {"cap_pixels_per_frame": True}),
    "of a clip and its pairs": ("Glm4v", {}),
    "shared by the frames": ("VideoLlama3", {}),
}


def own(name: str) -> Any:
    import transformers

    family, options = OWN[name]
    return getattr(transformers, f"{family}VideoProcessor")(**options)


def processor_of(kind: str, folder: Path, **video: Any) -> Processor:
    tokenizer = make_media_tokenizer(kind)
    return Processor(tiny_video._processor(kind, tokenizer), run_config(folder, video=video))


def frames_of(count: int, height: int, width: int, every: int = 3, fps: float = 24.0) -> Frames:
    """Every third frame of a clip at 24 frames a second."""
    pixels = np.random.default_rng(count).integers(0, 255, (count, height, width, 3), np.uint8)
    indices = tuple(range(0, every * count, every))
    times = tuple(number / fps for number in indices)
    return Frames(pixels, indices, times, fps, every * count, every * count / fps)


@pytest.mark.parametrize("name", OWN)
def test_an_area_is_that_of_a_frame(name: str) -> None:
    area = 50_176 if "capped" in name else 100_352
    sizes = Sizes(own(name), VideoConfig(frame_pixels=area))
    for count, height, width in CLIPS:
        shown = sizes.size(count, height, width)
        assert shown[0] * shown[1] <= area
        if height * width > area:
            assert shown[0] * shown[1] > 0.65 * area, (count, height, width, shown)
    least = sizes.size(*CLIPS[1], 12_544)  # of one clip alone
    assert 8_000 < least[0] * least[1] <= 12_544


@pytest.mark.runs
@pytest.mark.parametrize("name", OWN)
def test_frames_can_be_held_whatever_area_is_asked_for(name: str) -> None:
    """At the processor's size, or as they are where that is not known to stay."""
    for area in (3136, 50_176):
        sizes = Sizes(own(name), VideoConfig(frame_pixels=area))
        for clip in CLIPS:
            assert sizes.decoded(*clip) in (sizes.size(*clip), clip[1:])


def test_what_a_processor_cannot_do_is_refused_by_name(tmp_path: Path) -> None:
    from transformers import LlavaOnevisionVideoProcessor

    with pytest.raises(ConfigError, match=r"frame_pixels is 300: .* the least is 28 x 28"):
        Sizes(own("of a frame"), VideoConfig(frame_pixels=300))
    fixed = LlavaOnevisionVideoProcessor()
    with pytest.raises(ConfigError, match="brings every frame to one size"):
        Sizes(fixed, VideoConfig(frame_pixels=4096))
    with pytest.raises(ConfigError, match=r"LlavaOnevisionVideoProcessor\) knows no such cap"):
        Sizes(fixed, VideoConfig(cap_pixels_per_frame=True))
    with pytest.raises(ConfigError, match="image processor brings every image to one size"):
        processor_of("llava_onevision", tmp_path, image_pixels=4096)
    for settings, message in (
        (VideoConfig(frame_pixels=4096), "video.frame_pixels is set, .* takes no clips"),
        (VideoConfig(cap_pixels_per_frame=True), "the model has none"),
    ):
        with pytest.raises(ConfigError, match=message):
            Sizes(None, settings)
    with pytest.raises(DataError, match="does not take a clip of 1 frame of 64 x 48"):
        Sizes(own("of a clip"), VideoConfig()).size(1, 48, 64)
    with pytest.raises(DataError, match=r"LlavaOnevisionVideoProcessor brings .* to no max_pixels"):
        Sizes(fixed, VideoConfig()).size(4, 48, 64, 4096)


def test_clips_are_refused_by_their_kind_where_nothing_resizes_them(tmp_path: Path) -> None:
    inner = tiny_video._processor(QWEN, make_media_tokenizer(QWEN))
    inner.video_processor = inner.video_token = None
    pictures = Processor(inner, run_config(tmp_path))
    assert pictures.sizes.decoded(2, 48, 64, 1024) == (48, 64)
    with pytest.raises(DataError, match=r"row: .* takes image, but the row has video"):
        pictures(DecodedMedia([(frames_of(2, 48, 64), None)], [0.0]), "row")


def test_a_cap_is_asked_for(tmp_path: Path) -> None:
    uncapped, capped = (
        Sizes(own("of a clip"), VideoConfig(cap_pixels_per_frame=cap)).size(16, 720, 1280)
        for cap in (None, True)
    )
    assert uncapped != capped
    assert Sizes(own("of a clip, capped"), VideoConfig()).size(16, 720, 1280) == capped


@pytest.mark.runs
@pytest.mark.parametrize("kind", [QWEN, QWEN3, "llava_onevision", OMNI])
@pytest.mark.parametrize("count", [1, 2, 4, 5, 16])
def test_times_and_pixels_are_the_processors_own(kind: str, count: int, tmp_path: Path) -> None:
    """Ids, grids, steps and pixels; of frames scaled beforehand the same, bit by bit."""
    processor, whole = processor_of(kind, tmp_path), frames_of(count, 240, 416)
    if (kind, count) == (QWEN3, 1):
        with pytest.raises(DataError, match=r"row: .* does not take a clip of 1 frame"):
            processor(DecodedMedia([(whole, None)], [0.0]), "row")
        return
    found = processor(DecodedMedia([(whole, None)], [0.0]), "row")
    about = {"fps": 24.0, "frames_indices": list(whole.indices), "duration": count / 8,
             "total_num_frames": 3 * count}  # fmt: skip
    options: dict[str, Any] = {"do_sample_frames": False, "video_metadata": [about]}
    if kind == OMNI:  # it has no rate of its own, and other sizes than its video part
        options |= {"fps": whole.fps, "size": dict(processor.inner.video_processor.size)}
    theirs = processor.inner(
        text=[processor.tokens["video"]], videos=[whole.pixels.copy()], videos_kwargs=options,
        text_kwargs={"add_special_tokens": False}, return_tensors="pt",
    )  # fmt: skip
    assert set(theirs) <= set(found.tensors)
    size = processor.sizes.decoded(*whole.pixels.shape[:3])
    small = np.stack([processor.sizes.shrink(image, size) for image in whole.pixels])
    assert small.nbytes < whole.pixels.nbytes
    scaled = processor(DecodedMedia([(frames_like(whole, small), None)], [0.0]), "row")
    for name, tensor in theirs.items():
        assert torch.equal(torch.as_tensor(tensor), found.tensors[name]), name
        assert torch.equal(found.tensors[name], scaled.tensors[name]), name
    planned = processor.plan(DecodedMedia([(whole, None)], [0.0]), "row")
    assert planned is not None
    assert planned.replacements == found.replacements == scaled.replacements


def test_frames_are_held_at_the_size_of_the_processor(tmp_path: Path) -> None:
    clip = Clip(write_clip(tmp_path / "wide.mp4", frames=6, size=(640, 360)))
    sizes, settings = Sizes(own("of a frame"), VideoConfig()), VideoConfig(num_frames=4)
    whole, held = read_frames(clip, settings), read_frames(clip, settings, sizes)
    capped = read_frames(replace(clip, max_pixels=12_544), settings, sizes)
    assert whole.pixels.shape[1:3] == whole.size == held.size == capped.size == (360, 640)
    assert held.pixels.shape[1:3] == (360, 640), "within its bounds a frame is not made larger"
    size = sizes.size(4, 360, 640, 12_544)
    assert capped.pixels.shape[1:3] == size
    assert np.array_equal(capped.pixels, [sizes.shrink(image, size) for image in whole.pixels])


def test_frames_are_resized_as_the_processor_does_it() -> None:
    """Molmo2's resizes in full precision, without smoothing, and rounds."""
    from transformers import Molmo2VideoProcessor

    own = Molmo2VideoProcessor(size={"height": 56, "width": 56}, patch_size=14)
    sizes, whole = Sizes(own, VideoConfig()), frames_of(4, 250, 333).pixels
    assert sizes.decoded(4, 250, 333) == (56, 56)
    small = np.stack([sizes.shrink(image, (56, 56)) for image in whole])
    made, scaled = (
        own(videos=[torch.from_numpy(pixels).permute(0, 3, 1, 2)], do_sample_frames=False)
        for pixels in (whole, small)
    )
    assert np.array_equal(made["pixel_values_videos"], scaled["pixel_values_videos"])


def test_times_are_drawn_before_frames_are_made_smaller(tmp_path: Path) -> None:
    """Ernie's processor draws them on whole frames; a clip that is altered is left to it whole."""
    import matplotlib
    from transformers import Ernie4_5_VLMoeVideoProcessor

    font = str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")
    area = {"shortest_edge": 3136, "longest_edge": 50_176}
    own = Ernie4_5_VLMoeVideoProcessor(font=font, size=area)
    file = write_clip(tmp_path / "wide.mp4", frames=40, size=(640, 360), fps=10)
    settings, sizes = VideoConfig(num_frames=5), Sizes(own, VideoConfig())
    for clip in (Clip(file), Clip(file, start=1.0, end=3.0)):
        whole, held = read_frames(clip, settings), read_frames(clip, settings, sizes)
        assert (whole.drawn, held.drawn) == (False, True)
        assert held.pixels.nbytes < whole.pixels.nbytes / 4
        made, scaled = (
            own(
                videos=[torch.from_numpy(frames.pixels).permute(0, 3, 1, 2).contiguous()],
                video_metadata=[metadata(frames)],
                do_sample_frames=False,
                **({"draw_on_frames": False} if frames.drawn else {}),
            )
            for frames in (whole, held)
        )
        for name in ("pixel_values_videos", "video_grid_thw"):
            assert np.array_equal(made[name], scaled[name]), name
    cache = FrameCache(settings, sizes)
    assert cache.get(Clip(file)).drawn
    assert not cache.get(Clip(file), bare=True).drawn
    assert (len(cache), cache.misses) == (2, 2)
    assert not read_frames(Clip(file, max_pixels=10**9), settings, Sizes(None, settings)).drawn


def test_frames_stay_whole_where_the_tensors_would_be_others() -> None:
    """Here with numbers on them, as large as the frame lets them be."""
    from transformers import Qwen2VLVideoProcessor

    class Draws(Qwen2VLVideoProcessor):
        def _prepare_input_videos(self, videos: Any, **options: Any) -> Any:
            found = super()._prepare_input_videos(videos=videos, **options)
            for video in found:
                if not video.is_meta:
                    video[..., : video.shape[-2] // 10, : video.shape[-1] // 5] = 0
            return found

    size = {"shortest_edge": 3136, "longest_edge": 50_176}
    assert Sizes(Draws(size=size), VideoConfig()).decoded(4, 240, 320) == (240, 320)


def frames_like(frames: Frames, pixels: np.ndarray[Any, Any]) -> Frames:
    return Frames(pixels, frames.indices, frames.times, frames.source_fps, frames.num_source,
                  frames.duration)  # fmt: skip


def test_a_part_of_a_file_is_counted_from_its_start(tmp_path: Path) -> None:
    processor = processor_of(QWEN3, tmp_path)
    whole = frames_of(4, 64, 64)
    indices = tuple(number + 240 for number in whole.indices)
    times = tuple(time + 10 for time in whole.times)
    later = Frames(whole.pixels, indices, times, 24.0, 1000, 42.0, span=(240, 12))
    one, two = (
        processor(DecodedMedia([(frames, None)], [0.0]), "row") for frames in (whole, later)
    )
    assert one.replacements == two.replacements
    assert "<0.1 seconds>" in one.replacements["video"][0]


def test_several_clips_of_a_prompt_have_each_its_own_step_and_size(tmp_path: Path) -> None:
    processor = processor_of(OMNI, tmp_path)
    fast, slow = frames_of(4, 64, 64, fps=24.0), frames_of(4, 112, 64, fps=4.0)
    heard = [Wave(np.zeros(round(f.duration * 16_000), np.float32)) for f in (fast, slow)]
    clips = list(zip((fast, slow), heard, strict=True))
    both = processor(DecodedMedia(clips, [0.0, 0.0]), "row")
    alone = [processor(DecodedMedia([clip], [0.0]), "row") for clip in clips]
    steps = [part.tensors["video_second_per_grid"].item() for part in alone]
    assert steps == pytest.approx([0.25, 1.5])
    assert both.tensors["video_second_per_grid"].tolist() == pytest.approx(steps)
    assert both.replacements["video"] == tuple(p.replacements["video"][0] for p in alone)
    for name in ("pixel_values_videos", "video_grid_thw", "input_features"):
        assert torch.equal(both.tensors[name], torch.cat([p.tensors[name] for p in alone])), name
    assert both.tensors["input_ids"].shape[1] == sum(p.tensors["input_ids"].shape[1] for p in alone)

    capped = processor_of(QWEN3, tmp_path, frame_pixels=16_384)
    shapes = (4, 320, 480), (8, 480, 320)
    mute = [(frames_of(*shape), None) for shape in shapes]
    grids = capped(DecodedMedia(mute, [0.0, 0.0]), "row").tensors["video_grid_thw"].tolist()
    assert all(h * w * 16 * 16 <= 16_384 for _, h, w in grids)
    alone = [capped(DecodedMedia([clip], [0.0]), "row") for clip in mute]
    assert grids == [part.tensors["video_grid_thw"][0].tolist() for part in alone]


def test_frames_that_come_back_otherwise_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = processor_of(QWEN, tmp_path, frame_pixels=12_544)
    monkeypatch.setattr(processor.sizes, "size", lambda *_: (28, 28))
    with pytest.raises(ConfigError, match=r"made frames of \d+ x \d+, not of 28 x 28, at most 12"):
        processor(DecodedMedia([(frames_of(2, 64, 64), None)], [0.0]), "row")
