"""The public record layouts, each turned into a canonical record (see `example.py`).

A reader takes the columns it understands out of the row it is given and returns the canonical keys
they amount to; what it leaves in the row is carried along by `convert.to_record`.
"""

from __future__ import annotations

from typing import Any

from mmalign.data.fields import as_list, as_object, number
from mmalign.data.layout import Layout, order_of
from mmalign.data.media_layouts import MEDIA_LAYOUTS
from mmalign.data.picture_layouts import PICTURE_LAYOUTS
from mmalign.data.turns import (
    Columns,
    Turns,
    contrast,
    prompt_of,
    response_of,
    shared_words,
    split,
    transcript,
    turns,
)
from mmalign.errors import DataError


def read_pair(row: Columns) -> Columns:
    """chosen and rejected: TRL, UltraFeedback-binarized, HH-RLHF, and mmalign's own."""
    prompt, chosen, rejected = (row.pop(key, None) for key in ("prompt", "chosen", "rejected"))
    if chosen is None or rejected is None:
        return {"prompt": prompt_of(prompt), "chosen": chosen, "rejected": rejected}
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise DataError("chosen and rejected must both be text or both be messages")
    if not isinstance(chosen, str):
        pair = contrast(prompt, turns(chosen, "chosen"), turns(rejected, "rejected"))
        if isinstance(prompt, str) and all(t["content"] != prompt for t in pair["prompt"]):
            row["prompt"] = prompt  # the conversations say what was asked; this goes to meta
        return pair
    spoken, answered = transcript(chosen), transcript(rejected)
    if spoken and answered and (prompt is None or chosen.startswith(str(prompt))):
        return contrast(None, spoken, answered)
    if prompt is None and not ("prompt_chosen" in row and "prompt_rejected" in row):
        return shared_words(chosen, rejected)
    return {"prompt": prompt_of(prompt), "chosen": chosen, "rejected": rejected}


def read_choice(row: Columns) -> Columns:
    """Two responses and which one won; without a winner, a tie."""
    names = next((pair for pair in CHOICES if set(pair) <= set(row)), None)
    if names is None:
        raise DataError("one of the two responses is missing")
    a, b = (row.pop(name) for name in names)
    first = order_of(row, names)
    row["chosen"], row["rejected"] = (b, a) if first else (a, b)
    return read_pair(row)


def read_ranked(row: Columns) -> Columns:
    """K responses with scores, or with ranks where 1 is best."""
    prompt = row.pop("prompt", row.pop("instruction", None))
    column = next(name for name in ("responses", "completions", "answers") if name in row)
    items = as_list(row.pop(column))
    if items is None:
        raise DataError(f"{column} must be a list of responses")
    scores = as_list(row.pop("scores", row.pop("ratings", None)))
    ranks = as_list(row.pop("ranks", None))
    texts: list[Any] = []
    inside: list[Any] = []
    for item in items:
        parts = as_object(item) or {}
        named = next((parts[k] for k in ("response", "text", "completion") if k in parts), item)
        single = response_of(turns(named, column)) if as_list(named) else named
        texts.append(parts["content"] if named is item and "content" in parts else single)
        inside.append(next((parts[k] for k in ("score", "overall_score") if k in parts), None))
        ranks = ranks if "rank" not in parts else [*(ranks or []), parts["rank"]]
    if scores is None and ranks is not None:
        scores = [None if number(rank) is None else -rank for rank in ranks]
    return {
        "prompt": prompt_of(prompt),
        "responses": texts,
        "scores": inside if scores is None else scores,
    }


def read_single(row: Columns) -> Columns:
    """One response: rated (KTO's completion and label) or not."""
    response = row.pop("response", row.pop("completion", None))
    record = {"prompt": prompt_of(row.pop("prompt", None)), "response": response}
    if not isinstance(response, str):
        record["response"] = response_of(turns(response, "completion"))
    if isinstance(record["prompt"], str) and not isinstance(response, str):
        record["prompt"] = [{"role": "user", "content": record["prompt"]}]
    return record | _rating(row)


def _rating(row: Columns) -> Columns:
    """`desirable` from the names it has elsewhere."""
    rating = row.pop("desirable", row.pop("label", row.pop("kto_tag", None)))
    return {} if rating is None else {"desirable": rating}


