"""What no model can take is known before one is loaded: files, frames, sounds, positions."""

from __future__ import annotations

import json
import re
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image
from tiny_video import OMNI, write_clip
from video_runs import configured, row, write_rows

from mmalign.errors import ConfigError, DataError
from mmalign.inference import plan_cache, write_cache
from mmalign.models.adapter import survey_rows
from mmalign.preflight.check import check_config as check
from mmalign.train.loop import train
from mmalign.train.run import build_run
from mmalign.video import survey as video_survey
from mmalign.video.processing import DecodedMedia, Processor

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from mmalign.models.adapter import Surveyed

    Models = Callable[[str], Path]

QWEN, QWEN3 = "qwen2_5_vl", "qwen3_vl"
LONG = " ".join(["word"] * 40)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, clips_dir: Path) -> Path:
    """Four clips; one of a single frame, one of 35 seconds, one without sound, one broken."""
    folder = tmp_path_factory.mktemp("rows")
    for path in clips_dir.glob("*.mp4"):
        shutil.copy(path, folder)
    write_clip(folder / "still.mp4", frames=1)
    write_clip(folder / "long.mp4", frames=35, fps=1)
    Image.new("RGB", (640, 480)).save(folder / "wide.png")
    (folder / "broken.mp4").write_bytes(b"")
    return folder


@pytest.fixture
def survey(video_models: Models, data: Path, tmp_path: Path) -> Callable[..., Surveyed]:
    def of(kind: str, *changes: dict[str, Any], count: int = 3, **sections: Any) -> Surveyed:
        rows = [row(i) for i in range(count)]
        for record, change in zip(rows, changes, strict=False):
            record |= change
        file = write_rows(data / f"{abs(hash(json.dumps(rows)))}.jsonl", rows)
        config = configured(tmp_path, video_models(kind), file, **sections)
        return survey_rows(config, check(config).needs)

    return of


def kept(found: Surveyed) -> list[str]:
    return [row.id for row in found.train]


