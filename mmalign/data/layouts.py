"""The public record layouts, each turned into a canonical record (see `example.py`).

A reader takes the columns it understands out of the row it is given and returns the canonical keys
they amount to; what it leaves in the row is carried along by `convert.to_record`.
"""

from __future__ import annotations

from typing import Any

from mmalign.data.columns import asked, check_is_said, could_ask, no_shared_words
from mmalign.data.fields import as_list, as_object, number, show
from mmalign.data.layout import Layout, order_of
from mmalign.data.media_layouts import MEDIA_LAYOUTS
from mmalign.data.parse_media import KINDS
from mmalign.data.picture_layouts import PICTURE_LAYOUTS
from mmalign.data.turns import (
    Columns,
    Turns,
    answer_of,
    are_messages,
    contrast,
    response_of,
    shared_words,
    split,
    transcript,
    turns,
)
from mmalign.errors import DataError


def read_pair(row: Columns) -> Columns:
    """chosen and rejected: TRL, UltraFeedback-binarized, HH-RLHF, and mmalign's own."""
    chosen, rejected = row.pop("chosen", None), row.pop("rejected", None)
    if chosen is None or rejected is None:
        return {"prompt": asked(row), "chosen": chosen, "rejected": rejected}
    if not (isinstance(chosen, str) and isinstance(rejected, str)):
        return _conversations(row, _said(chosen, "chosen"), _said(rejected, "rejected"))
    spoken, answered = transcript(chosen), transcript(rejected)
    if spoken and answered and _is_asked_in(row.get("prompt", ""), chosen, spoken):
        row.pop("prompt", None)
        return contrast(None, spoken, answered)
    prompt = asked(row)
    if prompt is None and not ("prompt_chosen" in row and "prompt_rejected" in row):
        others = could_ask(row)
        if others:
            raise no_shared_words(others)
        check_is_said(row)
        return shared_words(chosen, rejected)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _is_asked_in(prompt: Any, text: str, conversation: Turns) -> bool:
    """Whether a transcript begins with the prompt, or has it as a turn."""
    asked = str(prompt).strip()
    return text.startswith(str(prompt)) or any(t["content"] == asked for t in conversation)


def _said(response: Any, column: str) -> Turns:
    """A response as turns; text is one of the assistant."""
    if isinstance(response, str):
        return [{"role": "assistant", "content": response}]
    return turns(response, column)


def _conversations(row: Columns, chosen: Turns, rejected: Turns) -> Columns:
    """Two conversations, or answers as messages to what a column of the row asks."""
    answers = all(side and side[0]["role"] == "assistant" for side in (chosen, rejected))
    own = "prompt_chosen" in row and "prompt_rejected" in row
    if answers and own and "prompt" not in row:
        return {"chosen": response_of(chosen), "rejected": response_of(rejected)}
    prompt = asked(row) if answers or "prompt" in row else None
    pair = contrast(prompt, chosen, rejected)
    if isinstance(prompt, str) and all(turn["content"] != prompt for turn in pair["prompt"]):
        row["prompt"] = prompt  # the conversations say what was asked; this goes to meta
    return pair


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
    column = next(name for name in LISTS if name in row)
    items = as_list(row.pop(column))
    if items is None:
        raise DataError(f"{column} must be a list of responses")
    scores = as_list(row.pop("scores", row.pop("ratings", row.pop("rating", None))))
    ranks = as_list(row.pop("ranks", None))
    texts: list[Any] = []
    inside: list[Any] = []
    for item in items:
        parts = as_object(item) or {}
        named = next((parts[k] for k in LISTED if k in parts and "role" not in parts), item)
        texts.append(named if isinstance(named, str) else response_of(turns(named, column)))
        inside.append(next((parts[k] for k in SCORED if k in parts), None))
        ranks = ranks if "rank" not in parts else [*(ranks or []), parts["rank"]]
    if scores is None and ranks is not None:
        scores = [None if (n := number(rank)) is None else -n for rank in ranks]
    if scores is None and any(score is not None for score in inside):
        scores = inside
    return {"prompt": asked(row), "responses": texts, "scores": scores}


def read_single(row: Columns) -> Columns:
    """One response: rated (KTO's completion and label) or not."""
    response = next(row.pop(name) for name in _RESPONSES if name in row)
    record = {"prompt": asked(row), "response": response}
    if not isinstance(response, str):
        record["response"] = response_of(turns(response, "completion"))
    if isinstance(record["prompt"], str) and not isinstance(response, str):
        record["prompt"] = [{"role": "user", "content": record["prompt"]}]
    return record | _rating(row)


