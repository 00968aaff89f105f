"""Turns of a record as messages for a template, or as plain text, and what follows a context."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from mmalign.data.example import Asked, Candidate, Message, Prompt, Template
from mmalign.errors import ConfigError, DataError
from mmalign.text import frame
from mmalign.text.tokenizer import JinjaTemplate

log = logging.getLogger(__name__)

_WORD = re.compile(r"\w+")
_SWITCH = re.compile(r"/(?:no_?)?think\b")  # in a text, for the template alone
_SAYING = ("tool_calls", "tool_plan", "function_call", *frame.REASONING)
"""Keys that hold a part of what a turn says; ids, names and the like may go unread."""

_SPEAKERS = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: ", "system": ""}
_SILENT = {"tool_call_id", "name", "id"}  # keys that say nothing which a transcript would lose
_NO_TEMPLATE = "no chat template is in use (the tokenizer has none, or text.chat_template is false)"


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
    for key in filter(message.get, _SAYING):
        is_thought = key in frame.REASONING
        # What the response's own thought becomes where no template reads it is told by its context.
        told = is_thought and turn.role == "assistant"
        if not told and not template.words.intersection(frame.REASONING if is_thought else (key,)):
            raise unread(key, where)
    if thought := thought_of(turn):
        message = {**message, "reasoning_content": thought, "thinking": thought}
    if isinstance(message.get("tool_calls"), list):
        message["tool_calls"] = [_call(call) for call in cast("list[Any]", message["tool_calls"])]
    return message


def thought_key(turn: Message) -> str:
    """The key under which a record gives a thought beside the words of a turn; "" for none."""
    given = turn.as_dict() if turn.extra else {}
    return next(filter(given.get, frame.REASONING), "")


def thought_of(turn: Message) -> str | None:
    """The thought itself; None where the record gives none."""
    key = thought_key(turn)
    return str(turn.as_dict()[key]) if key else None


def call_names(turn: Message) -> list[str]:
    """The names of the functions that a turn calls."""
    return _names(turn.as_dict().get("tool_calls") or ()) if turn.extra else []


def tool_names(row: Template) -> list[str]:
    """The names of the tools that a row hands its template."""
    return _names(json.loads(row.tools) if row.tools else ())


def _names(functions: Any) -> list[str]:
    return [str(name) for item in functions if (name := _inner(item).get("name"))]


def _inner(item: Any) -> dict[str, Any]:
    """The function of a call or a tool, which may stand by itself."""
    inner = item.get("function", item) if isinstance(item, dict) else None
    return inner if isinstance(inner, dict) else {}


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
    its words must be there. Thoughts of earlier responses are left out by many, as at inference.

    Raises:
        DataError: naming the role whose turn is lost.
    """
    for turn in turns:
        text = turn.content.strip()
        if text in rendered:
            continue
        if turn.role == "assistant":
            text = frame.split(text, None)[1].strip()
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


def writes_repr(given: Iterable[Mapping[str, Any]], rendered: str) -> bool:
    """Whether a template wrote arguments of calls as Python does, in single quotes."""
    for message in given:
        for call in message.get("tool_calls") or ():
            arguments = _inner(call).get("arguments")
            if isinstance(arguments, dict) and arguments and str(arguments) in rendered:
                return str(arguments) != json.dumps(arguments, ensure_ascii=False)
    return False


@dataclass(frozen=True, slots=True)
class Response:
    """What follows the context: the response as the model sees it, then the end of its turn."""

    answer: str  # the record's own words; spans and steps count its characters
    body: str  # what the model sees of them
    end: str  # the end as text
    offset: int | None  # where the record's response starts in body; None: the template rewrote it
    with_eos: bool = True  # whether the eos follows the end, which a template may not write
    # Of several turns: the characters of body and end that the assistant wrote; None: all.
    scored: tuple[tuple[int, int], ...] | None = None


def answer_turns(candidate: Candidate, where: str) -> tuple[Message, ...]:
    """The turns of a response, of which the first is the assistant's.

    Raises:
        DataError: It is a file, or it does not begin with an assistant turn.
    """
    response = candidate.response
    if isinstance(response, str):
        return (Message("assistant", response),)
    if not isinstance(response, tuple):
        raise DataError(
            f"{where}: the response is the file {response}; text needs a string. A model of "
            "images is trained with modality: diffusion"
        )
    if not response or response[0].role != "assistant":
        raise DataError(
            f"{where}: the response has turns {[turn.role for turn in response]}; its first must "
            "be the assistant's. Put earlier turns into the prompt"
        )
    return response


