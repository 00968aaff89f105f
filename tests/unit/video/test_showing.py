"""What a run and a terminal show of questions about clips."""

from __future__ import annotations

import io
import re
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from video_rows import make_adapter, pair, run_config

from mmalign.core import Needs, presets
from mmalign.data.example import Candidate, Clip, Media, Message, Picture, Sound
from mmalign.video import samples
from mmalign.video.encode import MarkedText
from mmalign.video.processing import DecodedMedia
from mmalign.video.samples import describe, in_words
from mmalign.video.sizes import SOUND_RATE, Frames, Wave
from mmalign.video.tools import VideoTools

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Models = Callable[[str], Path]

KIND = "llava_onevision"


def clip(count: int, *, side: int = 16, noise: bool = False) -> Frames:
    """Frame i is of grey 2 i, half a second after the one before."""
    pixels = np.repeat(2 * np.arange(count, dtype=np.uint8), side * side * 3)
    if noise:
        pixels = np.random.default_rng(0).integers(0, 256, len(pixels)).astype(np.uint8)
    times = tuple(i / 2 for i in range(count))
    shaped = pixels.reshape(count, side, side, 3)
    return Frames(shaped, tuple(range(count)), times, 2.0, count, count / 2)


def seen(shown: DecodedMedia) -> Image.Image:
    image = samples.sheet(shown)
    assert image is not None
    return image


def lines_of(config: object, *rows: object) -> list[str]:
    console = Console(width=400, file=io.StringIO(), record=True)
    console.print(VideoTools().show_rows(config, rows))  # pyright: ignore[reportArgumentType]
    return console.export_text(styles=True).splitlines()


def test_a_sheet_has_every_frame_in_order() -> None:
    image = np.asarray(seen(DecodedMedia([(clip(12), None)], [0.0])))
    # Eight cells of 64 pixels and gaps of 6, then four; 16 pixels of times below each.
    levels = [image[16 + row * 86, 16 + column * 70, 0] for row in (0, 1) for column in range(8)]
    assert levels[:12] == [2 * i for i in range(12)]
    assert image[70:86].max() > 100, "times are written"


def test_a_long_clip_is_shown_in_part_and_says_so() -> None:
    several = seen(DecodedMedia([(clip(100), None)], [0.0]))
    assert several.height == seen(DecodedMedia([(clip(64), None)], [0.0])).height + 22, (
        "a line of words"
    )
    assert several.width < 1020
    assert np.asarray(several)[28, 10].tolist() == [0, 0, 0]


def test_sound_is_a_curve_as_wide_as_the_frames() -> None:
    loud = np.zeros(SOUND_RATE, dtype=np.float32)
    loud[SOUND_RATE // 2 :] = 1.0
    alone = seen(DecodedMedia(sounds=[Wave(loud)]))
    blue = (np.asarray(alone) == (0x6F, 0xB1, 0xF2)).all(-1)
    left, right = blue[:, : alone.width // 2 - 2].sum(0), blue[:, alone.width // 2 + 2 :].sum(0)
    assert left.max() == 1
    assert right[:-10].min() > 38
    frames = DecodedMedia([(clip(4), None)], [0.0])
    heard = seen(DecodedMedia([(clip(4), Wave(loud))], [0.0]))
    assert heard.width == seen(frames).width
    assert samples.sheet(DecodedMedia()) is None


def test_sheets_stay_small(tmp_path: Path) -> None:
    """Noise does not compress."""
    image = seen(DecodedMedia([(clip(64, side=120, noise=True), None)], [0.0]))
    samples.write(image, tmp_path / "a" / "sheet.webp")
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["sheet.webp"]
    assert (tmp_path / "a" / "sheet.webp").stat().st_size < 250_000
    wide, high = Image.open(tmp_path / "a" / "sheet.webp").size
    assert wide / high == pytest.approx(image.width / image.height, abs=0.01)


def test_an_altered_clip_stands_below_itself() -> None:
    own = clip(4)
    other = replace(own, pixels=own.pixels[::-1])
    wave = Wave(np.ones(SOUND_RATE, dtype=np.float32))
    image = np.asarray(
        samples.compared(DecodedMedia([(own, wave)], [0.0]), DecodedMedia([(other, wave)], [0.0]))
    )
    top, below = ([int(image[y, 16 + c * 70, 0]) for c in range(4)] for y in (40, 132))
    assert top == [0, 2, 4, 6]
    assert below == top[::-1]
    assert len(image) == 6 + 2 * (22 + 70), "an unaltered sound is not drawn"
    silent = Wave(np.zeros(SOUND_RATE, dtype=np.float32))
    louder = samples.compared(
        DecodedMedia([(own, wave)], [0.0]), DecodedMedia([(own, silent)], [0.0])
    )
    assert louder.height == len(image) + 2 * 66


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("<video>\nWhat is it?", "What is it?"),
        ("<image><image>Same?", "Same?"),
        ("Is <image> like <image>?", "Is [image] like [image]?"),
        ((Message("user", "<audio> Loud?"),), "Loud?"),
        ((Message("system", "Be brief."), Message("user", "Q")), "system: Be brief.\nuser: Q"),
    ],
)
def test_prompts_are_told_in_words(prompt: object, words: str) -> None:
    assert in_words(prompt) == words  # pyright: ignore[reportArgumentType]


