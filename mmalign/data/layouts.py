"""The public record layouts, each turned into a canonical record (see `example.py`).

A reader takes the columns it understands out of the row it is given and returns the canonical keys
they amount to; what it leaves in the row is carried along by `convert.to_record`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mmalign.data.fields import as_list, as_object, number, show
from mmalign.errors import DataError

Columns = dict[str, Any]
Turns = list[dict[str, Any]]

_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
_TRANSCRIPT_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


@dataclass(frozen=True, slots=True)
class Layout:
    """How a layout is recognised and read."""

    columns: str  # as shown to a user
    needs: tuple[tuple[str, ...], ...]  # one column of every group must be there
    unless: tuple[str, ...]  # and none of these
    read: Callable[[Columns], Columns]


def turns(value: Any, column: str) -> Turns:
    """Messages as {role, content}, from {from, value}, one message alone or lists of text parts."""
    items = [value] if as_object(value) else as_list(value)
    if items is None:
        raise DataError(f"{column} must be a list of messages, but is {show(value)}")
    result: Turns = []
    for item in items:
        turn = as_object(item) or {}
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or content is None:
            raise DataError(
                f"{column} must hold messages with role and content, or from and value, "
                f"but holds {show(item)}"
            )
        extra = {k: v for k, v in turn.items() if k not in ("role", "content", "from", "value")}
        result.append({**extra, "role": _ROLES.get(role, role), "content": _joined(content)})
    return result


def _joined(content: Any) -> Any:
    """Content given as parts [{"type": "text", "text": ...}] as one string."""
    parts = [as_object(part) or {} for part in as_list(content) or []]
    texts = [part.get("text") for part in parts]
    return "".join(map(str, texts)) if texts and None not in texts else content


def transcript(text: str) -> Turns | None:
    """The turns of a "Human: ...\\n\\nAssistant: ..." text without a last empty one, or None."""
    marks = list(_TRANSCRIPT_TURN.finditer(text))
    if not marks or marks[0].start() != 0 or marks[0][1] != "Human":
        return None
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    contents = [text[mark.end() : end].strip() for mark, end in zip(marks, ends, strict=True)]
    roles = ["user" if mark[1] == "Human" else "assistant" for mark in marks]
    result: Turns = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
    return result if result[-1]["content"] or len(result) == 1 else result[:-1]


def _prompt(value: Any) -> Any:
    """A prompt column: messages, a transcript that ends in "Assistant:", or plain text."""
    if not isinstance(value, str):
        return value if value is None else turns(value, "prompt")
    spoken = transcript(value) if value.rstrip().endswith("Assistant:") else None
    return spoken or value


def _response(rest: Turns) -> Any:
    """One assistant turn is its text; several stay messages."""
    return rest[0]["content"] if len(rest) == 1 and rest[0]["role"] == "assistant" else rest


def _split(conversation: Turns) -> tuple[Turns, Any]:
    """A conversation as (prompt, response): the response is its last turn."""
    if len(conversation) < 2 or conversation[-1]["role"] != "assistant":
        raise DataError("a conversation must end with an assistant turn that answers another turn")
    return conversation[:-1], _response(conversation[-1:])


def _contrast(prompt: Any, chosen: Turns, rejected: Turns) -> Columns:
    """Two conversations as a pair: what they share goes to the prompt."""
    head = turns(prompt, "prompt") if not isinstance(prompt, str | None) else []
    if head and chosen[: len(head)] == rejected[: len(head)] == head:
        chosen, rejected = chosen[len(head) :], rejected[len(head) :]
    longest = min(len(chosen), len(rejected)) - 1
    shared = next((i for i in range(longest) if chosen[i] != rejected[i]), longest)
    if isinstance(prompt, str) and shared <= 0:
        head = [{"role": "user", "content": prompt}]
    if not head and shared <= 0:
        raise DataError("there is no prompt: chosen and rejected share no first message")
    return {
        "prompt": head + chosen[:shared],
        "chosen": _response(chosen[shared:]),
        "rejected": _response(rejected[shared:]),
    }


def _shared_words(chosen: str, rejected: str) -> Columns:
    """Two texts without a prompt column: the words both begin with are the prompt."""
    longest = min(len(chosen), len(rejected))
    shared = next((i for i in range(longest) if chosen[i] != rejected[i]), longest)
    cut = (
        chosen[: shared + 1].rstrip().rfind(" ")
        if shared < longest
        else chosen.rfind(" ", 0, shared)
    )
    if cut <= 0:
        raise DataError("there is no prompt column, and chosen and rejected share no first words")
    return {"prompt": chosen[:cut], "chosen": chosen[cut:], "rejected": rejected[cut:]}


def read_pair(row: Columns) -> Columns:
    """chosen and rejected: TRL, UltraFeedback-binarized, HH-RLHF, and mmalign's own."""
    prompt, chosen, rejected = (row.pop(key, None) for key in ("prompt", "chosen", "rejected"))
    if chosen is None or rejected is None:
        return {"prompt": _prompt(prompt), "chosen": chosen, "rejected": rejected}
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise DataError("chosen and rejected must both be text or both be messages")
    if not isinstance(chosen, str):
        pair = _contrast(prompt, turns(chosen, "chosen"), turns(rejected, "rejected"))
        if isinstance(prompt, str) and all(t["content"] != prompt for t in pair["prompt"]):
            row["prompt"] = prompt  # the conversations say what was asked; this goes to meta
        return pair
    spoken, answered = transcript(chosen), transcript(rejected)
    if spoken and answered and (prompt is None or chosen.startswith(str(prompt))):
        return _contrast(None, spoken, answered)
    if prompt is None and not ("prompt_chosen" in row and "prompt_rejected" in row):
        return _shared_words(chosen, rejected)
    return {"prompt": _prompt(prompt), "chosen": chosen, "rejected": rejected}


