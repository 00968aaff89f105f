"""The public layouts of records with images and media, each turned into a canonical record."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mmalign.data.fields import as_list, as_object, number, show
from mmalign.data.turns import (
    ASSISTANTS,
    Columns,
    Turns,
    contrast,
    exchange,
    response_of,
    split,
    turns,
)
from mmalign.errors import DataError

HIGHER = ("score", "overall_score", "rating", "avg_rating", "reward")
LOWER = ("rank",)
"""Names of numbers of a response: of these the lowest is the best, of those above the highest."""

_END = re.compile(r"_([ab]|[0-9])(?:_path)?$")
"""What the columns of two responses end in: response_a, jpg_0, image_1_path."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a layout is recognized and read."""

    columns: str  # as shown to a user
    needs: tuple[tuple[str, ...], ...]  # one column of every group must be there
    unless: tuple[str, ...]  # and none of these
    read: Callable[[Columns], Columns]
    named: bool = False  # only used where the config names it


def order_of(row: Columns, names: tuple[str, str]) -> int:
    """Which of two responses won, 0 or 1; a tie, the votes and scores are written into the row.

    Reads `winner` or `better_response_id`, `tie`, and `votes_a` and `votes_b`, or votes with the
    ends that the responses have (`votes_0` and `votes_1`).

    Args:
        row: The row without the two responses.
        names: Their columns; where the first ends in 1 they are numbered from 1.
    """
    votes = _of_both(row, "votes", names)
    winner = row.pop("winner", row.pop("better_response_id", None))
    if winner is None and row.get("tie"):
        winner = "tie"
    if winner is None and votes:
        for_a, for_b = (number(count) or 0.0 for count in votes)
        winner = "tie" if for_a == for_b else "ab"[for_b > for_a]
    won = side_of(winner, names)
    if won is None:
        raise DataError(
            f"{names[0]} and {names[1]} need a `winner` (a, b or tie), `better_response_id`, `tie` "
            f"or `votes_a` and `votes_b`; the winner found is {show(winner)}"
        )
    if won < 0:
        won, row["tie"] = 0, row.get("tie") or True  # what is not a flag is named when it is read
    if votes:
        row["votes_chosen"], row["votes_rejected"] = votes[won], votes[1 - won]
    for stem in (*HIGHER, *LOWER):
        values = _of_both(row, stem, names)
        if values:
            row[f"{stem}_chosen"], row[f"{stem}_rejected"] = values[won], values[1 - won]
    return won


def side_of(winner: Any, names: tuple[str, str]) -> int | None:
    """The response that a winner names, 0 or 1; -1 for a tie, None for anything else."""
    first = int(names[0].endswith("_1"))
    sides = {"a": 0, "model_a": 0, names[0]: 0, "b": 1, "model_b": 1, names[1]: 1}
    sides |= {str(first): 0, str(first + 1): 1}
    named = str(winner).lower()
    # The arenas write "tie", "tie (bothbad)" and "both_bad".
    return -1 if named.startswith(("tie", "both")) else sides.get(named)


def ends_of(names: tuple[str, str]) -> tuple[tuple[str, str], ...]:
    """What tells the columns of two responses apart: a and b, and what their own names end in."""
    found = [_END.search(name) for name in names]
    own = tuple(end[1] for end in found if end)
    return (("a", "b"), (own[0], own[1])) if len(own) == 2 and own[0] != "a" else (("a", "b"),)


def _of_both(row: Columns, stem: str, names: tuple[str, str]) -> list[Any]:
    """What the two have under STEM_a and STEM_b, or under ends of their own, out of the row."""
    for ends in ends_of(names):
        keys = [f"{stem}_{end}" for end in ends]
        if all(row.get(key) is not None for key in keys):
            return [row.pop(key) for key in keys]
    return []


# Of layouts that papers on video have. Columns of media (`video`, `audio`, `start`, `end`) stay as
# they are; `parse_media` reads them.


def read_rrpo(row: Columns) -> Columns:
    """RRPO's question, answer and pred, and the same with <MASK> tags around what differs."""
    record: Columns = {"prompt": _asked(row.pop("question"))}
    for side, name in (("chosen", "answer"), ("rejected", "pred")):
        record[side] = row.pop(name)
        tagged = row.pop(f"{name}_masked", None)
        if tagged is not None and "<MASK>" in str(tagged):
            record[f"{side}_masked"] = tagged
    if "sample_id" in row:
        row.setdefault("id", row.pop("sample_id"))
    return record


