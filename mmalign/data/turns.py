"""Conversations and transcripts, however a layout writes them, as {role, content} messages."""

from __future__ import annotations

import re
from typing import Any

from mmalign.data.fields import SPEAKING, TURN_KEYS, as_list, as_object, show
from mmalign.data.tools import as_calls, calls_of
from mmalign.errors import DataError

Columns = dict[str, Any]
Turns = list[dict[str, Any]]

ASSISTANTS = ("assistant", "gpt", "bot", "model", "chatgpt")
_CALLS = ("tool_call", "tool_calls", "function_call")
_RESULTS = ("tool", "tool_response", "observation", "function", "function_response")
_ROLES = (
    {"human": "user", "user": "user", "prompter": "user", "system": "system"}
    | dict.fromkeys(ASSISTANTS, "assistant")
    | dict.fromkeys(_RESULTS, "tool")
    | dict.fromkeys(_CALLS, "tool_call")
)
KNOWN_ROLES = frozenset((*_ROLES, "developer", "ipython"))
_EXCHANGES = (("human", "assistant"), ("user", "assistant"), ("input", "output"))
"""Keys of a question and its answer in one object: ms-swift's, and Capybara's."""

_TEXTS = ("text", "input_text", "output_text")
_WRAPPERS = ("messages", "conversations", "conversation")
_TRANSCRIPT_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


def turns(value: Any, column: str) -> Turns:
    """Messages as {role, content}, from {from, value}, one message alone or lists of text parts.

    Calls of tools become `tool_calls` of an assistant turn, their results turns of role `tool`,
    whatever roles stand for them: ms-swift's tool_call and tool_response, LLaMA-Factory's
    function_call and observation, OpenAI's former function_call. What else a message has it keeps.

    Raises:
        DataError: `value` is no list of messages, or a call cannot be read.
    """
    whole = as_object(value) or {}
    inside = [whole[key] for key in _WRAPPERS if as_list(whole.get(key))]
    items = as_list(inside[0] if len(inside) == 1 else [value] if whole else value)
    if items is None:
        raise DataError(f"{column} must be a list of messages, but is {show(value)}")
    result: Turns = []
    for item in items:
        for turn in _exchange(item) or [_turn(item, column)]:
            _add(result, turn)
    if not result:
        raise DataError(f"{column} is empty")
    return result


def are_messages(value: Any) -> bool:
    """Whether a value is a list of messages, or one message, as `turns` reads them."""
    try:
        return bool(turns(value, ""))
    except DataError:
        return False


def _exchange(item: Any) -> Turns:
    """The turns of {question: ..., answer: ...}, or the one of {human: ...}."""
    parts = as_object(item) or {}
    if "role" in parts or "from" in parts:
        return []
    if len(parts) == 1:
        ((key, text),) = parts.items()
        known = key.lower() in _ROLES and isinstance(text, str)
        return [{"role": _ROLES[key.lower()], "content": text}] if known else []
    names = next((names for names in _EXCHANGES if set(names) <= set(parts)), None)
    if names is None:
        return []
    texts = [_joined(parts[name]) for name in names]
    if not all(isinstance(text, str) for text in texts):
        return []
    return [{"role": "user", "content": texts[0]}, {"role": "assistant", "content": texts[1]}]


def _turn(item: Any, column: str) -> dict[str, Any]:
    turn = as_object(item) or {}
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    extra = {k: v for k, v in turn.items() if k not in ("role", "content", "from", "value")}
    if content is None and any(extra.get(key) for key in (*SPEAKING, "function_call")):
        content = ""
    if not isinstance(role, str) or content is None:
        raise DataError(
            f"{column} must hold messages with role and content, or from and value, "
            f"but holds {show(item)}"
        )
    if not isinstance(content, str):
        content = _joined(content)
    role = (
        "tool_call" if role == "function" and calls_of(content) else _ROLES.get(role.lower(), role)
    )
    if not extra and role != "tool_call":
        return {"role": role, "content": content}
    calls = extra.pop("function_call", None) or extra.get("tool_calls")
    if role == "tool_call":
        calls, role, content = content, "assistant", ""
    if calls not in (None, "", []):
        extra["tool_calls"] = as_calls(calls, column)
    return {**extra, "role": role, "content": content}


