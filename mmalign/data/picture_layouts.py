"""The public layouts of picture records, each turned into a canonical record.

Pictures are paths, or cells of a table that stay where they are; see `parse_pictures.py`.
"""

from __future__ import annotations

from typing import Any

from mmalign.data.fields import as_list, number, show
from mmalign.data.layout import Layout, order_of
from mmalign.data.turns import Columns
from mmalign.errors import DataError

ALONE = "prompts"
"""The layout of rows that are a prompt and nothing else; only read where the config names it."""

CAPTIONS = ("prompt", "caption", "text")
PAIRS = (
    ("image_chosen", "image_rejected"),
    ("chosen_image", "rejected_image"),
    ("image_path_chosen", "image_path_rejected"),
    ("chosen_image_path", "rejected_image_path"),
    ("win", "lose"),
    ("win_image", "lose_image"),
    ("image_win", "image_lose"),
    ("image_w", "image_l"),
    ("chosen", "rejected"),  # only where the layout is named: elsewhere these are texts
)
CHOICES = (
    ("jpg_0", "jpg_1"),
    ("image_0", "image_1"),
    ("image_a", "image_b"),
    ("image_1", "image_2"),
    ("image_path_0", "image_path_1"),
    ("image_0_path", "image_1_path"),
)
LISTS = ("images", "image_paths", "image_path")
SCORES = ("scores", "ratings", "human_preference", "ranks", "rank")
SINGLES = ("image", "image_path", "file_name", "jpg")


def _prompt(row: Columns) -> Columns:
    """The caption under the name it has here; what a row names it otherwise stays."""
    name = next((name for name in CAPTIONS if name in row), None)
    return {} if name is None else {"prompt": row.pop(name)}


def _taken(row: Columns, pairs: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], list[Any]]:
    """The names and values of the two pictures."""
    names = next((pair for pair in pairs if set(pair) <= set(row)), None)
    if names is None:
        raise DataError("one of the two pictures is missing")
    return names, [row.pop(name) for name in names]


def read_pair(row: Columns) -> Columns:
    """Two pictures, the better one under its own name."""
    prompt = _prompt(row)
    _, (chosen, rejected) = _taken(row, PAIRS)
    return prompt | {"image_chosen": chosen, "image_rejected": rejected}


def read_choice(row: Columns) -> Columns:
    """Two pictures and which one won: Pick-a-Pic's label_0 and label_1, a label, or a winner.

    label_0 = 1 means that the first won, 1/2 a tie; `label` is the number of the better picture.
    """
    prompt = _prompt(row)
    names, pictures = _taken(row, CHOICES)
    if row.pop("has_label", True) is False:
        raise DataError("has_label is false: nobody compared the two pictures")
    shares = [row.pop(f"label_{i}", None) for i in "01"]
    if shares != [None, None]:
        won = _by_shares(row, shares)
    else:
        label = number(row.get("label"))
        if "label" in row and "winner" not in row:
            label = row["label"] if label is None else f"{label:g}"
            row["winner"] = "tie" if row.pop("label") == 0.5 else label
        won = order_of(row, names)
    for given, kept in (("caption", "prompt"), ("score", "score")):
        values = [row.pop(f"{given}_{i}", None) for i in "01"]
        if values != [None, None]:
            row[f"{kept}_chosen"], row[f"{kept}_rejected"] = values[won], values[1 - won]
    return prompt | {"image_chosen": pictures[won], "image_rejected": pictures[1 - won]}


def _by_shares(row: Columns, shares: list[Any]) -> int:
    """The better picture by the shares of the preference that the two got."""
    first, second = (number(share) for share in shares)
    if first is not None and shares[1] is None:
        second = 1.0 - first
    if first is None or second is None or (first != second and abs(first + second - 1) > 1e-6):
        raise DataError(
            "label_0 and label_1 must be shares that add to 1, such as 1 and 0, or equal for a "
            f"tie, but are {show(shares)}"
        )
    if first == second:
        row["tie"] = True
    elif 0 < first < 1:
        row["p_chosen"] = max(first, second)
    return int(second > first)


def read_list(row: Columns) -> Columns:
    """K pictures with scores, or with ranks where less is better."""
    prompt = _prompt(row)
    name = next(name for name in LISTS if name in row)
    images = as_list(row.pop(name))
    if images is None:
        raise DataError(f"{name} must be a list of pictures where there are scores or ranks")
    name = next(name for name in SCORES if name in row)
    scores = as_list(row.pop(name))
    if name in ("ranks", "rank"):
        numbers = [number(rank) for rank in scores or [None]]
        scores = [None if rank is None else -rank for rank in numbers]
    return prompt | {"images": images, "scores": scores}


def read_single(row: Columns) -> Columns:
    """One picture, rated or not."""
    prompt = _prompt(row)
    image = row.pop(next(name for name in SINGLES if name in row))
    rating = row.pop("desirable", row.pop("label", row.pop("kto_tag", None)))
    return prompt | {"image": image} | ({} if rating is None else {"desirable": rating})


_OF_TEXTS = (
    *("chosen", "rejected", "response", "completion", "responses", "completions", "answers"),
    *("conversations", "messages", "query", "instruction", "response_a", "response_b"),
    *("response_0", "response_1", "response_2", "conversation_a", "conversation_b"),
)
_OF_PAIRS = tuple(name for pair in PAIRS for name in pair)
_OF_CHOICES = tuple(name for pair in CHOICES for name in pair)

PICTURE_LAYOUTS: dict[str, Layout] = {
    "pictures": Layout(
        "prompt or caption, image_chosen and image_rejected, or win and lose",
        (tuple(chosen for chosen, _ in PAIRS), tuple(rejected for _, rejected in PAIRS)),
        (*_OF_TEXTS, *_OF_CHOICES),
        read_pair,
    ),
    "picture_choice": Layout(
        "caption, jpg_0 and jpg_1, or image_0 and image_1, and label_0 or winner",
        (tuple(one for one, _ in CHOICES), tuple(other for _, other in CHOICES)),
        (*_OF_TEXTS, *_OF_PAIRS, "images"),
        read_choice,
    ),
    "picture_list": Layout(
        "prompt or caption, images, and scores or ranks",
        (LISTS, SCORES),
        (*_OF_TEXTS, *_OF_PAIRS, *_OF_CHOICES),
        read_list,
    ),
    "picture": Layout(
        "prompt or caption, image, and desirable or label where it is rated",
        (SINGLES, CAPTIONS),
        (*_OF_TEXTS, *_OF_PAIRS, *_OF_CHOICES, *SCORES, "images"),
        read_single,
    ),
    ALONE: Layout(
        "prompt or caption alone; pictures are generated in training",
        (CAPTIONS,),
        (),
        _prompt,
        named=True,
    ),
}
