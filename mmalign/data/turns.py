"""Conversations and transcripts, however a layout writes them, as {role, content} messages."""

from __future__ import annotations

import re
from typing import Any

from mmalign.data.fields import as_list, as_object, show
from mmalign.errors import DataError

Columns = dict[str, Any]
Turns = list[dict[str, Any]]

ASSISTANTS = ("assistant", "gpt", "bot", "model")
_ROLES = {"human": "user"} | dict.fromkeys(ASSISTANTS, "assistant")
_TRANSCRIPT_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


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
    result: Turns = []
    for mark, end in zip(marks, ends, strict=True):
        role, content = _ROLES[mark[1].lower()], text[mark.end() : end].strip()
        if result and result[-1]["role"] == role:  # chat templates want the roles to alternate
            result[-1]["content"] = f"{result[-1]['content']}\n\n{content}".strip()
        else:
            result.append({"role": role, "content": content})
    return result if result[-1]["content"] or len(result) == 1 else result[:-1]


def prompt_of(value: Any) -> Any:
    """A prompt column: messages, a transcript that ends in "Assistant:", or plain text."""
    if not isinstance(value, str):
        return value if value is None else turns(value, "prompt")
    spoken = transcript(value) if value.rstrip().endswith("Assistant:") else None
    return spoken or value


def response_of(rest: Turns) -> Any:
    """One assistant turn is its text; several stay messages."""
    return rest[0]["content"] if len(rest) == 1 and rest[0]["role"] == "assistant" else rest


def split(conversation: Turns) -> tuple[Turns, Any]:
    """A conversation as (prompt, response): the response is its last turn."""
    if len(conversation) < 2 or conversation[-1]["role"] != "assistant":
        raise DataError("a conversation must end with an assistant turn that answers another turn")
    return conversation[:-1], response_of(conversation[-1:])


def contrast(prompt: Any, chosen: Turns, rejected: Turns) -> Columns:
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
        "chosen": response_of(chosen[shared:]),
        "rejected": response_of(rejected[shared:]),
    }


def shared_words(chosen: str, rejected: str) -> Columns:
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
