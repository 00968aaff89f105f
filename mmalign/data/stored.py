"""Conversations that a table stores as text, read back: JSON, and what pandas and datasets write.

`to_csv` writes a list as Python does, with single quotes and None; lists that went through numpy
lose their commas ("[{...}\\n {...}]") or get "array(...)" around them.
"""

from __future__ import annotations

import ast
import io
import json
import re
import tokenize
from contextlib import suppress
from typing import Any

from mmalign.data.fields import as_list, as_object, is_deep, show
from mmalign.data.turns import KNOWN_ROLES, Columns, are_messages
from mmalign.errors import DataError

LONGEST = 2**22
"""Characters of a text that is read as Python writes it; of JSON there may be more."""

SPOKEN = (
    *("prompt", "chosen", "rejected", "response", "completion", "responses", "completions"),
    *("answers", "generations", "messages", "conversations", "conversation", "rejected_messages"),
    *("rejected_response", "chosen_response", "conversation_a", "conversation_b", "context"),
    *("response_a", "response_b", "response_0", "response_1", "response_2", "trajectory", "output"),
    *("question", "query", "input", "instruction", "preferred_output", "non_preferred_output"),
    *("prompt_chosen", "prompt_rejected", "response1", "response2", "calibration", "rationale"),
)
"""Columns that may hold a conversation."""

STRUCTURED = ("tools", "chat_template_kwargs", "history", "objects")
"""Columns that hold lists or objects and no plain text, other than tools by themselves."""

_NUMBERED = ("scores", "ratings", "rating", "ranks")
_LISTED = (
    *("responses", "completions", "answers", "generations", *_NUMBERED),
    *("messages", "conversations", "conversation", "rejected_messages"),
)
"""Columns that hold a list, whatever is in it."""

_ROLE = re.compile(r"""(["'])(?:role|from)\1\s*:\s*(["']?)([\w ]+)\2""")  # some quote keys only
_OF_CLASSES = re.compile(r"""\s*\[?(?:OrderedDict|\w*Message)\(.*\brole\b""", re.DOTALL)
_BEGIN = re.compile(r"\s*+(?:array\()?\[?\s*+\{")
_BEGIN_PYTHON = re.compile(r"\s*(?:array\(|\[|\{)")
_SAID = re.compile(r"""(["'])(?:content|value|tool_calls)\1\s*:""")
_VALUES = (tokenize.STRING, tokenize.NUMBER, tokenize.NAME)
_SPACE = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
_OPENING, _CLOSING = ("[", "{", "("), ("]", "}", ")")
_NAMES = {"nan": "None", "NaN": "None", "null": "None", "true": "True", "false": "False"}


class Unreadable(ValueError):
    """A text that is neither JSON nor what Python writes."""


def read_back(row: Columns) -> Columns:
    """The row with the conversations that its columns hold as text.

    Raises:
        DataError: A text that looks like a conversation cannot be read.
    """
    found = {name: _read(_as_list(row[name], name), name) for name in SPOKEN if name in row}
    found |= {name: _as_list(row[name], name) for name in _NUMBERED if name in row}
    for name in STRUCTURED:
        value = row.get(name)
        if isinstance(value, str) and value.strip()[:1] in ("[", "{"):
            try:
                found[name] = literal(value)
            except Unreadable as error:
                raise DataError(f"{name} cannot be read: {error}") from error
    return {**row, **found}


def _as_list(value: Any, column: str) -> Any:
    """The list that a text is, in columns of lists; anything else as it is."""
    if column not in _LISTED or not isinstance(value, str) or value.strip()[:1] != "[":
        return value
    with suppress(Unreadable):
        return literal(value)
    return value


def _read(value: Any, column: str) -> Any:
    if isinstance(value, str):
        return _conversation(value, column)
    items = as_list(value)
    if items is None or not any(isinstance(item, str) for item in items):
        return value
    return [_read(item, column) for item in items]


