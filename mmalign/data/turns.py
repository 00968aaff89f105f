"""Conversations, tools and transcripts, however a file writes or stores them, as messages.

Messages are {role, content}, and tools and calls of tools what chat templates take:

    tools        [{"type": "function", "function": {"name": ..., "parameters": {...}}}]
    tool_calls   [{"type": "function", "function": {"name": ..., "arguments": {...}}}]
"""

from __future__ import annotations

import ast
import io
import json
import re
import tokenize
from contextlib import suppress
from typing import Any

from mmalign.data.fields import SPEAKING, TURN_KEYS, as_list, as_object, is_deep, show
from mmalign.errors import DataError


def as_calls(value: Any, column: str) -> list[dict[str, Any]]:
    """Calls of tools as `tool_calls` of a message.

    Args:
        value: {name, arguments} or {function: {name, arguments}}, a list of such, or the JSON text
            of either. Arguments are an object, or its JSON text.
        column: Where they stand, for messages.

    Raises:
        DataError: They are none of these.
    """
    calls = calls_of(value)
    if not calls:
        raise DataError(
            f"{column} has a call of a tool that is not {{name, arguments}}, a list of such or its "
            f"JSON text: {show(value, 80)}"
        )
    return calls


def calls_of(value: Any) -> list[dict[str, Any]]:
    """The same, [] where a value holds no calls."""
    parsed = _parsed(value)
    items = as_list(parsed)
    calls = [_call(item) for item in ([parsed] if items is None else items)]
    return [] if None in calls else [call for call in calls if call is not None]


def _call(item: Any) -> dict[str, Any] | None:
    call = as_object(_parsed(item)) or {}
    function = as_object(call.get("function"))
    inner = call if function is None else function
    name = inner.get("name")
    key = "arguments" if "arguments" in inner else "parameters"
    # OpenAI writes arguments as text, and templates want the object; no arguments are none.
    arguments = as_object(_parsed(inner.get(key) or {}))
    if not isinstance(name, str) or not name or arguments is None:
        return None
    if function is None and set(call) - {"name", key, "id", "type"}:
        return None
    known = ("function", "name", "type", key)
    further = {k: v for k, v in call.items() if k not in known and v is not None}
    return {**further, "type": "function", "function": {"name": name, "arguments": arguments}}


def as_tools(value: Any) -> Any:
    """Tools with the object around each that templates expect; what is not tools stays as it is."""
    items = as_list(_parsed(value))
    tools = [as_object(_parsed(item)) for item in items or ()]
    if not tools or None in tools:
        return value
    return [_tool(tool) for tool in tools if tool is not None]


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    inner = as_object(tool.get("function"))
    if inner is None and isinstance(tool.get("name"), str) and "type" not in tool:
        tool, inner = {"type": "function"}, tool
    if inner is None:
        return tool
    parameters = as_object(_parsed(inner.get("parameters")))
    function = inner if parameters is None else {**inner, "parameters": parameters}
    return {**tool, "function": function}


def _parsed(value: Any) -> Any:
    """What a JSON text says; anything else as it is."""
    if isinstance(value, str) and value.strip()[:1] in ("{", "["):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


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
        DataError: `value` is not a list of messages, or a call cannot be read.
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
    asked, answered = (_joined(parts[name]) for name in names)
    if not (isinstance(asked, str) and isinstance(answered, str)):
        return []
    return exchange(asked, answered)


def exchange(asked: str, answered: str) -> Turns:
    """A question and its answer as turns."""
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]


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
    roles = [turn["role"] for turn in conversation]
    asked = max((i for i, role in enumerate(roles) if role == "user"), default=-1)
    start = roles.index("assistant", asked + 1) if "assistant" in roles[asked + 1 :] else 0
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
    further = TURN_KEYS if len(one) > 2 or len(other) > 2 else ()
    keys = ("role", "content", *further)
    return any((one.get(key) or None) != (other.get(key) or None) for key in keys)


def shared_words(chosen: str, rejected: str) -> Columns:
    """Two texts without a prompt column: the words both begin with are the prompt."""
    longest = min(len(chosen), len(rejected))
    shared = next((i for i in range(longest) if chosen[i] != rejected[i]), longest)
    is_whole = shared == longest
    cut = (chosen[:shared] if is_whole else chosen[: shared + 1].rstrip()).rfind(" ")
    if cut <= 0:
        raise DataError("there is no prompt column, and chosen and rejected share no first words")
    return {"prompt": chosen[:cut], "chosen": chosen[cut:], "rejected": rejected[cut:]}


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
    """The row with the conversations that its columns hold as text: JSON, or what pandas writes.

    `to_csv` writes a list as Python does, with single quotes and None; lists that went through
    numpy lose their commas ("[{...}\\n {...}]") or get "array(...)" around them.

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
    if not (_BEGIN.match(text) and _ROLE.search(text) and _SAID.search(text)):
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
    if is_deep(value := _literal(text)):
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