def test_media_are_named_with_what_is_seen_of_them() -> None:
    from pathlib import Path

    media = Media(
        (Clip(Path("/a/b.mp4"), start=1.0),),
        (Picture(Path("/a/t.parquet"), 2, "image"),),
        (Sound(Path("/c.wav")),),
    )
    wave = Wave(np.zeros(SOUND_RATE, dtype=np.float32))
    late = replace(clip(2), times=(1.0, 1.5))
    shown = DecodedMedia([(late, None)], [1.0], [Image.new("RGB", (8, 4))], [wave])
    assert describe(media, shown) == [
        {"kind": "video", "file": "b.mp4", "times": [0.0, 0.5], "width": 16, "height": 16,
         "heard": False},
        {"kind": "image", "file": "t.parquet:3 image", "width": 8, "height": 4},
        {"kind": "audio", "file": "c.wav", "seconds": 1.0},
    ]  # fmt: skip


def test_samples_hold_what_was_seen_and_where_the_answers_differ(
    video_models: Models, clips_dir: Path, tmp_path: Path
) -> None:
    text = {"masks": {"kind": "diff"}}
    adapter = make_adapter(video_models(KIND), Needs(reference=True, weight=True), text=text)
    row = pair(clips_dir / "clip0.mp4")
    answers = ("The cat plays in the sun.", "The cat sleeps in the sun.")
    candidates = [replace(c, response=a) for c, a in zip(row.candidates, answers, strict=True)]
    row = replace(row, candidates=tuple(candidates), prompt="<video>What does the cat do?")
    options = adapter.config.sample.model_copy(update={"max_new_tokens": 3})
    asked = {"row": VideoTools().to_prompt(row)}
    (record,) = VideoTools().write_samples(adapter, asked, tmp_path, 0, options)
    assert record["id"] == "row"
    assert record["prompt"] == "What does the cat do?"
    assert record["response"] == adapter.sample([VideoTools().to_prompt(row)], max_new_tokens=3)[0]
    assert record["media"][0]["file"] == "clip0.mp4"
    assert len(record["media"][0]["times"]) == 8
    assert [record["media"][0][key] for key in ("width", "height", "shown", "tokens")] == [
        64, 64, [56, 56], 33,
    ]  # fmt: skip
    assert "altered" not in record
    found = record["answers"]
    assert [(a["name"], a["text"]) for a in found] == list(
        zip(("Chosen", "Rejected"), answers, strict=True)
    )
    marked = [[a["text"][start:end] for start, end in a["spans"]] for a in found]
    assert marked == [["play"], ["sleep"]], "tokens, without the space before them"
    # The sheet is made once; its cells are the frames.
    sheet = tmp_path / record["frames"]
    frames = adapter.encoder.reader.decode(row.media).clips[0][0]
    cell = np.asarray(Image.open(sheet).convert("RGB"))[6:118:2, 6:118:2].astype(int)
    assert abs(cell - frames.pixels[0]).mean() < 8
    before = sheet.stat().st_mtime_ns
    assert VideoTools().write_samples(adapter, asked, tmp_path, 9, options) == [record]
    assert sheet.stat().st_mtime_ns == before