def read_videochat2(row: Columns) -> Columns:
    """VideoChat2's QA and QA_NEG: the same questions with right and with wrong answers."""
    right, wrong = (_questions(row.pop(name), name) for name in ("QA", "QA_NEG"))
    if "sample_id" in row:
        row.setdefault("id", row.pop("sample_id"))
    pair = contrast(None, right, wrong)
    if len(pair["prompt"]) == 1:
        pair["prompt"] = pair["prompt"][0]["content"]
    return pair


def _questions(value: Any, column: str) -> Turns:
    """[{i, q, a}, ...] as turns; the instruction `i` stands before the question."""
    found: Turns = []
    for item in as_list(value) or [value]:
        parts = as_object(item) or {}
        if not isinstance(parts.get("q"), str) or "a" not in parts:
            raise DataError(f"{column} must hold {{q, a}}, but is {show(value)}")
        lead = str(parts.get("i") or "").strip()
        question = " ".join(part for part in (lead, parts["q"]) if part)
        found += exchange(_asked(question), parts["a"])
    return found


def read_cat(row: Columns) -> Columns:
    """CAT's conversations with <Q>question<Q> and <video>; two of them for its DPO.

    The release calls the first one rejected and trains it as chosen; here `chosen` and `rejected`
    say which is which, and `conversations1` counts as chosen where they are missing.
    """
    if "conversations1" not in row:
        prompt, response = split(turns(row.pop("conversations"), "conversations"))
        return {"prompt": _cleaned(prompt), "response": response}
    names = ("conversations1", "conversations2")
    (prompt, first), (other, second) = (split(turns(row.pop(name), name)) for name in names)
    if prompt != other:
        raise DataError(f"{' and '.join(names)} must ask the same")
    given = {side: row.pop(side) for side in ("chosen", "rejected") if side in row}
    for side, text in given.items():
        given[side] = text if isinstance(text, str) else response_of(turns(text, side)[-1:])
    if len(given) == 1:
        raise DataError("chosen and rejected must be given together, or neither")
    return {"prompt": _cleaned(prompt), "chosen": first, "rejected": second} | given


def read_media_question(row: Columns) -> Columns:
    """A question about `media`, with a better and a worse answer and the phrases that decide."""
    media = row.pop("media")
    record: Columns = {"prompt": row.pop("question")}
    record["audio" if str(media).lower().endswith((".mp3", ".wav", ".ogg")) else "video"] = media
    for side in ("chosen", "rejected"):
        record[side] = row.pop(side)
        phrase = row.pop(f"{side}_phrase", None)
        if phrase is not None:
            record[f"spans_{side}"] = [phrase]
    return record


def _asked(question: Any) -> Any:
    """A question without the mark that papers put first, whatever was shown."""
    if not isinstance(question, str):
        return question
    return re.sub(r"^\s*<(image|video)>\s*\n?", "", question)


def _cleaned(prompt: Turns) -> Turns:
    texts = (str(turn["content"]).replace("<Q>", "").rstrip() for turn in prompt)
    cleaned = (text.removesuffix("<video>").strip() for text in texts)
    return [{**turn, "content": text} for turn, text in zip(prompt, cleaned, strict=True)]


_SEEN = ("video", "videos", "audio", "audios", "image", "images", "video_id")

MEDIA_LAYOUTS: dict[str, Layout] = {
    "rrpo": Layout(
        "question, answer, pred, answer_masked, pred_masked, video",
        (("question",), ("answer",), ("pred",)),
        ("chosen", "rejected", "conversations", "messages"),
        read_rrpo,
    ),
    "videochat2": Layout(
        "video, QA, QA_NEG, start, end",
        (("QA",), ("QA_NEG",)),
        ("chosen", "rejected"),
        read_videochat2,
    ),
    "cat": Layout(
        "video, audio, conversations1, conversations2",
        (("conversations1",), ("conversations2",)),
        (),
        read_cat,
    ),
    "cat_instruct": Layout(
        "video_id, multi_choice, correct_answer, video, audio, conversations",
        (("conversations",), ("correct_answer",), _SEEN),
        ("chosen", "rejected", "messages"),
        read_cat,
    ),
    "media_question": Layout(
        "media, question, chosen, rejected, chosen_phrase, rejected_phrase",
        (("media",), ("question",), ("chosen",), ("rejected",)),
        ("prompt", "conversations", "messages"),
        read_media_question,
    ),
}


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


_ONE_MISSING = "one of the two images is missing"