def test_clips_that_take_much_memory_are_named(
    survey: Callable[..., Surveyed], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what is held: frames are made smaller as they are decoded where that changes nothing."""
    much, sizes = video_survey._MUCH, []
    monkeypatch.setattr(video_survey, "_MUCH", 0)
    for pixels in (None, 1024):
        (note,) = survey(QWEN, video={"num_frames": 4, "frame_pixels": pixels}).notes
        named = (
            r"3 of 3 clips are read at a size .* ([\d,]+) bytes .*\(4 frames of (\d+) x (\d+) of /"
        )
        found = re.search(named, note)
        assert found, note
        count, width, height = (int(text.replace(",", "")) for text in found.groups())
        assert count == 4 * width * height * 3
        sizes.append(count)
    assert sizes[1] <= 4 * 1024 * 3 < sizes[0]
    monkeypatch.setattr(video_survey, "_MUCH", much)
    assert survey(QWEN, video={"num_frames": 4}).notes == ()


def test_clips_of_one_length_and_size_are_planned_once(
    survey: Callable[..., Surveyed], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[int] = []
    plan = Processor.plan

    def counted(self: Processor, shown: DecodedMedia, where: str) -> Any:
        planned.append(len(shown.clips[0][0].indices))
        return plan(self, shown, where)

    monkeypatch.setattr(Processor, "plan", counted)
    alike = [{"video": f"clip{i}.mp4"} for i in range(3)]
    found = survey(QWEN3, *alike, {"video": "long.mp4"}, count=4)
    assert len(kept(found)) == 4
    assert len(planned) == 2, "the longer one has other times"


def test_clips_whose_tokens_only_pixels_tell_are_read_one_by_one(
    survey: Callable[..., Surveyed], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A processor that looks at them may give two clips of one length and size other tokens."""
    read: list[bytes] = []
    call = Processor.__call__

    def counted(self: Processor, shown: DecodedMedia, where: str) -> Any:
        read.append(shown.clips[0][0].pixels.tobytes())
        return call(self, shown, where)

    monkeypatch.setattr(Processor, "plan", lambda *_: None)
    monkeypatch.setattr(Processor, "__call__", counted)
    alike = [{"video": f"clip{i % 3}.mp4"} for i in range(4)]
    assert len(kept(survey(QWEN3, *alike, count=4))) == 4
    assert len(read) == len(set(read)) == 3


def test_good_rows_say_nothing(
    survey: Callable[..., Surveyed], caplog: pytest.LogCaptureFixture
) -> None:
    for kind in (QWEN, OMNI, "llava_onevision"):
        found = survey(kind)
        assert kept(found) == ["row-0", "row-1", "row-2"]
        assert not found.notes
    assert not caplog.messages


@pytest.mark.parametrize(
    ("kind", "clip", "fault"),
    [
        (QWEN, "gone.mp4", "gone.mp4: cannot be read: No such file"),
        (QWEN, "broken.mp4", "broken.mp4: the file is empty"),
        (OMNI, "mute.mp4", "mute.mp4: has no audio track, and the model takes audio"),
        (OMNI, "long.mp4", "long.mp4: a sound of 35.0 s, but .* keeps 30 s"),
        (QWEN3, "still.mp4", "still.mp4: Qwen3VLVideoProcessor does not take a clip of 1 frame"),
    ],
)  # fmt: skip
def test_one_policy_for_all_that_cannot_be_shown(
    kind: str,
    clip: str,
    fault: str,
    survey: Callable[..., Surveyed],
    caplog: pytest.LogCaptureFixture,
) -> None:
    by_rate = {"num_frames": None, "fps": 2, "max_frames": 4}
    found = survey(kind, {"video": clip}, {"video": clip}, video=by_rate)
    assert kept(found) == ["row-2"]
    named = [message for message in caplog.messages if clip in message]
    assert len(named) == 1, "each file once"
    assert caplog.messages[-1].startswith("2 of 3 rows are left out for the 1 ")
    with pytest.raises(DataError, match=fault):
        survey(kind, {"video": clip}, video={**by_rate, "bad_media": "stop"})
    with pytest.raises(DataError, match=rf"no row is left to train on: 3 of 3 rows(.|\n)*{fault}"):
        survey(kind, *[{"video": clip}] * 3, video=by_rate)


def test_a_frame_alone_is_padded_where_the_processor_pads(
    survey: Callable[..., Surveyed], caplog: pytest.LogCaptureFixture
) -> None:
    for kind in (QWEN, "llava_onevision"):
        assert len(kept(survey(kind, {"video": "still.mp4"}, video={"num_frames": 1}))) == 3
    assert not caplog.messages


def test_rows_beyond_the_positions_are_named_by_what_takes_them(
    survey: Callable[..., Surveyed], caplog: pytest.LogCaptureFixture
) -> None:
    many = {"video": None, "videos": ["clip0.mp4"] * 80}
    assert kept(survey(QWEN, many, video={"num_frames": 16})) == ["row-1", "row-2"]
    assert (
        "clip0.mp4: takes 2,560 tokens, with which a row is beyond the model's 2,048"
        in (caplog.messages[0])
    )
    words = {"prompt": "What is it? " * 600}
    with pytest.raises(DataError, match=r"row-0.*at most 2,048 tokens.*data.bad_rows"):
        survey(QWEN, words, data={"max_prompt_length": 9000})


def test_a_row_has_its_own_rate_and_size(survey: Callable[..., Surveyed]) -> None:
    found = survey(QWEN, {"fps": 1.0, "max_pixels": 3136})
    assert [clip.fps for row in found.train for clip in row.media.videos] == [1.0, None, None]
    with pytest.raises(DataError, match=r"no row is left(.|\n)*clip0.mp4: .*to no max_pixels"):
        survey("llava_onevision", {"max_pixels": 3136}, count=1)


def test_pictures_have_an_area_too(
    survey: Callable[..., Surveyed], video_models: Models, data: Path, tmp_path: Path
) -> None:
    shown = {"video": None, "image": "wide.png"}
    large, small = (
        survey(QWEN, shown, count=1, video={"image_pixels": area}, data={"max_prompt_length": 40})
        for area in (100_352, 12_544)
    )
    assert kept(large) == kept(small) == ["row-0"]
    with pytest.raises(ConfigError, match=r"video\.image_pixels is set, but"):
        survey("llava_onevision", shown, count=1, video={"image_pixels": 4096})


@pytest.mark.runs
def test_a_cache_is_as_large_as_was_planned(
    video_models: Models, data: Path, tmp_path: Path
) -> None:
    file = write_rows(data / "cached.jsonl", [row(i) for i in range(4)])
    config = configured(tmp_path, video_models(QWEN3), file, reference={"kind": "cached"})
    planned = plan_cache(config).splitlines()
    assert planned[0].startswith("features of media: 4 of 4 to write, ")
    assert planned[1].startswith("rows of the reference: 4 of 4 to write, ")
    write_cache(config)
    written = sum(file.stat().st_size for file in (tmp_path / "cache").glob("*.safetensors"))
    told = float(planned[-1].split(" bytes")[0].replace(",", ""))
    assert 0.9 * written < told < 1.15 * written
    again = plan_cache(config).splitlines()
    assert [line.split(" to write")[0] for line in again[:2]] == [
        "features of media: 0 of 4",
        "rows of the reference: 0 of 4",
    ]


def test_what_the_survey_says_is_not_said_again(
    video_models: Models, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = write_rows(data / "once.jsonl", [row(i) for i in range(3)])
    sections = {"text": {"chat_template": str(data / "endless.jinja")}}
    (data / "endless.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}"
        "{% else %}{% for c in m.content %}{{ '<video>' if c.type == 'video' else c.text }}"
        "{% endfor %}{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    config = configured(tmp_path, video_models("video_llava"), rows, **sections)
    with caplog.at_level("WARNING"):
        train(config, dry_run=True)
    said = [record.getMessage() for record in caplog.records]
    assert sum("no end token after a response" in line for line in said) == 1, said


def test_one_answer_about_two_clips_is_something_to_learn_from(
    survey: Callable[..., Surveyed],
) -> None:
    """Clips of one length have the same tokens; only where both sides show one, nothing is left."""
    same = {"chosen": f"{LONG} a", "rejected": f"{LONG} b", "video": "clip0.mp4"}
    short = {"max_response_length": 20}
    other = [{**same, "prompt": "What?", "video_rejected": f"clip{i}.mp4"} for i in (1, 0)]
    (cut, note) = survey(QWEN, *other, data=short).notes
    assert "responses cut" in cut
    assert "1 of 3 pairs have the same tokens on both sides" in note
    assert "row-1" in note


@pytest.mark.runs
@pytest.mark.parametrize(
    ("kind", "objective", "of", "added"),
    [
        (QWEN, "mdpo", "pair", 1),
        (QWEN, "vdpo_symmetric", "pair", 2),
        (QWEN, "vista_dpo", "vista", 3),
        (QWEN, "vdpo_symmetric", "counterfactual", 1),
        (QWEN3, "mdpo", "pair", 1),  # times of frames stand in the prompt
        (OMNI, "chip", "pair", 1),
        ("llava_onevision", "pami_vdpo", "plain", 4),
    ],
)  # fmt: skip
def test_the_tokens_of_candidates_that_are_made_are_counted_before_the_first_step(
    kind: str, objective: str, of: str, added: int, video_models: Models, data: Path, tmp_path: Path
) -> None:
    """To the token as a batch has them, whatever is drawn; a short prompt's row is not refused."""
    rows = [row(i, of) for i in range(4)]
    rows[2]["prompt"] += " Say it in many more words than anybody else would."
    file = write_rows(data / f"{objective}-{kind}-{of}.jsonl", rows)
    given = {"objective": {"name": objective}, "video": {"num_frames": 4}}
    if objective == "chip":
        given["text"] = {"masks": {"kind": "diff"}}
    free = configured(tmp_path / "free", video_models(kind), file, **given)
    run = build_run(free, check(free))
    counts = set()
    for visit in range(6):
        batch = run.adapter.collate(run.train_rows, [10 * visit + i for i in range(4)])
        counts.add(tuple(batch.inputs.read().sizes()))
    (sizes,) = counts
    assert batch.labels.shape[1] == len(run.train_rows[0].candidates) + added
    most = max(sizes)
    assert run.train_rows[sizes.index(most)].id == "row-2"
    assert sorted(sizes)[-2] < most - 1

    def bounded(most: int, **more: Any) -> Surveyed:
        section = {"tokens_per_batch": most}
        config = configured(tmp_path, video_models(kind), file, **given, train=section, **more)
        return survey_rows(config, check(config).needs)

    assert len(kept(bounded(most))) == 4
    said = (
        rf"'row-2'\): rows must have at most {most - 1:,} tokens.*train.tokens_per_batch lets.*"
        rf"this one has {most:,} with the candidates that the objective adds"
    )
    with pytest.raises(DataError, match=said):
        bounded(most - 1)
    left = bounded(most - 1, data={"bad_rows": "drop"})
    assert kept(left) == ["row-0", "row-1", "row-3"]


@pytest.mark.runs
def test_a_run_whose_made_candidates_are_too_many_tokens_takes_no_step(
    video_models: Models, data: Path, tmp_path: Path
) -> None:
    """The two responses of a row alone would pass."""
    file = write_rows(data / "made.jsonl", [row(i) for i in range(4)])
    train_on = {"objective": {"name": "dpo"}, "train": {"tokens_per_batch": 120}}
    config = configured(tmp_path, video_models(QWEN), file, **train_on)
    assert len(kept(survey_rows(config, check(config).needs))) == 4
    config = configured(
        tmp_path, video_models(QWEN), file, **{**train_on, "objective": {"name": "mdpo"}}
    )
    with pytest.raises(DataError, match=r"row-0.*at most 120 tokens.* 3 more"):
        train(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.runs
def test_pictures_and_more_made_candidates_are_counted_too(
    video_models: Models, data: Path, tmp_path: Path
) -> None:
    """A row about an image has it altered; what was found for fewer candidates is not read."""
    shown = {"video": None, "image": "wide.png"}
    file = write_rows(data / "wide.jsonl", [row(i, "plain") | shown for i in range(2)])
    for copies in (2, 3):
        video = {"image_pixels": 12_544, "selection": {"num_candidates": copies}}
        given = {"objective": {"name": "pami_vdpo"}, "video": video}
        free = configured(tmp_path / f"{copies}", video_models(QWEN), file, **given)
        run = build_run(free, check(free))
        most = max(run.adapter.collate(run.train_rows).inputs.read().sizes())
        bounds = [{"train": {"tokens_per_batch": bound}} for bound in (most - 1, most)]
        less, enough = (
            configured(tmp_path / f"{copies}", video_models(QWEN), file, **given, **bound)
            for bound in bounds
        )
        with pytest.raises(DataError, match=rf"has {most:,} with the candidates"):
            train(less)
        train(enough)