def test_samples_of_pami_hold_its_choice(
    video_models: Models, clips_dir: Path, tmp_path: Path
) -> None:
    objective = presets.pami_vdpo()
    adapter = make_adapter(video_models(KIND), objective.needs)
    row = pair(clips_dir / "clip0.mp4")
    row = replace(row, candidates=row.candidates[:1], labels=(1.0,), kind="plain")
    options = adapter.config.sample.model_copy(update={"max_new_tokens": 1})
    (record,) = VideoTools().write_samples(
        adapter, {"row": VideoTools().to_prompt(row)}, tmp_path, 0, options
    )
    clips = record["altered"]
    assert sorted(c["operation"] for c in clips) == sorted(
        adapter.config.video.corruption.operations
    )
    choice = adapter.choose(adapter.collate([row]))
    assert [c["far"] for c in clips] == choice.far[0].tolist()
    weights = [c["weight"] for c in clips]
    assert sorted(weights) == [0, 0, 0, 1]
    kept = [c["far"] for c in clips if c["close"] >= adapter.tau()]
    assert clips[weights.index(1.0)]["far"] == max(kept)
    assert len({(tmp_path / c["frames"]).read_bytes() for c in clips}) == 4
    assert record["answers"][0]["name"] == "Answer of the data"


def test_a_corrupted_clip_of_two_answers_is_shown_once(
    video_models: Models, clips_dir: Path, tmp_path: Path
) -> None:
    needs = presets.vdpo_symmetric().needs
    assert {"corrupted", "rejected_corrupted"} <= set(needs.roles)
    adapter = make_adapter(video_models(KIND), needs)
    options = adapter.config.sample.model_copy(update={"max_new_tokens": 1})
    question = VideoTools().to_prompt(pair(clips_dir / "clip0.mp4"))
    (record,) = VideoTools().write_samples(adapter, {"row": question}, tmp_path, 0, options)
    assert [c["role"] for c in record["altered"]] == ["corrupted"]
    assert "far" not in record["altered"][0]


def test_rows_are_shown_without_any_weights(
    video_models: Models, clips_dir: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(
        video_models(KIND), tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors")
    )
    config = run_config(
        folder,
        objective={"name": "mdpo"},
        text={"masks": {"kind": "spans"}},
        data={"train": "none", "max_response_length": 9},
        video={"num_frames": None, "fps": 4, "max_frames": 4},
    )
    lines = lines_of(config, pair(clips_dir / "clip0.mp4"), pair(clips_dir / "clip1.mp4", "b"))
    text = "\n".join(lines)
    assert "video clip0.mp4: 4 frames of 64 x 64 at 0.00 " in text
    assert "without sound, shown at 56 x 56 in 17 tokens" in text
    assert "cut: 1.6 frames a second and not 4, since video.max_frames is 4" in text
    assert "<video> x 17 " in text
    assert text.count("altered: ") == 2
    assert "[corrupted]" in text
    assert "responses_cut: 2 rows" in text
    spans = [line for line in lines if "[label 1]" in line]
    assert [re.findall(r"\x1b\[1;30;43m([^\x1b]*)", line) for line in spans] == [["plays"]] * 2


def test_shown_tokens_are_those_of_training_with_clues(
    video_models: Models, clips_dir: Path
) -> None:
    clues = {"num_queries": 3, "width": 64, "num_layers": 1, "cross_every": 1}
    given: dict[str, Any] = {"video": {"clues": clues}}
    adapter = make_adapter(video_models(KIND), **given)
    row = pair(clips_dir / "clip0.mp4")
    text = "\n".join(lines_of(run_config(video_models(KIND), **given), row))
    length = int(adapter.collate([row]).inputs.prompt_mask[0, 0].sum())
    assert f"{length} + " in text
    assert "<|clue|> x 4 " in text


def test_without_a_template_a_response_follows_its_prompt_as_the_record_has_it() -> None:
    prompt = (Message("user", "<video>The colour:"),)
    text = MarkedText({"video": "<V>"})
    context, (response,) = text.responses(prompt, [Candidate("Blue.")], "row", last=False)
    assert context + response.body == "<V>The colour:Blue."
