"""Tools and calls of tools, however a file writes them, in the form that chat templates take.

tools        [{"type": "function", "function": {"name": ..., "parameters": {...}}}]
tool_calls   [{"type": "function", "function": {"name": ..., "arguments": {...}}}]
"""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

from mmalign.data.fields import as_list, as_object, show
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
    """The same, [] where a value is no calls."""
    parsed = _parsed(value)
    items = as_list(parsed)
    calls = [_call(item) for item in ([parsed] if items is None else items)]
    found = [call for call in calls if call is not None]
    return found if len(found) == len(calls) else []


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
    """Tools with the object around each that templates expect; what are no tools stays as it is."""
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
    return {
        **tool,
        "function": inner if parameters is None else {**inner, "parameters": parameters},
    }


def _parsed(value: Any) -> Any:
    """What a JSON text says; anything else as it is."""
    if isinstance(value, str) and value.strip()[:1] in ("{", "["):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return value