def _add(result: Turns, turn: dict[str, Any]) -> None:
    """Append a turn; calls without words join the assistant turn right before them."""
    if len(turn) == 2:
        result.append(turn)
        return
    last = result[-1] if result else {}
    further = [key for key in TURN_KEYS if key != "tool_calls" and turn.get(key)]
    silent = turn.get("tool_calls") and not turn["content"] and not further
    if silent and last.get("role") == turn["role"] == "assistant":
        result[-1] = {**last, "tool_calls": (last.get("tool_calls") or []) + turn["tool_calls"]}
    else:
        result.append(turn)


def _joined(content: Any) -> Any:
    """Content given as parts [{"type": "text", "text": ...}] as one string."""
    parts = [as_object(part) or {} for part in as_list(content) or []]
    texts = [part.get("text") if part.get("type", "text") in _TEXTS else None for part in parts]
    spoken = [text for text in texts if isinstance(text, str)]
    return "".join(spoken) if texts and len(spoken) == len(texts) else content


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
    """One assistant turn that has words alone is its text; anything else stays messages."""
    alone = rest[0] if len(rest) == 1 else {}
    plain = alone.get("role") == "assistant" and not any(alone.get(key) for key in TURN_KEYS)
    further = {key for key in alone if alone[key] is not None} - {"role", "content"}
    return alone["content"] if plain and not further else rest


def split(conversation: Turns) -> tuple[Turns, Any]:
    """A conversation as (prompt, response).

    The response is the last turn; where tools were called on the way to it, all that follows the
    last turn of the user.
    """
    if len(conversation) < 2 or conversation[-1]["role"] != "assistant":
        raise DataError("a conversation must end with an assistant turn that answers another turn")
    start = answer_of(conversation)
    if not any(turn["role"] == "tool" or turn.get("tool_calls") for turn in conversation[start:]):
        start = len(conversation) - 1
    return conversation[:start], response_of(conversation[start:])


def answer_of(conversation: Turns) -> int:
    """Where the answer to the last user turn begins.

    Raises:
        DataError: No user turn comes before an assistant's.
    """
    asked = max((i for i, t in enumerate(conversation) if t["role"] == "user"), default=-1)
    starts = (
        i for i in range(asked + 1, len(conversation)) if conversation[i]["role"] == "assistant"
    )
    start = next(starts, 0)
    if start == 0:
        raise DataError("a conversation must end with an assistant turn that answers another turn")
    return start


def contrast(prompt: Any, chosen: Turns, rejected: Turns) -> Columns:
    """Two conversations as a pair: what they share goes to the prompt."""
    head = turns(prompt, "prompt") if not isinstance(prompt, str | None) else []
    again = _repeated(head, chosen, rejected)
    chosen, rejected = chosen[again:], rejected[again:]
    if not chosen or not rejected:
        raise DataError("chosen and rejected must hold an answer after their prompt")
    if head and {side[0]["role"] for side in (head[-1:], chosen, rejected)} == {"user"}:
        raise DataError("the prompt and the conversations of chosen and rejected begin differently")
    longest = min(len(chosen), len(rejected)) - 1
    shared = next((i for i in range(longest) if _differ(chosen[i], rejected[i])), max(longest, 0))
    while shared > 0 and "assistant" not in (chosen[shared]["role"], rejected[shared]["role"]):
        shared -= 1  # a response begins with the assistant: the turn before belongs to it
    if isinstance(prompt, str) and shared <= 0:
        head = [{"role": "user", "content": prompt}]
    if not head and shared <= 0:
        raise DataError("there is no prompt: chosen and rejected share no first message")
    return {
        "prompt": head + chosen[:shared],
        "chosen": response_of(chosen[shared:]),
        "rejected": response_of(rejected[shared:]),
    }


def _repeated(head: Turns, *sides: Turns) -> int:
    """How many first turns of all sides are the last ones of the prompt."""
    for count in range(min(map(len, (head, *sides))), 0, -1):
        ends = head[len(head) - count :]
        if not any(_differ(a, b) for side in sides for a, b in zip(ends, side, strict=False)):
            return count
    return 0


def _differ(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two turns say different things; dates and scores of a turn say nothing."""
    keys = (
        ("role", "content", *TURN_KEYS) if len(one) > 2 or len(other) > 2 else ("role", "content")
    )
    return any((one.get(key) or None) != (other.get(key) or None) for key in keys)


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
