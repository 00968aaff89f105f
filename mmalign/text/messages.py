"""Turns of a record as chat templates take them, and what of them a rendering must hold."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, cast

from mmalign.errors import DataError
from mmalign.text import thoughts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from mmalign.data.example import Message, Template
    from mmalign.text.jinja import JinjaTemplate

_WORD = re.compile(r"\w+")
_SWITCH = re.compile(r"/(?:no_?)?think\b")  # in a text, for the template alone
_SAYING = ("tool_calls", "tool_plan", "function_call", *thoughts.REASONING)
"""Keys that hold a part of what a turn says; ids, names and the like may go unread."""


def as_message(
    turn: Message, template: JinjaTemplate, content: Callable[[str], Any], where: str
) -> dict[str, Any]:
    """A turn as a template takes it; its thought under every name that templates know.

    Raises:
        DataError: It has a key that the template does not read.
    """
    message = turn.as_dict()
    message["content"] = content(turn.content)
    if not turn.extra:
        return message
    thought = thought_of(turn)
    for key in _SAYING:
        if not message.get(key):
            continue
        names = thoughts.REASONING if key in thoughts.REASONING else (key,)
        # What the answer's own thought becomes where no template reads it is told by its context.
        if turn.role == "assistant" and key in thoughts.REASONING:
            continue
        if not template.words.intersection(names):
            raise unread(key, where)
    if thought:
        message = {**message, "reasoning_content": thought, "thinking": thought}
    if isinstance(message.get("tool_calls"), list):
        message["tool_calls"] = [_call(call) for call in cast("list[Any]", message["tool_calls"])]
    return message


def thought_of(turn: Message) -> str | None:
    """The thought that a record gives beside the words of a turn."""
    found = (turn.as_dict().get(key) for key in thoughts.REASONING) if turn.extra else ()
    return next((str(value) for value in found if value), None)


def thought_key(turn: Message) -> str:
    """The name that the record gives it."""
    return next((key for key in thoughts.REASONING if turn.as_dict().get(key)), "")


def call_names(turn: Message) -> list[str]:
    """The names of the functions that a turn calls."""
    if not turn.extra:
        return []
    calls: Any = turn.as_dict().get("tool_calls") or ()
    found: list[str] = []
    for call in calls:
        inner = call.get("function", call) if isinstance(call, dict) else {}
        if isinstance(inner, dict) and inner.get("name"):
            found.append(str(cast("Any", inner["name"])))
    return found


def said_at(body: str, words: str, turn: Message) -> int:
    """Where a turn's words begin in a body, or its first call; the body's end where none does."""
    for text in (words, *call_names(turn)[:1]):
        if text and text in body:
            return body.find(text)
    return len(body)


def with_text_arguments(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages with the arguments of their calls as JSON text, which some templates expect."""
    return [
        {**message, "tool_calls": [_call(call, as_text=True) for call in message["tool_calls"]]}
        if isinstance(message.get("tool_calls"), list)
        else dict(message)
        for message in messages
    ]


def _call(call: Any, *, as_text: bool = False) -> Any:
    """A call with its arguments as an object, or as the text of one."""
    if not isinstance(call, dict):
        return call
    known = cast("dict[str, Any]", call)
    if isinstance(known.get("function"), dict):
        return {"type": "function", **known, "function": _call(known["function"], as_text=as_text)}
    given = known.get("arguments")
    if as_text and not isinstance(given, str):
        return {**known, "arguments": json.dumps(given, ensure_ascii=False)}
    if not as_text and isinstance(given, str):
        try:
            read = json.loads(given)
        except ValueError:
            return call
        return {**known, "arguments": read} if isinstance(read, dict) else call
    return call


def unread(key: str, where: str) -> DataError:
    """That a template does not know a key."""
    return DataError(
        f"{where}: a turn has {key}, which the chat template does not write; take the key out, or "
        "use a model or text.chat_template that knows it"
    )


def require_told(turns: Iterable[Message], rendered: str, where: str) -> None:
    """Refuse a rendering that lacks a turn of the conversation.

    A template may rewrite a turn a little (a tool's result as JSON, a switch taken out): most of
    its words must be there. Thoughts of earlier answers are left out by many, as at inference.

    Raises:
        DataError: naming the role whose turn is lost.
    """
    for turn in turns:
        text = turn.content.strip()
        if text in rendered:
            continue
        if turn.role == "assistant":
            text = thoughts.split(text, None)[1].strip()
        words = _WORD.findall(_SWITCH.sub("", text))
        known = set(_WORD.findall(rendered))
        if 4 * sum(word in known for word in words) < 3 * len(words):
            raise DataError(
                f"{where}: the chat template leaves out the turn of the {turn.role} "
                f"({text[:60]!r}); change the row, or use a model or text.chat_template that "
                "writes it"
            )
    for turn in turns:
        for name in call_names(turn):
            if name not in rendered:
                raise unread("tool_calls", where)


def tool_names(row: Template) -> list[str]:
    """The names of the tools that a row hands its template."""
    tools: Any = json.loads(row.tools) if row.tools else ()
    found = [tool.get("function", tool) for tool in tools if isinstance(tool, dict)]
    return [str(tool["name"]) for tool in found if isinstance(tool, dict) and tool.get("name")]


def writes_repr(given: Iterable[Mapping[str, Any]], rendered: str) -> bool:
    """Whether a template wrote arguments of calls as Python does, in single quotes."""
    for message in given:
        for call in message.get("tool_calls") or ():
            inner = call.get("function", call) if isinstance(call, dict) else {}
            arguments = inner.get("arguments") if isinstance(inner, dict) else None
            if isinstance(arguments, dict) and arguments and str(arguments) in rendered:
                return str(arguments) != json.dumps(arguments, ensure_ascii=False)
    return False