def _rating(row: Columns) -> Columns:
    """`desirable` from the names it has elsewhere."""
    given = {name: row.pop(name) for name in ("desirable", "label", "kto_tag") if name in row}
    for name, rating in given.items():
        if not isinstance(rating, bool) and number(rating) not in (0.0, 1.0):
            raise DataError(f"{name} must be true or false, but is {show(rating)}")
    return {"desirable": next(iter(given.values()))} if given else {}


def read_alpaca(row: Columns) -> Columns:
    """LLaMA-Factory's alpaca: instruction, input, system, history; chosen/rejected or output.

    Beside a pair a column `prompt` is the prompt, and the instruction is left over.
    """
    if "chosen" in row:
        if "prompt" not in row:
            row["prompt"] = asked(row)
        return read_pair(row)
    beside = {"prompt": row.pop("prompt")} if "prompt" in row else {}
    query = asked(row)
    row |= beside
    output = next((row.pop(name) for name in _OUTPUTS if name in row), None)
    both = as_list(output)
    if both is not None and not are_messages(both):
        if len(both) != 2 or not all(isinstance(text, str) for text in both):
            raise DataError(f"output must be text, or [chosen, rejected], but is {show(output)}")
        return {"prompt": query, "chosen": both[0], "rejected": both[1]}
    response = output if isinstance(output, str) else response_of(turns(output, "output"))
    return {"prompt": query, "response": response} | _rating(row)


def read_sharegpt(row: Columns) -> Columns:
    """LLaMA-Factory's sharegpt: conversations, then chosen/rejected messages or a kto_tag."""
    conversation = turns(row.pop("conversations"), "conversations")
    if "chosen" not in row and "rejected" not in row:
        prompt, response = split(conversation)
        return {"prompt": prompt, "response": response} | _rating(row)
    chosen, rejected = row.pop("chosen", None), row.pop("rejected", None)
    if chosen is None or rejected is None:
        return {"prompt": conversation, "chosen": chosen, "rejected": rejected}
    sides = _said(chosen, "chosen"), _said(rejected, "rejected")
    if conversation[-1]["role"] == "assistant" and sides[0][0]["role"] == "assistant":
        if conversation[-len(sides[0]) :] != sides[0]:
            raise DataError("conversations must end with the turn that chosen and rejected answer")
        conversation = conversation[: -len(sides[0])]
    return contrast(conversation, *sides)


def read_messages(row: Columns) -> Columns:
    """ms-swift: messages or query and response; rejected_response, rejected_messages or label.

    A rejected response stands in the place of all that follows the last turn of the user. Rejected
    media alone are the same answer about something else.
    """
    other = any(f"{kind}s_rejected" in row for kind in KINDS)
    if "messages" in row:
        conversation = turns(row.pop("messages"), "messages")
        if "rejected_messages" in row:
            rejected = turns(row.pop("rejected_messages"), "rejected_messages")
            return contrast(None, conversation, rejected)
        if "rejected_response" in row or other:
            start = answer_of(conversation)
            prompt, response = conversation[:start], response_of(conversation[start:])
        else:
            prompt, response = split(conversation)
    else:
        prompt, response = asked(row), row.pop("response", None)
    if "rejected_response" in row or other:
        rejected = row.pop("rejected_response", response)
        if not isinstance(rejected, str):
            rejected = response_of(turns(rejected, "rejected_response"))
        return {"prompt": prompt, "chosen": response, "rejected": rejected}
    return {"prompt": prompt, "response": response} | _rating(row)


LISTS = ("responses", "completions", "answers", "generations")
LISTED = ("response", "text", "completion", "answer", "content")
"""Names of the words of one response of a list."""

_RESPONSES = ("response", "completion", "output")
_OUTPUTS = ("output", "response", "completion")
SCORED = ("score", "overall_score", "rating", "pm_score")
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
        "prompt, responses (or completions, answers, generations), scores or ranks",
        (LISTS,),
        ("chosen", "rejected", "conversations", "messages", "query", *_CHOICE_COLUMNS),
        read_ranked,
    ),
    "single": Layout(
        "prompt, response or completion, and desirable or label where it is rated",
        (("prompt", "question", "problem", "input", "context"), _RESPONSES),
        ("chosen", "rejected", "responses", *_STRUCTURED, *_CHOICE_COLUMNS),
        read_single,
    ),
    "alpaca": Layout(
        "instruction, input, and chosen and rejected, or output (and kto_tag)",
        (("instruction",), ("chosen", *_OUTPUTS)),
        ("conversations",),
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