def read_choice(row: Columns) -> Columns:
    """Two responses and which one won; without a winner, a tie."""
    names = next(pair for pair in CHOICES if set(pair) <= set(row))
    a, b = (row.pop(name) for name in names)
    votes = [row.pop(f"votes_{side}", None) for side in "ab"]
    winner = row.pop("winner", row.pop("better_response_id", None))
    if winner is None and row.get("tie"):
        winner = "tie"
    if winner is None and None not in votes:
        winner = "tie" if votes[0] == votes[1] else "ab"[votes[1] > votes[0]]
    sides = {"a": 0, "model_a": 0, names[0]: 0, "b": 1, "model_b": 1, names[1]: 1}
    if names[0] != "response_1":
        sides |= {"0": 0, "1": 1}
    else:
        sides |= {"1": 0, "2": 1}
    if str(winner).startswith("tie"):
        first = 0
        row["tie"] = True
    elif str(winner) in sides:
        first = sides[str(winner)]
    else:
        raise DataError(
            f"{names[0]} and {names[1]} need a `winner` (a, b or tie), `better_response_id`, `tie` "
            f"or `votes_a` and `votes_b`; the winner found is {show(winner)}"
        )
    if None not in votes:
        row["votes_chosen"], row["votes_rejected"] = votes[first], votes[1 - first]
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
        single = _response(turns(named, column)) if as_list(named) else named
        texts.append(parts["content"] if named is item and "content" in parts else single)
        inside.append(next((parts[k] for k in ("score", "overall_score") if k in parts), None))
        ranks = ranks if "rank" not in parts else [*(ranks or []), parts["rank"]]
    if scores is None and ranks is not None:
        scores = [None if number(rank) is None else -rank for rank in ranks]
    return {
        "prompt": _prompt(prompt),
        "responses": texts,
        "scores": inside if scores is None else scores,
    }


def read_single(row: Columns) -> Columns:
    """One response: rated (KTO's completion and label) or not."""
    response = row.pop("response", row.pop("completion", None))
    record = {"prompt": _prompt(row.pop("prompt", None)), "response": response}
    if not isinstance(response, str):
        record["response"] = _response(turns(response, "completion"))
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
        return {"prompt": head + conversation} | {k: _response(v) for k, v in sides.items()}
    prompt, response = _split(conversation)
    return {"prompt": head + prompt, "response": response} | _rating(row)


def read_messages(row: Columns) -> Columns:
    """ms-swift: messages or query and response; rejected_response, rejected_messages or label."""
    if "messages" in row:
        conversation = turns(row.pop("messages"), "messages")
        if "rejected_messages" in row:
            rejected = turns(row.pop("rejected_messages"), "rejected_messages")
            return _contrast(None, conversation, rejected)
        prompt, response = _split(conversation)
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
        ("conversations", "instruction", *_CHOICE_COLUMNS),
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
        ("messages", "instruction", "responses"),
        read_sharegpt,
    ),
    "messages": Layout(
        "messages (or query, response), and rejected_response, rejected_messages or label",
        (("messages", "query"),),
        ("chosen", "rejected", "conversations", "instruction", "responses"),
        read_messages,
    ),
}