def _prompt(row: Columns) -> Columns:
    """The caption under the name it has here; what a row names it otherwise stays."""
    name = next((name for name in CAPTIONS if name in row), None)
    return {} if name is None else {"prompt": row.pop(name)}


def taken(
    row: Columns, pairs: tuple[tuple[str, str], ...], missing: str
) -> tuple[tuple[str, str], list[Any]]:
    """The first of some pairs of columns that a row has, and their values, out of the row."""
    names = next((pair for pair in pairs if set(pair) <= set(row)), None)
    if names is None:
        raise DataError(missing)
    return names, [row.pop(name) for name in names]


def read_pair(row: Columns) -> Columns:
    """Two images, the better one under its own name."""
    prompt = _prompt(row)
    _, (chosen, rejected) = taken(row, PAIRS, _ONE_MISSING)
    return prompt | {"image_chosen": chosen, "image_rejected": rejected}


def read_choice(row: Columns) -> Columns:
    """Two images and which one won: Pick-a-Pic's label_0 and label_1, a label, or a winner.

    label_0 = 1 means that the first won, 1/2 a tie; `label` is the number of the better image.
    """
    prompt = _prompt(row)
    names, pictures = taken(row, CHOICES, _ONE_MISSING)
    if row.pop("has_label", True) is False:
        raise DataError("has_label is false: nobody compared the two images")
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
    """The better image by the shares of the preference that the two got."""
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
    """K images with scores, or with ranks where less is better."""
    prompt = _prompt(row)
    name = next(name for name in LISTS if name in row)
    images = as_list(row.pop(name))
    if images is None:
        raise DataError(f"{name} must be a list of images where there are scores or ranks")
    name = next(name for name in SCORES if name in row)
    scores = as_list(row.pop(name))
    if name in ("ranks", "rank"):
        numbers = [number(rank) for rank in scores or [None]]
        scores = [None if rank is None else -rank for rank in numbers]
    return prompt | {"images": images, "scores": scores}


def read_single(row: Columns) -> Columns:
    """One image, rated or not."""
    prompt = _prompt(row)
    image = row.pop(next(name for name in SINGLES if name in row))
    rating = row.pop("desirable", row.pop("label", row.pop("kto_tag", None)))
    return prompt | {"image": image} | ({} if rating is None else {"desirable": rating})


_OF_TEXTS = (
    *("chosen", "rejected", "response", "completion", "responses", "completions", "answers"),
    *("conversations", "messages", "query", "instruction", "response_a", "response_b"),
    *("response_0", "response_1", "response_2", "conversation_a", "conversation_b"),
)
_BETTER, _WORSE = zip(*PAIRS, strict=True)
_FIRST, _SECOND = zip(*CHOICES, strict=True)
_OF_PAIRS, _OF_CHOICES = (*_BETTER, *_WORSE), (*_FIRST, *_SECOND)

PICTURE_LAYOUTS: dict[str, Layout] = {
    "pictures": Layout(
        "prompt or caption, image_chosen and image_rejected, or win and lose",
        (_BETTER, _WORSE),
        (*_OF_TEXTS, *_OF_CHOICES),
        read_pair,
    ),
    "picture_choice": Layout(
        "caption, jpg_0 and jpg_1, or image_0 and image_1, and label_0 or winner",
        (_FIRST, _SECOND),
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
        "prompt or caption alone; images are generated in training",
        (CAPTIONS,),
        (),
        _prompt,
        named=True,
    ),
}


_ASKED = ("prompt", "messages", "conversations")
_ANSWERED = ("chosen", "rejected")
_REJECTED = "rejected_messages"  # with its own prompt
_TYPES = {
    "video": "video", "video_url": "video", "image": "image", "image_url": "image",
    "audio": "audio", "audio_url": "audio", "input_audio": "audio",
}  # fmt: skip
_KINDS = ("video", "image", "audio")
_BESIDE = {key: key for key in ("start", "end", "frames", "fps", "max_pixels")} | {
    "video_start": "start",
    "video_end": "end",
}
"""What a part may say of its medium; the last two as Qwen's own tools call them."""

Shown = dict[str, list[Any]]  # kind -> its media in order; None where the path is elsewhere