class PlainText:
    """No template: a prompt is its own text; a conversation becomes a transcript.

    The end token after a response is the encoder's to add.
    """

    is_chat = False

    def context(self, prompt: Prompt | Asked, where: str) -> str:
        """The prompt's text with nothing added, or the transcript up to the assistant's turn.

        Source of the transcript's form: HH-RLHF, Bai et al. 2022, arXiv:2204.05862.
        """
        if isinstance(prompt, Asked):
            _refuse_template(prompt.template, where)
            prompt = prompt.prompt
        if isinstance(prompt, str):
            return prompt
        text = _transcript(prompt, where)
        goes_on = bool(prompt) and prompt[-1].role == "assistant"
        return text if goes_on else text + "\n\nAssistant:"

    def responses(
        self, prompt: Prompt | Asked, candidates: Sequence[Candidate], where: str, *, last: bool
    ) -> tuple[str, list[Response]]:
        """The context and each response's text; after a transcript's colon comes a space."""
        context = self.context(prompt, where)
        opened = self._opens(prompt, context)
        return context, [
            _response(answer_turns(candidate, where), opened, where, last=last)
            for candidate in candidates
        ]

    def _opens(self, prompt: Prompt | Asked, context: str) -> bool:
        """Whether the context ends in the colon of a transcript; video has none."""
        conversation = prompt.prompt if isinstance(prompt, Asked) else prompt
        return context.endswith(":") and not isinstance(conversation, str)


def _response(turns: Sequence[Message], opened: bool, where: str, *, last: bool) -> Response:
    first = turns[0]
    _transcript(turns, where)  # refuses what it cannot write
    space = " " if opened and not first.content.startswith(" ") else ""
    body = space + first.content
    if len(turns) == 1:
        return Response(first.content, body, "", len(space))
    scored = [(0, len(body))]
    for turn in turns[1:]:
        body += _SPEAKERS[turn.role]
        if turn.role == "assistant":
            scored.append((len(body), len(body) + len(turn.content)))
        body += turn.content
    shown = scored[-1:] if last else scored
    return Response(turns[-1].content, body[: scored[-1][1]], "", None, scored=tuple(shown))


def _transcript(turns: Sequence[Message], where: str) -> str:
    unknown = [turn.role for turn in turns if turn.role not in _SPEAKERS]
    if unknown:
        raise ConfigError(
            f"{where}: the conversation has turns of {unknown}, but {_NO_TEMPLATE}, and a "
            f"transcript knows {sorted(_SPEAKERS)} only. Use a chat model, or give the prompt as "
            "one string"
        )
    for turn in turns:
        lost = [key for key in turn.as_dict() if key not in {"role", "content", *_SILENT}]
        if lost:
            raise DataError(
                f"{where}: a turn of the {turn.role} has {', '.join(lost)}, but {_NO_TEMPLATE} to "
                "write it. Use a chat model, or take the key out"
            )
    return "".join(_SPEAKERS[turn.role] + turn.content for turn in turns)


def _refuse_template(row: Template, where: str) -> None:
    keys = {"tools": row.tools, "chat_template_kwargs": row.options}
    lost = [key for key, value in keys.items() if value]
    if lost:
        raise DataError(
            f"{where}: the row has {' and '.join(lost)}, but {_NO_TEMPLATE} to read it. Use a chat "
            "model, or take the column out"
        )


class Notes:
    """Rows by what was done to them; a row counts once however often it is encoded.

    Attributes:
        rows: By name, the rows.
        sentences: By name, what it means; of names that need a word.
        said: Sentences about all rows.
        quiet: Whether a survey has said all this, so that nothing is logged.
    """

    def __init__(self) -> None:
        """Nothing was done yet."""
        self.rows: dict[str, set[Hashable]] = {}
        self.sentences: dict[str, str] = {}
        self.said: list[str] = []
        self.quiet = False

    def count(self, name: str, row: str, warning: str = "", *, surveyed: bool = True) -> None:
        """Note that something was done to a row; a warning is logged the first time.

        `surveyed`: a survey of the rows finds it too.
        """
        if warning and name not in self.sentences:
            self.sentences[name] = warning
            if not (self.quiet and surveyed):
                log.warning("row %r: %s (said once; counted in %s)", row, warning, name)
        self.rows.setdefault(name, set()).add(row)

    def say(self, sentence: str) -> None:
        """A sentence about all rows, once."""
        if sentence not in self.said:
            self.said.append(sentence)
            if not self.quiet:
                log.warning("%s", sentence)

    @property
    def counts(self) -> Counter[str]:
        """Rows by name."""
        return Counter({name: len(rows) for name, rows in self.rows.items()})
