"""Picture records: their layouts, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from data_rows import PAIR, Write, pairs
from picture_files import AB, examples, names, problems, save

from mmalign.config import DataConfig
from mmalign.data import Picture, load_examples, parse_record
from mmalign.data.convert import find_layout, to_record
from mmalign.data.media_layouts import PICTURE_LAYOUTS
from mmalign.data.parse import read_record
from mmalign.data.pictures import PictureRoot
from mmalign.data.records import read_records
from mmalign.errors import DataError

BA = {"prompt": "p", "image_chosen": "b.png", "image_rejected": "a.png"}
ZERO_ONE = {"caption": "p", "image_0": "a.png", "image_1": "b.png"}

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "our own": ("pictures", AB, AB),
    "caption": ("pictures", {"caption": "p", "win": "a.png", "lose": "b.png"}, AB),
    "other names": (
        "pictures",
        {"text": "p", "chosen_image": "a.png", "rejected_image": "b.png"},
        AB,
    ),
    "soft": ("pictures", AB | {"p_chosen": 0.7}, AB | {"p_chosen": 0.7}),
    "own captions": (
        "pictures",
        {"prompt_chosen": "x", "prompt_rejected": "y", "win": "a.png", "lose": "b.png"},
        {"prompt_chosen": "x", "prompt_rejected": "y", "image_chosen": "a.png"}
        | {"image_rejected": "b.png"},
    ),
    "pick-a-pic": (
        "picture_choice",
        {"caption": "p", "jpg_0": "a.png", "jpg_1": "b.png", "label_0": 1.0, "label_1": 0.0}
        | {"has_label": True, "image_0_uid": "u"},
        AB | {"image_0_uid": "u"},
    ),
    "pick-a-pic, the other": (
        "picture_choice",
        {"caption": "p", "jpg_0": "a.png", "jpg_1": "b.png", "label_0": 0, "label_1": 1},
        BA,
    ),
    "pick-a-pic, a tie": (
        "picture_choice",
        {"caption": "p", "jpg_0": "a.png", "jpg_1": "b.png", "label_0": 0.5, "label_1": 0.5},
        AB | {"tie": True},
    ),
    "one share": ("picture_choice", ZERO_ONE | {"label_0": 0.25}, BA | {"p_chosen": 0.75}),
    "label": ("picture_choice", ZERO_ONE | {"label": 1}, BA),
    "label, a tie": ("picture_choice", ZERO_ONE | {"label": 0.5}, AB | {"tie": True}),
    "label by name": ("picture_choice", ZERO_ONE | {"label": "image_1"}, BA),
    "winner": ("picture_choice", ZERO_ONE | {"winner": 0}, AB),
    "from one": (
        "picture_choice",
        {"prompt": "p", "image_1": "a.png", "image_2": "b.png", "winner": "2"},
        BA,
    ),
    "votes": (
        "picture_choice",
        {"prompt": "p", "image_a": "a.png", "image_b": "b.png", "votes_a": 1, "votes_b": 3},
        BA | {"votes_chosen": 3, "votes_rejected": 1},
    ),
    "scores of both": (
        "picture_choice",
        ZERO_ONE
        | {"label_0": 0, "score_0": 0.2, "score_1": 0.3, "caption_0": "x", "caption_1": "y"},
        BA
        | {"score_chosen": 0.3, "score_rejected": 0.2, "prompt_chosen": "y"}
        | {"prompt_rejected": "x"},
    ),
    "list": (
        "picture_list",
        {"prompt": "p", "images": ["a.png", "b.png"], "scores": [1, 2]},
        {"prompt": "p", "images": ["a.png", "b.png"], "scores": [1, 2]},
    ),
    "ranks": (
        "picture_list",
        {"caption": "p", "image_paths": ["a.png", "b.png"], "ranks": [2, 1]},
        {"prompt": "p", "images": ["a.png", "b.png"], "scores": [-2, -1]},
    ),
    "human preference": (
        "picture_list",
        {"prompt": "p", "image_path": ["a.png", "b.png"], "human_preference": [0, 1]},
        {"prompt": "p", "images": ["a.png", "b.png"], "scores": [0, 1]},
    ),
    "single": ("picture", {"text": "p", "file_name": "a.png"}, {"prompt": "p", "image": "a.png"}),
    "rated": (
        "picture",
        {"prompt": "p", "image": "a.png", "label": False},
        {"prompt": "p", "image": "a.png", "desirable": False},
    ),
}


@pytest.mark.parametrize(("layout", "raw", "expected"), CASES.values(), ids=CASES)
def test_layouts_are_recognised(
    layout: str, raw: dict[str, Any], expected: dict[str, Any], pics: Path
) -> None:
    assert find_layout(raw) == layout
    record = to_record(raw)
    assert record == expected
    assert to_record(record) == expected
    row = parse_record(record, where="here", root=PictureRoot(pics))
    assert row.meta.get("image_0_uid") == raw.get("image_0_uid")


def test_every_picture_layout_has_a_case() -> None:
    assert {layout for layout, _, _ in CASES.values()} == set(PICTURE_LAYOUTS) - {"prompts"}


def test_texts_beside_pictures_stay_texts() -> None:
    for raw in (
        {"prompt": "Q", "image": "a.png", "chosen": "yes", "rejected": "no"},
        {"prompt": "Q", "image": "a.png", "response": "yes"},
        {"messages": [], "images": ["a.png"], "rejected_response": "no"},
        {"instruction": "Q", "images": ["a.png"], "output": "yes"},
    ):
        assert find_layout(raw) not in PICTURE_LAYOUTS
    record = to_record({"prompt": "Q", "image": "a.png", "chosen": "yes", "rejected": "no"})
    assert record["image"] == "a.png", "what the prompt shows"


def test_chosen_and_rejected_are_pictures_where_the_layout_says_so(
    pics: Path, write: Write
) -> None:
    path = write("a.jsonl", [{"prompt": "p", "chosen": "a.png", "rejected": "b.png"}])
    assert names(examples(path, layout="pictures")[0]) == ["a.png", "b.png"]
    assert examples(path)[0].candidates[0].response == "a.png"


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (ZERO_ONE, "need a `winner`"),
        (ZERO_ONE | {"label": 2}, "the winner found is '2'"),
        (ZERO_ONE | {"label": True}, "the winner found is True"),
        (ZERO_ONE | {"label_0": 1, "label_1": 0.5}, "must be shares that add to 1"),
        (ZERO_ONE | {"label_0": "a"}, "must be shares that add to 1"),
        (ZERO_ONE | {"label_0": 1, "has_label": False}, "nobody compared the two images"),
        ({"prompt": "p", "image_path": "a.png", "rank": [1]}, "must be a list of images"),
        ({"caption": "p", "image_0": "a.png", "jpg_1": "b.png", "label": 1}, "is missing"),
    ],
)
def test_a_row_that_breaks_its_layout(raw: dict[str, Any], expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        to_record(raw)


# Records


def test_records_become_examples(pics: Path, write: Write) -> None:
    path = write(
        "a.jsonl",
        [
            AB
            | {"id": "1", "votes_chosen": 3, "votes_rejected": 1, "weight": 2, "score_chosen": 0.3},
            {"prompt_chosen": "x", "prompt_rejected": "y", "id": "2"}
            | {
                "image_chosen": {"path": "a.png"},
                "image_rejected": {"path": "a.png", "bytes": None},
            },
            {"prompt": "p", "images": ["a.png", "b.png", "c.png"], "scores": [1, 3, 2], "id": "3"},
            {"prompt": "p", "image": "c.png", "desirable": False, "id": "4", "split": "test"},
            {"prompt": "p", "image": "c.png", "id": "5"},
        ],
    )
    rows = examples(path)
    assert [row.kind for row in rows] == ["pair", "pair", "list", "unpaired", "plain"]
    assert [row.labels for row in rows] == [(0.75, 0.25), (1, 0), (1, 3, 2), (0,), (1,)]
    assert rows[0].weight == 2
    assert rows[0].meta == {"score_chosen": 0.3}
    assert [c.prompt for c in rows[1].candidates] == ["x", "y"]
    assert names(rows[2]) == ["a.png", "b.png", "c.png"]
    assert rows[0].candidates[0].response == Picture(pics / "a.png")


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (AB | {"image_rejected": "a.png"}, "image_chosen equals image_rejected"),
        (AB | {"image_rejected": "./a.png"}, "image_chosen equals image_rejected"),
        (AB | {"image_rejected": None}, "image_rejected is missing"),
        (
            AB | {"image_chosen": "x.png"},
            "image_chosen must name an image file that is there, but",
        ),
        (AB | {"image_chosen": "../x.png"}, "image_chosen must stay inside"),
        (AB | {"image_chosen": 5}, "image_chosen must be the path of an image file, but is 5"),
        (AB | {"image_chosen": {"bytes": "x"}}, "image_chosen must be the path of an image file"),
        (AB | {"prompt": ""}, "prompt is empty"),
        (AB | {"prompt": [{"role": "user", "content": "p"}]}, "prompt of an image must be text"),
        (
            AB | {"prompt_chosen": [{"role": "user", "content": "p"}], "prompt_rejected": "x"},
            "prompt of an image must be text",
        ),
        (AB | {"spans_chosen": [[0, 1]]}, "the key 'spans_chosen' means nothing"),
        (AB | {"online": ["a.png"]}, "the key 'online' means nothing"),
        (AB | {"p_chosen": 3}, "p_chosen must be a finite number between 0 and 1"),
        ({"prompt": "p", "images": ["a.png"], "scores": [1]}, "at least two images"),
        ({"prompt": "p", "images": ["a.png", 3], "scores": [1, 2]}, "an entry of images must be"),
        ({"prompt": "p", "images": ["a.png", "b.png"], "scores": [1]}, "one number a response"),
        (AB | {"chosen": "text"}, "more than one kind of record at once"),
        (AB | {"image": "c.png"}, "more than one kind of record at once"),
    ],
)
def test_what_is_wrong_with_a_picture_record(
    record: dict[str, Any], expected: str, pics: Path
) -> None:
    with pytest.raises(DataError, match=expected):
        parse_record(record, where="here", root=PictureRoot(pics))


def test_a_folder_of_pictures_may_be_elsewhere(pics: Path, write: Write, tmp_path: Path) -> None:
    path = write("a.jsonl", [AB])
    save(tmp_path / "elsewhere" / "a.png", 5)
    save(tmp_path / "elsewhere" / "b.png", 6)
    source = {"path": path, "pictures": tmp_path / "elsewhere"}
    (row,), _ = load_examples(DataConfig.model_validate({"train": source}), PAIR, seed=0)
    assert row.candidates[0].response == Picture(tmp_path / "elsewhere" / "a.png")
    with pytest.raises(DataError, match="pictures: there is no folder"):
        list(read_records(path, pictures=tmp_path / "nowhere"))
    _, found = read_record(AB, where="here")
    assert "no folder is known that it starts from" in str(found[0])


def test_prompts_alone_only_where_the_source_says_so(write: Write, tmp_path: Path) -> None:
    path = write("a.jsonl", [{"prompt": "a red bird", "score": 3}, {"caption": "a cat"}])
    rows = examples(path, layout="prompts")
    assert [(row.kind, row.prompt, row.candidates[0].response) for row in rows] == [
        ("plain", "a red bird", ""),
        ("plain", "a cat", ""),
    ]
    assert problems(list(read_records(write("b.jsonl", [{"prompt": "Q"}]))))[0].startswith(
        "no layout has the columns prompt"
    )
    (tmp_path / "c.txt").write_text("a red bird\n\n  a cat\n", encoding="utf-8")
    assert [row.prompt for row in examples(tmp_path / "c.txt", layout="prompts")] == [
        "a red bird",
        "a cat",
    ]
    stepped_aside = examples(write("d.jsonl", pairs(1)), layout="prompts")[0]
    assert stepped_aside.candidates[0].response == ""
    assert stepped_aside.meta["chosen"] == "good 0"