def read_alpaca(row: Columns) -> Columns:
    """LLaMA-Factory's alpaca: instruction, input, system, history; chosen/rejected or output."""
    words = (row.pop("instruction"), row.pop("input", None))
    query = "\n".join(str(part) for part in words if part)
    record = _asked(row, query)
    if "chosen" in row:
        return record | {"chosen": row.pop("chosen"), "rejected": row.pop("rejected", None)}
    return record | {"response": row.pop("output")} | _rating(row)


def _asked(row: Columns, query: str) -> Columns:
    """The prompt of a query with its optional system text and history of [question, answer]."""
    system, history = row.pop("system", None), as_list(row.pop("history", None)) or []
    head: Turns = [{"role": "system", "content": system}] if system else []
    for item in history:
        question, answer = (as_list(item) or [None, None])[:2]
        head += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"prompt": [*head, {"role": "user", "content": query}] if head else query}


def read_sharegpt(row: Columns) -> Columns:
    """LLaMA-Factory's sharegpt: conversations, then chosen/rejected messages or a kto_tag."""
    conversation = turns(row.pop("conversations"), "conversations")
    system = row.pop("system", None)
    head: Turns = [{"role": "system", "content": system}] if system else []
    if "chosen" in row:
        sides = {side: turns(row.pop(side, None), side) for side in ("chosen", "rejected")}
        return {"prompt": head + conversation} | {k: response_of(v) for k, v in sides.items()}
    prompt, response = split(conversation)
    return {"prompt": head + prompt, "response": response} | _rating(row)


def read_messages(row: Columns) -> Columns:
    """ms-swift: messages or query and response; rejected_response, rejected_messages or label."""
    if "messages" in row:
        conversation = turns(row.pop("messages"), "messages")
        if "rejected_messages" in row:
            rejected = turns(row.pop("rejected_messages"), "rejected_messages")
            return contrast(None, conversation, rejected)
        prompt, response = split(conversation)
        record: Columns = {"prompt": prompt}
    else:
        record, response = _asked(row, str(row.pop("query"))), row.pop("response", None)
    if "rejected_response" in row:
        return record | {"chosen": response, "rejected": row.pop("rejected_response")}
    return record | {"response": response} | _rating(row)


CHOICES = (
    ("response_a", "response_b"),
    ("response_0", "response_1"),
    ("response_1", "response_2"),
    ("conversation_a", "conversation_b"),
)
_STRUCTURED = ("conversations", "messages", "query", "instruction")
_CHOICE_COLUMNS = tuple(name for pair in CHOICES for name in pair)

LAYOUTS: dict[str, Layout] = {
    "pair": Layout(
        "prompt (or shared by both), chosen, rejected",
        (("chosen", "rejected"),),
        ("conversations", "conversations1", "instruction", "media", *_CHOICE_COLUMNS),
        read_pair,
    ),
    "choice": Layout(
        "prompt, response_a, response_b, winner or votes_a and votes_b or tie",
        (
            ("response_a", "response_0", "response_1", "conversation_a"),
            ("response_b", "response_1", "response_2", "conversation_b"),
        ),
        ("chosen", "rejected", "responses"),
        read_choice,
    ),
    "ranked": Layout(
        "prompt, responses (or completions, answers), scores or ranks",
        (("responses", "completions", "answers"),),
        ("chosen", "rejected", "conversations", "messages", "query", *_CHOICE_COLUMNS),
        read_ranked,
    ),
    "single": Layout(
        "prompt, response or completion, and desirable or label where it is rated",
        (("prompt",), ("response", "completion")),
        ("chosen", "rejected", "responses", *_STRUCTURED, *_CHOICE_COLUMNS),
        read_single,
    ),
    "alpaca": Layout(
        "instruction, input, and chosen and rejected, or output (and kto_tag)",
        (("instruction",), ("chosen", "output")),
        ("conversations", "messages", "completions", "responses"),
        read_alpaca,
    ),
    "sharegpt": Layout(
        "conversations, and chosen and rejected, or kto_tag",
        (("conversations",),),
        ("messages", "instruction", "responses", "correct_answer"),
        read_sharegpt,
    ),
    "messages": Layout(
        "messages (or query, response), and rejected_response, rejected_messages or label",
        (("messages", "query"),),
        ("chosen", "rejected", "conversations", "instruction", "responses"),
        read_messages,
    ),
    **MEDIA_LAYOUTS,
    **PICTURE_LAYOUTS,
}
