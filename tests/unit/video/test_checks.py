"""Rows whose media cannot be used: left out and named once, or the run stops, by policy."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from media_files import cut, write_numbered
from PIL import Image

from mmalign.config import VideoConfig
from mmalign.config.sections import say_once
from mmalign.data.example import Candidate, Clip, Example, Media, Picture, Sound
from mmalign.errors import DataError
from mmalign.video.checks import MediaReport, check_media, keep_usable

TIMES = [100 * i for i in range(20)]


def usable_rows(
    parts: list[list[Example]], settings: VideoConfig, *, uses_audio: bool
) -> list[list[Example]]:
    report = check_media([row for part in parts for row in part], settings, uses_audio=uses_audio)
    return keep_usable(parts, report, settings, uses_audio=uses_audio)


def row(name: str, *clips: Clip, candidate: Media | None = None, **media: Any) -> Example:
    return Example(
        name,
        "What is seen?",
        (Candidate("yes", media=candidate), Candidate("no")),
        (1.0, 0.0),
        media=Media(videos=clips, **media),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips with sound, one without, and five that are broken in different ways."""
    folder = tmp_path_factory.mktemp("media")
    good = write_numbered(folder / "good.mp4", TIMES, beeps=[0.5])
    write_numbered(folder / "mute.mp4", TIMES)
    Image.new("RGB", (8, 8)).save(folder / "good.png")
    cut(good, folder / "cut.mp4", 0.7)
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("no video" * 99)
    (folder / "text.png").write_text("no picture" * 99)
    (folder / "list.mp4").write_text("#EXTM3U\n#EXTINF:2,\ngood.mp4\n#EXT-X-ENDLIST\n")
    return folder


@pytest.fixture
def rows(folder: Path) -> list[Example]:
    def clip(name: str) -> Clip:
        return Clip(folder / name)

    return [
        row("good", clip("good.mp4")),
        row("cut", clip("cut.mp4")),
        row("cut again", clip("good.mp4"), Clip(folder / "cut.mp4", 0.5)),
        row("early", Clip(folder / "cut.mp4", 0.0, 0.5)),
        row("empty", clip("empty.mp4")),
        row("text", clip("good.mp4"), candidate=Media(videos=(clip("text.mp4"),))),
        row("picture", images=(Picture(folder / "text.png"), Picture(folder / "good.png"))),
        row("sound", sounds=(Sound(folder / "list.mp4"), Sound(folder / "good.mp4"))),
        row("gone", clip("gone.mp4")),
        row("words"),
    ]


BROKEN = {"cut.mp4", "empty.mp4", "text.mp4", "text.png", "list.mp4", "gone.mp4"}


