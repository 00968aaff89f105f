"""Layouts of records about clips: what chat messages show, and those of papers.

Parts of a message's content ({"type": "video"}, with the path inside or in a column beside it)
become marks in its text, and the paths go to the columns `videos`, `images` and `audios`.
"""

from __future__ import annotations

import re
from typing import Any

from mmalign.data.fields import as_list, as_object, show
from mmalign.data.layout import Layout
from mmalign.data.turns import Columns, split, turns
from mmalign.errors import DataError

_MESSAGES = ("prompt", "messages", "chosen", "rejected", "conversations", "rejected_messages")
_PARTS = {
    "video": "video", "video_url": "video", "image": "image", "image_url": "image",
    "audio": "audio", "audio_url": "audio", "input_audio": "audio",
}  # fmt: skip
_PLURAL = {"video": "videos", "image": "images", "audio": "audios"}
_SIDES = ("videos", "images", "audios")


def shown_in_messages(row: Columns) -> Columns:
    """The row with content parts as text with marks, and their paths in columns.

    ms-swift's `rejected_videos` and its like become the media of that side. Media that two
    conversations share count once.
    """
    row = dict(row)
    for plural in _SIDES:
        if f"rejected_{plural}" in row:
            row[f"{plural}_rejected"] = row.pop(f"rejected_{plural}")
    found: dict[str, dict[str, Any]] = {}
    for column in _MESSAGES:
        items = as_list(row.get(column))
        if items and any(_has_parts(item) for item in items):
            row[column] = [_flat(item, found) for item in items]
    for kind, paths in found.items():
        if paths:
            row.setdefault(_PLURAL[kind], list(paths.values()))
    return row


def _has_parts(message: Any) -> bool:
    turn = as_object(message) or {}
    parts = as_list(turn.get("content", turn.get("value"))) or []
    return any((as_object(part) or {}).get("type") in _PARTS for part in parts)


def _flat(message: Any, found: dict[str, dict[str, Any]]) -> Any:
    turn = as_object(message)
    parts = as_list((turn or {}).get("content", (turn or {}).get("value")))
    if turn is None or parts is None:
        return message
    text = ""
    for item in parts:
        part = as_object(item) or {}
        kind = _PARTS.get(str(part.get("type")))
        if kind is None:
            text += str(part.get("text") or "")
            continue
        text += f"<{kind}>"
        value = part.get(str(part["type"]), part.get(kind, part.get("path", part.get("url"))))
        value = (as_object(value) or {}).get("url", value)
        if value is not None:
            found.setdefault(kind, {}).setdefault(show(value, 500), value)
    name = "content" if "content" in turn else "value"
    return {**turn, name: text}


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
    """VideoChat2's QA and QA_NEG: one question with a right and a wrong answer."""
    sides: list[Columns] = []
    for name in ("QA", "QA_NEG"):
        value = row.pop(name)
        turn = as_object((as_list(value) or [value])[0])
        if turn is None or not {"q", "a"} <= set(turn):
            raise DataError(f"{name} must hold {{q, a}}, but is {show(value)}")
        sides.append(turn)
    if "sample_id" in row:
        row.setdefault("id", row.pop("sample_id"))
    lead = str(sides[0].get("i") or "").strip()
    question = _asked(" ".join(part for part in (lead, str(sides[0]["q"])) if part))
    return {"prompt": question, "chosen": sides[0]["a"], "rejected": sides[1]["a"]}


def read_cat(row: Columns) -> Columns:
    """CAT's conversations with <Q>question<Q> and <video>; two of them for its DPO.

    The release calls the first one rejected and trains it as chosen; here `chosen` and `rejected`
    say which is which, and `conversations1` counts as chosen where they are missing.
    """
    if "conversations1" in row:
        pair = [turns(row.pop(f"conversations{i}"), f"conversations{i}") for i in (1, 2)]
        (prompt, first), (_, second) = (split(conversation) for conversation in pair)
        given = [row.pop(side, None) for side in ("chosen", "rejected")]
        chosen, rejected = (
            g if isinstance(g, str) else r for g, r in zip(given, (first, second), strict=True)
        )
        return {"prompt": _cleaned(prompt), "chosen": chosen, "rejected": rejected}
    prompt, response = split(turns(row.pop("conversations"), "conversations"))
    return {"prompt": _cleaned(prompt), "response": response}


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


def _cleaned(prompt: list[dict[str, Any]]) -> list[dict[str, Any]]:
    cleaned: list[dict[str, Any]] = []
    for turn in prompt:
        text = re.sub(r"\s*<video>\s*$", "", str(turn["content"]).replace("<Q>", ""))
        cleaned.append({**turn, "content": text.strip()})
    return cleaned


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
