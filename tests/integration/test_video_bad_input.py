"""What people get wrong about clips, through the command line: one message, and no traceback."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner
from video_runs import row, write_config, write_rows

from mmalign.cli import app

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Models = Callable[[str], Path]

KIND, OMNI = "qwen2_5_vl", "qwen2_5_omni_thinker"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, clips_dir: Path) -> Path:
    """Four pairs beside their clips; mute.mp4 has no sound, broken.mp4 is empty."""
    folder = tmp_path_factory.mktemp("data")
    for path in clips_dir.glob("*.mp4"):
        shutil.copy(path, folder)
    (folder / "broken.mp4").write_bytes(b"")
    return write_rows(folder / "rows.jsonl", [row(i) for i in range(4)])


def refused(command: str, config: Path, *options: object) -> str:
    """The message of a command that must refuse, before it has written anything."""
    result = CliRunner().invoke(app, [command, str(config), *map(str, options)])
    assert isinstance(result.exception, SystemExit), result.exc_info
    assert result.exit_code == 1, result.output
    assert not (config.parent / "run").exists(), "nothing may be written"
    messages = [line for line in result.output.splitlines() if re.match(r"\w+Error: ", line)]
    assert len(messages) == 1, result.output
    assert "Traceback" not in result.output
    return result.output[result.output.index("Error: ") + 7 :]


def with_media(data: Path, name: str, *changes: dict[str, Any]) -> Path:
    """A file beside the data whose first rows are changed."""
    rows = [row(i) for i in range(4)]
    for record, change in zip(rows, changes, strict=False):
        record |= change
    return write_rows(data.with_name(f"{name}.jsonl"), rows)


# -- settings that do not fit each other -------------------------------------------------------

SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "two ways to choose frames": (
        {"video": {"num_frames": 8, "fps": 1.0}},
        "exactly one of video.num_frames and video.fps .*num_frames: null, fps: 1",
    ),
    "no way to choose frames": (
        {"video": {"num_frames": None}},
        "exactly one of video.num_frames and video.fps",
    ),
    "altered clips in text": (
        {"modality": "text", "video": {"num_frames": 16}, "objective": {"name": "mdpo"}},
        "the objective scores corrupted candidates.*only modality: video makes. Use another",
    ),
    "a choice among no clips": (
        {"video": {"selection": {"num_candidates": 2}}},
        "video.selection is set, but the objective chooses among no clips; only pami_vdpo",
    ),
    "altered clips from a cache": (
        {"objective": {"name": "mdpo"}, "reference": {"kind": "cached"}},
        "reference.kind is cached, but the objective scores corrupted candidates.*lora-off",
    ),
    "an unknown operation": (
        {"objective": {"name": "mdpo"}, "video": {"corruption": {"operations": ["rotate"]}}},
        "video.corruption.operations.0.*'rotate'.*rotate90",
    ),
    "nothing is trained": (
        {"video": {"train": []}},
        "video.train is empty, and there is no clue aggregator",
    ),
    "a section of another modality": (
        {"diffusion": {"resolution": 64}},
        "diffusion is only read with modality: diffusion .found video.; remove it",
    ),
    "video settings in text": (
        {"modality": "text"},
        "video is only read with modality: video .found text.; remove it",
    ),
    "a LoRA that fits nothing": (
        {"model": {"lora": {"targets": ["query"]}}},
        "model.lora.targets: query fits no linear layer of language .video.train.*it has .*q_proj",
    ),
    "spans that are not there": (
        {"objective": {"name": "rrpo"}, "text": {"masks": {"kind": "spans"}}},
        "none of 4 rows has a span to learn from; give spans_chosen and spans_rejected, or use",
    ),
    "weights of tokens": (
        {"objective": {"name": "rrpo"}},
        "needs a weight for every token, but text.masks is not set. Set it",
    ),
    "a size where frames have one": (
        {"video": {"frame_pixels": 4096}},
        "video.frame_pixels is set, but .* brings every frame to one size .*remove it",
    ),
    "a cache that is not there": (
        {"reference": {"kind": "cached"}},
        "reference.kind is cached, but .* lacks ref_logps of 4 of 4 rows .*mmalign cache CONFIG",
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name: str, video_models: Models, data: Path, tmp_path: Path) -> None:
    sections, message = SETTINGS[name]
    model = video_models("llava_onevision" if name == "a size where frames have one" else KIND)
    config = write_config(tmp_path, model, data, **sections)
    said = refused("train", config)
    assert re.search(message, said), said


# -- models -------------------------------------------------------------------------------------


@pytest.mark.runs
def test_models_of_another_kind(
    video_models: Models, tiny_llama_dir: Path, sd15_dir: Path, data: Path, tmp_path: Path
) -> None:
    foreign = tmp_path / "foreign"  # the weights of one class, the processor of another
    shutil.copytree(video_models("llava_onevision"), foreign)
    for path in video_models(KIND).iterdir():
        if path.name not in ("config.json", "generation_config.json", "model.safetensors"):
            shutil.copy(path, foreign)
    wider = tmp_path / "wider"  # a processor that knows more tokens than are embedded
    shutil.copytree(video_models(KIND), wider)
    add_tokens(wider, 100)
    bare = tmp_path / "bare"  # weights alone
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(video_models(KIND) / name, bare)
    used = with_media(data, "used", {"chosen": "<extra-99>"})
    said = refused("train", write_config(tmp_path / "runs", wider, used))
    assert re.search("row-0.*<extra-99>.*the model embeds", said), said
    for path, message in {
        tiny_llama_dir: "for a model of text alone set modality: text",
        sd15_dir: "is a pipeline of diffusers; set modality: diffusion",
        tmp_path / "nowhere": "nowhere': no such folder, and cannot read a processor",
        foreign: "cannot encode what its processor made .*must belong together",
        bare: "bare': cannot read a processor: .*preprocessor_config.json",
    }.items():
        said = refused("train", write_config(tmp_path / "runs", path, data))
        assert re.search(message, said), said


def add_tokens(folder: Path, count: int) -> None:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.add_tokens([f"<extra-{i}>" for i in range(count)])
    processor.save_pretrained(folder)


@pytest.mark.runs
def test_a_video_model_under_another_modality(
    video_models: Models, data: Path, tmp_path: Path
) -> None:
    plain = {"modality": "text", "video": {}}
    rows = write_rows(
        tmp_path / "text.jsonl",
        [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in (1, 2)],
    )
    file = write_config(tmp_path, video_models(KIND), rows, **plain)
    given = json.loads(file.read_text(encoding="utf-8"))
    del given["video"]
    file.write_text(json.dumps(given), encoding="utf-8")
    said = refused("train", file)
    assert "is a model of text and media (qwen2_5_vl); set modality: video" in said
    said = refused("train", file, f"data.train={data}")
    assert re.search("4 of 4 rows have a video, image or audio .*modality: video", said)


# -- media --------------------------------------------------------------------------------------


NOTHING = {"prompt": "What is in <video>?", "video": None}


def test_media_that_stop_a_run(video_models: Models, data: Path, tmp_path: Path) -> None:
    folder = data.parent
    runs = tmp_path / "runs"

    def said(kind: str, file: Path, **video: Any) -> str:
        text = refused("train", write_config(runs, video_models(kind), file, video=video))
        return text

    broken = with_media(data, "broken", {}, {"video": "broken.mp4"})
    text = said(KIND, broken, bad_media="stop")
    assert "1 of 4 media files cannot be used:" in text
    assert f"{folder / 'broken.mp4'}: the file is empty" in text
    assert "set video.bad_media to drop" in text

    mute = with_media(data, "mute", {"video": "mute.mp4"})
    assert said(OMNI, mute, bad_media="stop") == said(OMNI, mute, missing_audio="stop")
    text = said(OMNI, mute, missing_audio="stop")
    assert f"{folder / 'mute.mp4'}: has no audio track, and the model takes audio" in text
    assert "video.missing_audio to drop or ignore" in text

    heard = with_media(data, "heard", {"audio": "clip0.mp4"})
    text = said(KIND, heard, bad_media="stop")
    assert "1 of 4 rows have audio (the first is 'row-0')" in text
    assert "Take them out, or use a model that does" in text


def test_records_that_do_not_name_media_rightly(
    video_models: Models, data: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    for name, change, message in (
        ("twice", {"prompt": "<video> or <video>?"}, "must name <video> as often as there are"),
        ("outside", {"video": "../../secret.mp4"}, "video must stay inside"),
        ("absolute", {"video": "/etc/passwd"}, "video must stay inside"),
        ("gone", {"video": "clip9.mp4"}, "clip9.mp4: cannot be read: No such file"),
        ("address", {"video": "https://example.org/a.mp4"}, "must be a file here: download"),
        ("span", {"start": 3, "end": 1}, "start and end must be seconds, 0 <= start < end"),
        ("late", {"start": 30, "end": 40}, "the clip is from 30 seconds to 40; the file has 2"),
        ("both", {"videos": ["clip0.mp4"]}, "video and videos are both there"),
        ("features", {"video": "clip0.npy"}, "holds features; give the clip itself"),
    ):
        file = with_media(data, name, {}, change)
        config = write_config(runs, video_models(KIND), file, video={"bad_media": "stop"})
        said = refused("train", config)
        assert message in said, said
        if name not in ("late", "gone"):
            assert f"{file}:2 (id 'row-1')" in said
    text = with_media(data, "token", {"prompt": "A <|video_pad|> token"})
    config = write_config(runs, video_models(KIND), text)
    said = refused("train", config, "--dry-run")
    assert "row-0'): the prompt's text has <|video_pad|> 2 times, but 1 of kind video are" in said
    said = refused("train", config, f"data.train={with_media(data, 'mark', NOTHING)}")
    assert "row-0'): the prompt names <video> 1 times, but the row has 0" in said
    file = with_media(data, "bare", NOTHING | {"prompt": "A <|video_pad|> token"})
    said = refused("train", config, f"data.train={file}")
    assert "row-0'): the prompt's text writes the model's own <|video_pad|>, but nothing is" in said


def test_rows_that_show_nothing_cannot_be_altered(
    video_models: Models, data: Path, tmp_path: Path
) -> None:
    file = with_media(data, "words", {"video": None})
    config = write_config(tmp_path, video_models(KIND), file, objective={"name": "mdpo"})
    said = refused("train", config)
    assert (
        "row-0'): the objective compares answers under perturbed media, but the row shows" in said
    )


def test_questions_that_cannot_be_asked(
    video_models: Models, tiny_llama_dir: Path, data: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, video_models(KIND), data)
    for name, record, message in (
        ("twice", {"prompt": "<video>?"}, "names <video> 1 times, but the row has 0"),
        ("gone", {"prompt": "?", "video": "clip9.mp4"}, "clip9.mp4: cannot be read: No such file"),
        ("broken", {"prompt": "?", "video": "broken.mp4"}, "broken.mp4: the file is empty"),
        (
            "heard",
            {"prompt": "?", "audio": "clip0.mp4"},
            "heard.jsonl:1: Qwen2_5_VL.*has audio",
        ),
        ("none", {"note": "?"}, "has no `prompt`"),
    ):
        file = write_rows(data.with_name(f"ask-{name}.jsonl"), [record])
        said = refused("sample", config, "--base", "--prompts", file)
        assert re.search(message, said), said
    file = write_rows(data.with_name("ask-text.jsonl"), [{"prompt": "?", "video": "clip0.mp4"}])
    text = {"modality": "text", "video": {}}
    config = write_config(tmp_path, tiny_llama_dir, data, **text)
    given = json.loads(config.read_text(encoding="utf-8"))
    del given["video"]
    config.write_text(json.dumps(given), encoding="utf-8")
    said = refused("sample", config, "--base", "--prompts", file)
    assert "only a model of modality video looks at" in said


def test_data_check_counts_and_decodes_media(data: Path) -> None:
    changes = ({"image": "broken.mp4"}, {"audio": "clip0.mp4"}, {"video": "broken.mp4"})
    file = with_media(data, "checked", *changes)
    result = CliRunner().invoke(app, ["data", "check", str(file)])
    assert "shown    4 clips (4 files), 1 image (1 file), 1 sound (1 file)" in result.output
    result = CliRunner().invoke(app, ["data", "check", "--decode", str(file)])
    assert result.exit_code == 1
    assert "problems in 2 of 4 records" in result.output
    assert f"{file}:1 (id 'row-0'): what is shown must be decodable, but" in result.output
    assert "broken.mp4: the file is empty. 1 more has the same problem: 3." in result.output


# -- Ctrl-C -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(
    video_models: Models, data: Path, tmp_path: Path
) -> None:
    steps = {"num_steps": 5000, "save_every": 1}
    path = write_config(tmp_path, video_models(KIND), data, train=steps)
    process = subprocess.Popen(
        [sys.executable, "-m", "mmalign", "train", str(path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "checkpoint-1").is_dir():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in out + err
    assert "SIGINT: saving after this step" in err
    assert "--resume" in out + err