def test_each_broken_file_is_named_once_and_its_rows_go(
    rows: list[Example], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        (kept,) = usable_rows([rows], VideoConfig(num_frames=4), uses_audio=True)
    assert [row.id for row in kept] == ["good", "early", "words"]
    for name in BROKEN:
        named = [record.message for record in caplog.records if name in record.message]
        assert len(named) == 1, named
    assert "the file is empty" in caplog.text
    assert "is cut off after" in caplog.text
    last = caplog.records[-1].message
    assert last == "7 of 10 rows are left out for the 6 of 8 media files named above"
    assert len(caplog.records) == 7


def test_stop_names_them_and_how_many(rows: list[Example]) -> None:
    with pytest.raises(DataError, match="6 of 8 media files cannot be used") as caught:
        usable_rows([rows], VideoConfig(num_frames=4, bad_media="stop"), uses_audio=False)
    assert all(str(caught.value).count(name) == 1 for name in BROKEN)
    many = [row(str(i), Clip(Path(f"/nowhere/{i}.mp4"))) for i in range(12)]
    with pytest.raises(DataError, match="and 2 more"):
        usable_rows([many], VideoConfig(bad_media="stop"), uses_audio=False)


def test_the_earlier_name_of_the_policy_is_read_and_named_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    say_once.cache_clear()
    for _ in range(2):
        config = VideoConfig.model_validate({"no_sound": "mute"})
        assert config == VideoConfig(missing_audio="ignore")
    assert VideoConfig.model_validate({"no_sound": None}) == VideoConfig()
    assert [record.message.split(" now")[0] for record in caplog.records] == [
        "video.no_sound is called video.missing_audio"
    ]
    with pytest.raises(ValueError, match=r"earlier name of video\.missing_audio; remove it"):
        VideoConfig.model_validate({"no_sound": "drop", "missing_audio": "drop"})
    with pytest.raises(ValueError, match="missing_audio"):
        VideoConfig.model_validate({"no_sound": "loud"})


def test_clips_without_sound_by_policy(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        row("heard", Clip(folder / "good.mp4")),
        row("mute", Clip(folder / "mute.mp4")),
        row("given", Clip(folder / "mute.mp4"), sounds=(Sound(folder / "good.mp4"),)),
    ]

    def kept(uses_audio: bool = True, **settings: str) -> list[str]:
        config = VideoConfig.model_validate({"num_frames": 2, **settings})
        return [row.id for row in usable_rows([rows], config, uses_audio=uses_audio)[0]]

    with pytest.raises(DataError, match=r"mute.mp4: has no audio track, and the model takes audio"):
        kept(missing_audio="stop")
    with pytest.raises(DataError, match=r"mute.mp4: has no audio track, and the model takes audio"):
        kept(bad_media="stop")  # one policy, unless another one is given
    assert kept(missing_audio="ignore") == ["heard", "mute", "given"]
    assert kept(uses_audio=False) == ["heard", "mute", "given"]
    assert kept(sound="off") == ["heard", "mute", "given"]
    assert not caplog.records
    assert kept(bad_media="stop", missing_audio="drop") == ["heard", "given"]
    assert caplog.messages[0] == (
        f"{folder / 'mute.mp4'}: has no audio track, and the model takes audio"
    )
    assert caplog.messages[1:] == [
        "1 of 3 rows are left out for the 1 of 2 media files named above"
    ]
    assert kept() == ["heard", "given"]


def test_a_report_for_checks_without_policies(rows: list[Example]) -> None:
    report = check_media(rows, VideoConfig(num_frames=4), uses_audio=False)
    assert report.num_files == 8
    assert {Path(name).name for name in report.broken} == BROKEN
    assert not report.silent
    assert len(report.faults) == 7  # of the cut file two clips, not the one that is there


def test_what_was_whole_is_not_decoded_again(
    rows: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal, config = tmp_path / "new" / "checks.jsonl", VideoConfig(num_frames=4)

    def check(settings: VideoConfig = config, **options: bool) -> MediaReport:
        return check_media(rows, settings, **{"uses_audio": True, **options}, journal=journal)

    first = check()
    again = check()
    assert first.num_decoded == 11
    assert again.num_decoded == len(first.faults) == 7, "broken ones are looked at again"
    assert replace(again, num_decoded=11) == first
    # Other settings, other uses of a file: other verdicts.
    assert check(VideoConfig(num_frames=2)).num_decoded == 11
    assert check(uses_audio=False).num_decoded == 9
    # A process that follows the one that wrote takes over the broken ones too.
    monkeypatch.setenv("RANK", "1")
    follows = check()
    assert follows.num_decoded == 1, "the file that is not there leaves no trace"
    assert replace(follows, num_decoded=11) == first


def test_a_changed_file_and_a_damaged_journal_are_looked_at_again(
    folder: Path, tmp_path: Path
) -> None:
    clip, journal = tmp_path / "clip.mp4", tmp_path / "checks.jsonl"
    shutil.copy(folder / "good.mp4", clip)
    rows, config = [row("a", Clip(clip)), row("b", Clip(folder / "good.mp4"))], VideoConfig()

    def check() -> MediaReport:
        return check_media(rows, config, uses_audio=False, journal=journal)

    assert (check().num_decoded, check().num_decoded) == (2, 0)
    cut(folder / "good.mp4", clip, 0.7)
    changed = check()
    assert changed.num_decoded == 1
    assert list(changed.broken) == [str(clip)]
    shutil.copy(folder / "good.mp4", clip)
    assert (check().num_decoded, check().num_decoded) == (1, 0)

    whole = journal.read_bytes()
    journal.write_bytes(whole[:-20])  # killed within a line
    assert (check().num_decoded, check().num_decoded) == (1, 0)
    journal.write_bytes(b"[]\nnull\n{}\n\xff\n" + journal.read_bytes())
    assert check().num_decoded == 0


def test_rows_held_out_share_what_is_named(
    rows: list[Example], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        kept = usable_rows([rows, rows[:5]], VideoConfig(num_frames=4), uses_audio=True)
    assert [[row.id for row in part] for part in kept] == [
        ["good", "early", "words"],
        ["good", "early"],
    ]
    assert sum("cut.mp4" in message for message in caplog.messages) == 1
    assert caplog.messages[-1].startswith("10 of 15 rows are left out for the 6 of 8 media files")