def _conversation(text: str, column: str) -> Any:
    """The messages that a text holds, or the text where it is one."""
    if text.startswith(('"[', '"{')):  # JSON text written as JSON once more
        with suppress(ValueError, RecursionError):
            inner = json.loads(text)
            again = _conversation(inner, column) if isinstance(inner, str) else inner
            return text if isinstance(again, str) else again
    if _OF_CLASSES.match(text):
        raise _not_read(column, "it holds objects of Python and no plain ones")
    if not _looks_spoken(text):
        return text
    try:
        value = literal(text)
    except Unreadable as error:
        role = _ROLE.search(text)
        if role is None or role[3].lower() not in KNOWN_ROLES:
            return text
        raise _not_read(column, str(error)) from error
    return value if _is_spoken(value) else text


def _not_read(column: str, why: str) -> DataError:
    return DataError(
        f"{column} looks like a conversation written as text, and cannot be read: {why}. "
        "Write it as a list of messages, or as the JSON text of one"
    )


def _looks_spoken(text: str) -> bool:
    """Whether a text begins as a list of objects, or one, and has a role and words of it."""
    if not _BEGIN.match(text):
        return False
    return bool(_ROLE.search(text) and _SAID.search(text))


def _is_spoken(value: Any) -> bool:
    """Whether a value is meant as messages. Other lists of objects are answers in JSON."""
    items = as_list(value)
    parts = [as_object(item) or {} for item in ([value] if items is None else items)]
    roles = [part.get("role", part.get("from")) for part in parts]
    if not parts or not all(isinstance(role, str) for role in roles):
        return items is None and are_messages(value)  # {"messages": [...]}
    said = [part.get("content", part.get("value")) for part in parts]
    if any(str(role).lower() not in KNOWN_ROLES for role in roles):
        bare = all(set(part) == {"role", "content"} for part in parts)
        return len(parts) > 1 and bare and all(isinstance(words, str) for words in said)
    return True


def literal(text: str) -> Any:
    """The value of a text in JSON, or as Python or numpy writes lists, objects, texts and numbers.

    Raises:
        Unreadable: It is none of these, or too long or too deep.
    """
    value = _literal(text)
    if is_deep(value):
        raise Unreadable("it is nested too deeply")
    return value


def _literal(text: str) -> Any:
    with suppress(ValueError, RecursionError):
        return json.loads(text)
    if not _BEGIN_PYTHON.match(text):
        raise Unreadable("it is no JSON")
    if len(text) > LONGEST:
        raise Unreadable(f"it is no JSON, and longer than {LONGEST} characters")
    try:
        return ast.literal_eval(_with_commas(text.strip()))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        what = "it is neither JSON nor what Python writes"
        raise Unreadable(f"{what}; it ends in {show(text[-20:])}") from error
    except tokenize.TokenError as error:
        raise Unreadable(f"it is cut off: it ends in {show(text[-20:])}") from error


def _with_commas(text: str) -> str:
    """The text of a value with the commas, and without the "array(...)", that numpy wrote."""
    parts: list[str] = []
    opened: list[str] = []  # brackets that are open
    ended = False  # whether a value has just ended
    last = ""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.ERRORTOKEN:  # a quote that nothing closes on its line
            raise SyntaxError(f"{token.string!r} stands alone")
        word = token.string
        if token.type in _SPACE or (token.type == tokenize.NAME and word in ("array", "object")):
            last = word or last
            continue
        if word == "(" and last == "array":
            word = "array("
        if ended and (token.type in _VALUES or word in _OPENING or word in ("-", "array(")):
            parts.append(",")
        if word in _OPENING or word == "array(":
            opened.append(word)
        closed = opened.pop() if opened and word in _CLOSING else ""
        ended = token.type in _VALUES or bool(closed)
        last = word
        if word == "dtype":  # array([...], dtype=object)
            parts, ended, last = parts[:-1], False, ""
        elif word not in ("=", "array(") and closed != "array(":
            parts.append(_NAMES.get(word, word) if token.type == tokenize.NAME else word)
    return " ".join(parts)
