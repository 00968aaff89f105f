"""The layouts that papers on video have, each turned into a canonical record.

Columns of media (`video`, `audio`, `start`, `end`) stay as they are; `parse_media` reads them.
"""

from __future__ import annotations

import re
from typing import Any

from mmalign.data.fields import as_list, as_object, show
from mmalign.data.layout import Layout
from mmalign.data.turns import Columns, Turns, contrast, response_of, split, turns
from mmalign.errors import DataError


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
        found += [
            {"role": "user", "content": _asked(question)},
            {"role": "assistant", "content": parts["a"]},
        ]
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


def _cleaned(prompt: list[dict[str, Any]]) -> list[dict[str, Any]]:
    cleaned: list[dict[str, Any]] = []
    for turn in prompt:
        text = str(turn["content"]).replace("<Q>", "").rstrip().removesuffix("<video>")
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
