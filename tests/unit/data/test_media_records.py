"""Records about clips, images and sounds: canonical keys, layouts, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data_rows import Needs

from mmalign.data.convert import find_layout
from mmalign.data.example import Clip, Example, Media, Message, Picture, Sound
from mmalign.data.media_layouts import MEDIA_LAYOUTS
from mmalign.data.parse import untag
from mmalign.data.records import convert_file, read_prompts, read_records
from mmalign.data.select import fit

FILES = ("a.mp4", "b.mp4", "c.mp4", "a.wav", "b.wav", "a.png")
PAIR = {"prompt": "What?", "chosen": "A red disc.", "rejected": "A blue disc."}
SEEN = {"type": "video"}
ASKED = {"type": "text", "text": "What?"}


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def said(role: str, value: str) -> dict[str, Any]:
    return {"from": role, "value": value}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in FILES:
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def read(folder: Path, record: dict[str, Any]) -> tuple[Example | None, list[str]]:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    (row,) = read_records(path)
    return row.example, [str(problem) for problem in row.problems]


def good(folder: Path, record: dict[str, Any]) -> Example:
    example, problems = read(folder, record)
    assert problems == []
    assert example is not None
    return example


def test_a_clip_by_path_or_with_its_part(folder: Path) -> None:
    clip = folder / "a.mp4"
    for extra, expected in (
        ({"video": "a.mp4"}, Clip(clip)),
        ({"videos": ["a.mp4"]}, Clip(clip)),
        ({"video": {"path": "a.mp4", "start": 1, "end": 2.5}}, Clip(clip, 1.0, 2.5)),
        ({"video": {"video": "a.mp4", "frames": [0, 5]}}, Clip(clip, frames=(0, 5))),
        ({"video": "a.mp4", "start": 1, "end": 2.5}, Clip(clip, 1.0, 2.5)),
        ({"video": "a.mp4", "span": [1, 2.5]}, Clip(clip, 1.0, 2.5)),
        ({"video": "a.mp4", "frames": [3, 1]}, Clip(clip, frames=(3, 1))),
    ):
        assert good(folder, PAIR | extra).media.videos == (expected,), extra


def test_pictures_and_sounds_beside_texts_belong_to_the_prompt(folder: Path) -> None:
    row = good(folder, PAIR | {"image": "a.png", "audio": {"path": "a.wav", "start": 1}})
    assert row.media.images == (Picture(folder / "a.png"),)
    assert row.media.sounds == (Sound(folder / "a.wav", 1.0),)
    assert good(folder, {"prompt": "Q", "response": "A", "images": ["a.png"]}).media.images
    heard = good(folder, PAIR | {"video": "a.wav", "span": [0, 2]}).media
    assert heard.sounds == (Sound(folder / "a.wav", 0.0, 2.0),)
    assert not heard.videos


def test_a_side_may_have_a_clip_of_its_own(folder: Path) -> None:
    same = {"prompt": "Q", "chosen": "yes", "rejected": "yes", "video": "a.mp4"}
    row = good(folder, same | {"video_rejected": "b.mp4", "video_corrupted": "c.mp4"})
    chosen, rejected, corrupted = row.candidates
    assert chosen.media is None
    assert rejected.media is not None
    assert rejected.media.videos == (Clip(folder / "b.mp4"),)
    assert (corrupted.role, corrupted.response) == ("corrupted", "yes")
    assert corrupted.media is not None
    assert corrupted.media.videos == (Clip(folder / "c.mp4"),)
    assert read(folder, same)[1] == ["chosen equals rejected"]


def test_what_a_side_does_not_name_is_that_of_the_row(folder: Path) -> None:
    row = good(folder, PAIR | {"video": "a.mp4", "audio": "a.wav", "audio_corrupted": "b.wav"})
    corrupted = row.candidates[2].media
    assert corrupted is not None
    assert corrupted.videos == row.media.videos
    assert corrupted.sounds == (Sound(folder / "b.wav"),)


def test_a_part_given_in_the_record_is_that_of_the_clip_and_of_its_sound(folder: Path) -> None:
    media = good(folder, PAIR | {"video": "a.mp4", "audio": "a.wav", "span": [1, 2]}).media
    assert media.videos == (Clip(folder / "a.mp4", 1.0, 2.0),)
    assert media.sounds == (Sound(folder / "a.wav", 1.0, 2.0),)
    clip = {"path": "a.mp4", "start": 1}
    media = good(folder, PAIR | {"video": clip, "frames": [4]}).media
    assert media.videos == (Clip(folder / "a.mp4", 1.0, frames=(4,)),)


def test_prompts_alone_show_media(folder: Path) -> None:
    path = folder / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "Q", "image": "a.png", "video": "a.mp4"}) + "\n")
    (row,) = read_prompts(path)
    assert row.media == Media((Clip(folder / "a.mp4"),), (Picture(folder / "a.png"),))


def test_an_irrelevant_answer_is_a_role(folder: Path) -> None:
    row = good(folder, PAIR | {"video": "a.mp4", "rejected_irrelevant": "A dog barks."})
    assert [(c.role, c.response) for c in row.candidates[2:]] == [
        ("rejected_irrelevant", "A dog barks.")
    ]


@pytest.mark.parametrize(
    ("extra", "problem"),
    [
        ({"video": "../a.mp4"}, "video must stay inside"),
        ({"video": "/etc/passwd"}, "video must stay inside"),
        ({"video": "https://host/a.mp4"}, "video must be a file here"),
        ({"video": "a.npy"}, "holds features; give the clip itself"),
        ({"video": 5}, "video must be the path of a file"),
        ({"video": {"start": 1}}, "video must have one `path`"),
        ({"video": {"path": "a.mp4", "video": "b.mp4"}}, "video must have one `path`"),
        ({"video": {"path": "a.mp4", "strat": 1}}, "video has the key 'strat'"),
        ({"image": {"path": "a.png", "start": 1}}, "image has the key 'start'"),
        ({"audio": {"path": "a.wav", "frames": [1]}}, "audio has the key 'frames'"),
        ({"video": {"path": "a.mp4", "start": 2, "end": 1}}, "0 <= start < end"),
        ({"video": "a.mp4", "start": -1}, "0 <= start < end"),
        ({"video": "a.mp4", "frames": [1.5]}, "frames must be frame numbers"),
        ({"video": "a.mp4", "videos": ["a.mp4"]}, "give one of them"),
        ({"video": "a.mp4", "span": "0-1"}, "span must be [start, end] in seconds"),
        ({"video": "a.mp4", "span": [0, 1], "end": 2}, "without start and end beside it"),
        ({"video": {"path": "a.mp4", "end": 3}, "start": 1}, "not be given in its media too"),
        ({"videos": ["a.mp4", "b.mp4"], "start": 1}, "must be of one clip, or one sound"),
        ({"audio": "a.wav", "frames": [1]}, "must be of one clip, or one sound"),
        ({"video_corrupted": "a.mp4"}, "corrupted media must stand for media of the record"),
        ({"video": "a.mp4", "video_corrupted": "a.mp4"}, "equal those of chosen"),
        ({"video": "a.mp4", "video_rejected": "a.mp4", "rejected": "A red disc."}, "equals"),
        ({"video": "a.mp4", "prompt_rejected": "<video><video>"}, "names it 2 times"),
        ({"videos": ["a.mp4", "b.mp4"], "prompt": "<video>?"}, "names it 1 times"),
        ({"video": "a.mp4", "fps": "fast"}, "the record: fps must be frames a second"),
        ({"video": {"path": "a.mp4", "fps": 0}}, "video: fps must be frames a second"),
        ({"video": "a.mp4", "max_pixels": 1e5}, "max_pixels must be a whole number"),
        ({"image": "a.png", "max_pixels": 4096}, "images are shown is video.image_pixels"),
        ({"image": {"path": "a.png", "max_pixels": 4096}}, "image has the key 'max_pixels'"),
        ({"vidoe_rejected": "a.mp4"}, "did you mean 'video_rejected'"),
    ],
)
def test_what_is_wrong_with_a_medium(folder: Path, extra: dict[str, Any], problem: str) -> None:
    example, problems = read(folder, PAIR | extra)
    assert example is None
    assert problem in problems[0]


def test_rate_and_size_of_a_clip_stand_in_it_or_beside_all_of_them(folder: Path) -> None:
    beside = {"videos": ["a.mp4", {"path": "b.mp4", "fps": 4}], "fps": 1, "max_pixels": 100352}
    assert good(folder, PAIR | beside).media.videos == (
        Clip(folder / "a.mp4", fps=1.0, max_pixels=100352),
        Clip(folder / "b.mp4", fps=4.0, max_pixels=100352),
    )
    row = good(folder, PAIR | {"video": "a.mp4", "video_corrupted": "b.mp4", "fps": 2.5})
    assert [clip.fps for media in (row.media, row.candidates[2].media) if media
            for clip in media.videos] == [2.5, 2.5]  # fmt: skip
    bare = good(folder, PAIR | {"fps": 29.97, "max_pixels": "large"})
    assert bare.meta == {"fps": 29.97, "max_pixels": "large"}, "nothing of a row without clips"


def test_a_file_that_is_not_there_is_for_those_who_read_it(folder: Path) -> None:
    row = good(folder, PAIR | {"video": "none.mp4", "audio": "b.ogg"})
    assert row.files() == (folder / "none.mp4", folder / "b.ogg")


def test_a_link_that_leaves_the_folder_is_refused(folder: Path, tmp_path_factory: Any) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "secret.mp4"
    elsewhere.write_bytes(b"x")
    (folder / "link.mp4").symlink_to(elsewhere)
    assert "must stay inside" in read(folder, PAIR | {"video": "link.mp4"})[1][0]


def test_columns_of_a_record_without_media_stay_in_meta(folder: Path) -> None:
    assert good(folder, PAIR | {"start": 3, "end": "soon"}).meta == {"start": 3, "end": "soon"}


CASES: dict[str, tuple[str, dict[str, Any], tuple[str, str, str]]] = {
    "trl, parts and a column": (
        "pair",
        {
            "prompt": [turn("user", [SEEN, ASKED])],
            "chosen": [turn("assistant", [{"type": "text", "text": "A"}])],
            "rejected": [turn("assistant", [{"type": "text", "text": "B"}])],
            "videos": ["a.mp4"],
        },
        ("<video>What?", "A", "B"),
    ),
    "trl, the path in the part": (
        "pair",
        {
            "chosen": [turn("user", [SEEN | {"video": "a.mp4"}, ASKED]), turn("assistant", "A")],
            "rejected": [turn("user", [SEEN | {"video": "a.mp4"}, ASKED]), turn("assistant", "B")],
        },
        ("<video>What?", "A", "B"),
    ),
    "ms-swift": (
        "messages",
        {
            "messages": [turn("user", "<video>What?"), turn("assistant", "A")],
            "rejected_response": "B",
            "videos": ["a.mp4"],
        },
        ("<video>What?", "A", "B"),
    ),
    "llama-factory, alpaca": (
        "alpaca",
        {"instruction": "<video>What?", "chosen": "A", "rejected": "B", "videos": ["a.mp4"]},
        ("<video>What?", "A", "B"),
    ),
    "llama-factory, sharegpt": (
        "sharegpt",
        {
            "conversations": [said("human", "<video>What?")],
            "chosen": said("gpt", "A"),
            "rejected": said("gpt", "B"),
            "videos": ["a.mp4"],
        },
        ("<video>What?", "A", "B"),
    ),
    "rrpo": (
        "rrpo",
        {
            "question": "<image>\nWhat?",
            "answer": "A red disc.",
            "pred": "A blue disc.",
            "answer_masked": "A <MASK> red </MASK> disc.",
            "pred_masked": "A <MASK> blue </MASK> disc.",
            "sample_id": "s",
            "video": "a.mp4",
        },
        ("What?", "A red disc.", "A blue disc."),
    ),
    "videochat2": (
        "videochat2",
        {
            "video": "a.mp4",
            "QA": [{"q": "What?", "a": "A"}],
            "QA_NEG": [{"q": "What?", "a": "B"}],
            "start": 1,
            "end": 2,
        },
        ("What?", "A", "B"),
    ),
    "cat's pairs": (
        "cat",
        {
            "video": "a.mp4",
            "audio": "a.wav",
            "conversations1": [said("human", "Say: <Q>What?<Q>\n<video>"), said("gpt", "A")],
            "conversations2": [said("human", "Say: <Q>What?<Q>\n<video>"), said("gpt", "B")],
        },
        ("Say: What?", "A", "B"),
    ),
    "a question about media": (
        "media_question",
        {
            "media": "a.mp4",
            "question": "What?",
            "chosen": "A red disc.",
            "rejected": "A blue disc.",
            "chosen_phrase": [2, 5],
            "rejected_phrase": [2, 6],
        },
        ("What?", "A red disc.", "A blue disc."),
    ),
    "hound-dpo": (
        "pair",
        {
            "prompt": "<video>\nWhat?", "answer": "A", "chosen": "A", "rejected": "B",
            "video": "a.mp4", "chosen_score": 5, "rejected_score": 1,
        },
        ("<video>\nWhat?", "A", "B"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("layout", "raw", "words"), CASES.values(), ids=CASES)
def test_a_layout_is_read_unaided(
    folder: Path, layout: str, raw: dict[str, Any], words: tuple[str, str, str]
) -> None:
    assert find_layout(raw) == layout
    row = good(folder, raw)
    prompt = row.prompt if isinstance(row.prompt, str) else row.prompt[-1].content
    assert (prompt, *(c.response for c in row.candidates)) == words
    assert [clip.path.name for clip in row.media.videos] == ["a.mp4"]
    if layout in ("rrpo", "media_question"):
        assert [c.spans for c in row.candidates] == [((2, 5),), ((2, 6),)]
    if layout == "videochat2":
        assert (row.media.videos[0].start, row.media.videos[0].end) == (1.0, 2.0)
    if layout == "cat":
        assert row.media.sounds == (Sound(folder / "a.wav"),)


def test_every_media_layout_has_a_case(folder: Path) -> None:
    raw = {
        "video_id": "v", "multi_choice": ["A"], "correct_answer": "A", "video": "a.mp4",
        "conversations": [said("human", "<Q>What?<Q>\n<video>"), said("gpt", "A")],
    }  # fmt: skip
    assert find_layout(raw) == "cat_instruct"
    row = good(folder, raw)
    assert (row.kind, row.prompt) == ("plain", (Message("user", "What?"),))
    assert {layout for layout, _, _ in CASES.values()} | {"cat_instruct"} >= set(MEDIA_LAYOUTS)


def test_the_rejected_clip_of_ms_swift_is_that_of_its_side(folder: Path) -> None:
    turns = [turn("user", "<video>What?"), turn("assistant", "A")]
    row = good(
        folder,
        {
            "messages": turns,
            "rejected_messages": turns,
            "videos": ["a.mp4"],
            "rejected_videos": ["b.mp4"],
        },
    )
    rejected = row.candidates[1]
    assert rejected.media is not None
    assert rejected.media.videos == (Clip(folder / "b.mp4"),)


def test_tags_become_spans_of_the_plain_text() -> None:
    cases = {
        "A <MASK> red </MASK> disc.": ("A red disc.", ["red"]),
        "A <MASK>red</MASK> disc.": ("A red disc.", ["red"]),
        "<MASK> Yes </MASK> , it does.": ("Yes, it does.", ["Yes"]),
        "It is <MASK> red </MASK>.": ("It is red.", ["red"]),
        "<MASK> a </MASK> and <MASK> b </MASK>": ("a and b", ["a", "b"]),
        "no tags": ("no tags", []),
        "It is <MASK> </MASK> red.": ("It is red.", []),
        "It <MASK> is open": ("It is open", ["is open"]),
    }
    for tagged, (plain, words) in cases.items():
        for known in (plain, None):
            if known is None and " ," in tagged:
                continue  # whether a space stood there cannot be known
            text, spans = untag(tagged, known)
            assert (text, [text[a:b] for a, b in spans]) == (plain, words), (tagged, known)


def test_a_tagged_text_of_other_words_is_a_problem(folder: Path) -> None:
    record = PAIR | {"video": "a.mp4", "chosen_masked": "A <MASK> green </MASK> disc."}
    assert "chosen_masked must be chosen with <MASK> tags" in read(folder, record)[1][0]


def test_converted_records_find_their_media_again(folder: Path, tmp_path_factory: Any) -> None:
    for number, record in enumerate(
        (
            PAIR | {"video": {"path": "a.mp4", "start": 1.0}, "audio": "a.wav", "image": "a.png"},
            PAIR | {"videos": ["a.mp4", "b.mp4"], "video_rejected": "c.mp4"},
        )
    ):
        path = folder / "rows.jsonl"
        path.write_text(json.dumps(record) + "\n", encoding="utf-8")
        for out in (folder / f"out{number}.jsonl", tmp_path_factory.mktemp("out") / "out.jsonl"):
            convert_file(path, out)
            (before,), (after,) = read_records(path), read_records(out)
            assert before.example is not None
            assert after.example is not None, after.problems
            names = [
                [Path(m.path).name for m in (*e.media.videos, *e.media.images, *e.media.sounds)]
                for e in (before.example, after.example)
            ]
            assert names[0] == names[1]
            assert before.example.media.videos[0].start == after.example.media.videos[0].start


def test_a_corrupted_clip_goes_with_the_better_answer(folder: Path) -> None:
    clips = {"video": "a.mp4", "video_corrupted": "b.mp4"}
    pair = good(folder, PAIR | clips)
    alone = [good(folder, {"prompt": "Q", "response": "A red disc."} | clips)]
    needs = Needs("plain", 1, ("corrupted",))
    for rows, swap, expected in (
        ([pair], False, "A red disc."),
        ([pair], True, "A blue disc."),
        (alone, False, "A red disc."),
    ):
        (row,) = fit(rows, needs, swap=swap)
        assert [(c.response, c.role) for c in row.candidates] == [
            (expected, ""),
            (expected, "corrupted"),
        ]
        assert row.candidates[1].media == Media((Clip(folder / "b.mp4"),))
    singles = fit([pair], Needs("unpaired", 1))
    assert [[c.response for c in row.candidates] for row in singles] == [
        ["A red disc."],
        ["A blue disc."],
    ]