def shown_in_messages(row: Columns) -> Columns:
    """The row with content parts of messages as text with marks, and their media in columns.

        {"type": "video"}                            its path stands in the column `videos`
        {"type": "video", "video": PATH, "start": S} or in the part, with seconds or frames

    The columns are `videos`, `images` and `audios`; what the rejected conversation shows else goes
    to `videos_rejected` and so on, and so do ms-swift's `rejected_videos` and its like.

    Raises:
        DataError: A part is of an unknown kind, has no path, or says what is not read.
    """
    row = dict(row)
    for kind in _KINDS:
        if f"rejected_{kind}s" in row:
            row[f"{kind}s_rejected"] = row.pop(f"rejected_{kind}s")
    found = {name: _flattened(row, name) for name in (*_ASKED, *_ANSWERED, _REJECTED)}
    for kind in _KINDS if any(found.values()) else ():
        asked = [medium for name in _ASKED for medium in found[name].get(kind, ())]
        chosen, rejected = (_with(asked, found[name].get(kind, [])) for name in _ANSWERED)
        if _REJECTED in row:
            rejected = found[_REJECTED].get(kind, [])
        _fill(row, kind, "", chosen)
        if rejected != chosen and ("rejected" in row or _REJECTED in row):
            _fill(row, kind, "_rejected", rejected)
    return row


def _with(asked: list[Any], answered: list[Any]) -> list[Any]:
    """Media of a prompt with its response, which may repeat the prompt."""
    return answered if answered[: len(asked)] == asked else asked + answered


def _fill(row: Columns, kind: str, side: str, media: list[Any]) -> None:
    """Put the media of parts in their column, unless it has them."""
    if not media:
        return
    names = [name for name in (f"{kind}{side}", f"{kind}s{side}") if row.get(name) is not None]
    given = [medium for medium in media if medium is not None]
    if not given:
        if not names:
            raise DataError(
                f"messages have a part of type {kind} without a path, and there is no column "
                f"{kind}s{side} that holds it"
            )
        return
    if len(given) < len(media):
        raise DataError(f"some parts of type {kind} have a path and some have none")
    if not names:
        row[f"{kind}s{side}"] = media
        return
    column = as_list(row[names[0]])
    if (column if column is not None else [row[names[0]]]) != media:
        raise DataError(f"{names[0]} and the parts of type {kind} in the messages differ")


def _flattened(row: Columns, column: str) -> Shown:
    """What the messages of a column show; in the row, they become text with marks."""
    items = as_list(row.get(column)) or []
    if not any(_has_media(item) for item in items):
        return {}
    shown: Shown = {}
    row[column] = [_flat(item, column, shown) for item in items]
    return shown


def _content(message: Any) -> tuple[str, list[Any]]:
    turn = as_object(message) or {}
    name = "content" if "content" in turn else "value"
    return name, as_list(turn.get(name)) or []


def _has_media(message: Any) -> bool:
    return any(str((as_object(part) or {}).get("type")) in _TYPES for part in _content(message)[1])


def _flat(message: Any, column: str, shown: Shown) -> Any:
    turn = as_object(message)
    name, parts = _content(message)
    if turn is None or not parts:
        return message
    text = ""
    for item in parts:
        # Tables fill the keys that a part of another type has with null.
        part = {k: v for k, v in (as_object(item) or {}).items() if v is not None}
        kind = _TYPES.get(str(part.get("type")))
        if kind is not None and turn.get("role", turn.get("from")) in ASSISTANTS:
            raise DataError(f"{column} shows a medium in an answer; only questions can show media")
        if kind is not None:
            text += f"<{kind}>"
            shown.setdefault(kind, []).append(_medium(part, kind))
        elif part.get("type") == "text" and isinstance(part.get("text"), str):
            text += part["text"]
        else:
            raise DataError(
                f"{column} has a part that is neither text, video, image nor audio: {show(item)}"
            )
    return {**turn, name: text}


def _medium(part: dict[str, Any], kind: str) -> Any:
    """The path of a part, an object where it also says which stretch; None without a path."""
    names = (str(part["type"]), kind, "path", "url")
    values = [part[name] for name in dict.fromkeys(names) if name in part]
    left = {k: v for k, v in part.items() if k not in (*names, "type") and (k, v) != ("text", "")}
    for key in left:
        if key not in _BESIDE:
            raise DataError(
                f"a part of type {kind} has {key!r}, which is not read from messages; how many "
                "frames of which size are shown is set under `video` in the config"
            )
    if len(values) > 1 or (left and not values):
        raise DataError(f"a part of type {kind} must have one path, but is {show(part, 80)}")
    if not values:
        return None
    inside = as_object(values[0]) or {}
    path = inside["url"] if set(inside) == {"url"} else values[0]
    return {"path": path} | {_BESIDE[k]: v for k, v in left.items()} if left else path
