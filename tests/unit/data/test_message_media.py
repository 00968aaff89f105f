"""What chat messages show, in the layouts of TRL, ms-swift and Qwen's tools."""

from __future__ import annotations

from typing import Any

import pytest

from mmalign.data import to_record
from mmalign.errors import DataError

WORDS = {"type": "text", "text": "What?"}
A, B = ({"role": "assistant", "content": text} for text in "AB")


def shown(file: str | None = None, kind: str = "video", **more: Any) -> dict[str, Any]:
    return {"type": kind, **({} if file is None else {kind: file}), **more}


def asked(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def pair(*parts: dict[str, Any], **columns: Any) -> dict[str, Any]:
    return {"prompt": [asked(*parts)], "chosen": [A], "rejected": [B], **columns}


@pytest.mark.parametrize(
    ("raw", "text", "media"),
    [
        (pair(shown("a.mp4"), WORDS), "<video>What?", {"videos": ["a.mp4"]}),
        (pair(WORDS, shown("a.mp4")), "What?<video>", {"videos": ["a.mp4"]}),
        (pair(shown(), WORDS, videos=["a.mp4"]), "<video>What?", {"videos": ["a.mp4"]}),
        (pair(shown(), WORDS, video="a.mp4"), "<video>What?", {"video": "a.mp4"}),
        (pair(shown("a.mp4"), WORDS, video="a.mp4"), "<video>What?", {"video": "a.mp4"}),
        (
            pair(shown("a.mp4"), shown("a.mp4"), WORDS),
            "<video><video>What?",
            {"videos": ["a.mp4", "a.mp4"]},
        ),
        (
            pair(shown("a.png", "image"), WORDS, shown("a.wav", "audio"), shown("b.png", "image")),
            "<image>What?<audio><image>",
            {"images": ["a.png", "b.png"], "audios": ["a.wav"]},
        ),
        (
            pair(shown("a.mp4", start=1.0, end=2.0), WORDS),
            "<video>What?",
            {"videos": [{"path": "a.mp4", "start": 1.0, "end": 2.0}]},
        ),
        (
            pair(shown("a.mp4", video_start=1.0, frames=[3]), WORDS),
            "<video>What?",
            {"videos": [{"path": "a.mp4", "start": 1.0, "frames": [3]}]},
        ),
        (
            pair(shown("a.mp4", fps=2.0, max_pixels=4096), WORDS),
            "<video>What?",
            {"videos": [{"path": "a.mp4", "fps": 2.0, "max_pixels": 4096}]},
        ),
        (
            pair({"type": "image_url", "image_url": {"url": "a.png"}}, WORDS),
            "<image>What?",
            {"images": ["a.png"]},
        ),
        (
            pair(shown("a.mp4", text=None, image=None), WORDS | {"video": None}),
            "<video>What?",
            {"videos": ["a.mp4"]},
        ),
    ],
)
def test_parts_become_marks_and_columns(
    raw: dict[str, Any], text: str, media: dict[str, Any]
) -> None:
    record = to_record(raw)
    assert record.pop("prompt") == [{"role": "user", "content": text}]
    assert record == {"chosen": "A", "rejected": "B"} | media


def test_conversations_about_one_clip_are_a_pair_about_it() -> None:
    raw = {
        "chosen": [asked(shown("a.mp4"), WORDS), A],
        "rejected": [asked(shown("a.mp4"), WORDS), B],
    }
    record = to_record(raw)
    assert (record["videos"], "videos_rejected" in record) == (["a.mp4"], False)
    assert to_record(raw | {"prompt": [asked(shown("a.mp4"), WORDS)]}) == record


@pytest.mark.parametrize(
    "names", [("chosen", "rejected"), ("messages", "rejected_messages")], ids=["trl", "ms-swift"]
)
def test_conversations_about_two_clips_keep_both(names: tuple[str, str]) -> None:
    sides = ([asked(shown(path), shown("c.wav", "audio"), WORDS), A] for path in ("a.mp4", "b.mp4"))
    assert to_record(dict(zip(names, sides, strict=True))) == {
        "prompt": [{"role": "user", "content": "<video><audio>What?"}],
        "chosen": "A",
        "rejected": "A",
        "videos": ["a.mp4"],
        "videos_rejected": ["b.mp4"],
        "audios": ["c.wav"],
    }


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (pair(shown(), WORDS), "part of type video without a path, and there is no column videos"),
        (pair(shown("a.mp4"), shown(), WORDS), "some parts of type video have a path"),
        (pair(shown("a.mp4"), WORDS, videos=["b.mp4"]), "videos and the parts .* differ"),
        (pair(shown("a.mp4", nframes=2), WORDS), "has 'nframes', which is not read from messages"),
        (pair(shown("a.mp4", path="b.mp4"), WORDS), "must have one path"),
        (pair(shown(start=1), WORDS, videos=["a.mp4"]), "must have one path"),
        (pair(shown("a.mp4"), {"type": "file", "file": "x"}), "neither text, video, image nor"),
        (
            pair(WORDS) | {"chosen": [{"role": "assistant", "content": [shown("a.mp4")]}]},
            "shows a medium in an answer",
        ),
    ],
)
def test_what_would_be_passed_over_is_refused(raw: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        to_record(raw)
