"""Typed reading of raw records, JSON as data files hold it, and the lines that a run writes."""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, cast

Record = dict[str, Any]

_LONGEST_SHOWN = 1000  # characters of a text, more than any message asks for

DEEPEST = 64
"""How deep a record may be nested: deeper ones would exhaust the stack on their way."""

Range = tuple[int, int]
Turn = tuple[str, str, str]  # role, content, further keys as JSON
Text = str | tuple[Turn, ...]

_WORDS = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts", "tool_plan")
SPEAKING = ("tool_calls", *_WORDS)
"""Keys of a message that say something where it has no content."""

TURN_KEYS = (*SPEAKING, "tool_call_id", "name", "citations")
"""What a message may have for its chat template beside role and content."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a record; problems with the same `what` are counted together."""

    what: str
    found: str = ""

    def __str__(self) -> str:
        """The problem as one clause of a message."""
        return f"{self.what}, but {self.found}" if self.found else self.what


def as_object(value: Any) -> dict[str, Any] | None:
    """The value as a JSON object, or None when it is something else."""
    if not isinstance(value, dict):
        return None
    entries = cast("dict[Any, Any]", value)
    return cast("dict[str, Any]", value) if all(isinstance(k, str) for k in entries) else None


def as_list(value: Any) -> list[Any] | None:
    """The value as a JSON array, or None when it is something else."""
    return list(cast("list[Any]", value)) if isinstance(value, list | tuple) else None


def show(value: Any, limit: int = 40) -> str:
    """A short form of a value for a message."""
    text = ""
    for piece in _pieces(value):
        text += piece
        if len(text) > limit:
            return f"{text[:limit]}... ({type(value).__name__})"
    return text


def _pieces(value: Any) -> Iterator[str]:
    """The `repr` of a value, of which no more is made than is asked for: it may be megabytes."""
    items, parts = as_list(value), as_object(value)
    if isinstance(value, str | bytes):
        yield repr(value[:_LONGEST_SHOWN])
    elif parts is not None:
        for i, (name, member) in enumerate(parts.items()):
            yield f"{', ' if i else '{'}{name[:_LONGEST_SHOWN]!r}: "
            yield from _pieces(member)
        yield "}" if parts else "{}"
    elif items is not None and isinstance(value, list):
        for i, member in enumerate(items):
            yield ", " if i else "["
            yield from _pieces(member)
        yield "]" if items else "[]"
    else:
        yield repr(value)


def is_deep(value: Any) -> bool:
    """Whether lists and objects lie in each other more than `DEEPEST` times."""
    return any(depth > DEEPEST for depth, _ in enumerate(_levels(value)))


def _levels(value: Any) -> Iterator[list[Any]]:
    """The value, the members of it, those of its members, and so on."""
    level: list[Any] = [value]
    while level:
        yield level
        inner: list[Any] = [v.values() if isinstance(v, dict) else v for v in level if _holds(v)]
        level = [member for members in inner for member in members]


def _holds(value: Any) -> bool:
    return isinstance(value, list | tuple | dict)


def number(value: Any) -> float | None:
    """The value as a finite float; None for anything else, bool included."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        result = float(value)
    except OverflowError:
        return None
    return result if math.isfinite(result) else None


class Fields:
    """A record read field by field, by type; what is wrong goes to `problems`, and None comes back.

    So all problems are found and not the first alone. A key whose value is null counts as absent:
    table formats fill every missing cell with null.
    """

    def __init__(self, record: Mapping[str, Any]) -> None:
        """Read from `record`, which is not changed."""
        self._values = {k: v for k, v in record.items() if v is not None}
        self.problems: list[Problem] = []
        self._read: set[str] = set()

    def __contains__(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return key in self._values

    def has_any(self, keys: frozenset[str]) -> bool:
        """Whether one of the keys is there and not null."""
        return not keys.isdisjoint(self._values)

    def get(self, key: str) -> Any:
        """The raw value, or None; the key counts as read."""
        self._read.add(key)
        return self._values.get(key)

    def unread(self) -> dict[str, Any]:
        """What no call has asked for."""
        return {k: v for k, v in self._values.items() if k not in self._read}

    def fail(self, what: str, found: str = "") -> None:
        """Note a problem."""
        self.problems.append(Problem(what, found))

    def text(self, key: str) -> Text | None:
        """A required string with something in it, or a conversation of (role, content) turns."""
        value = self.get(key)
        if value is None:
            near = get_close_matches(key, self._values, 1, 0.8)
            self.fail(f"{key} is missing", f"there is {show(near[0])}" if near else "")
            return None
        return self.check_text(key, value)

    def check_text(self, name: str, value: Any) -> Text | None:
        """The same for a value at hand; `name` is what messages call it."""
        if isinstance(value, str):
            return value if self._check_string(name, value) else None
        turns = as_list(value)
        if turns is None:
            self.fail(f"{name} must be text or a list of messages", f"is {show(value)}")
            return None
        if not turns:
            self.fail(f"{name} is empty")
            return None
        read = [self._turn(name, turn) for turn in turns]
        if not all(read) or not self._check_string(name, "".join(cast("Turn", read[-1])[1:])):
            return None
        return tuple(turn for turn in read if turn)

    def texts(self, key: str) -> tuple[Text | None, ...]:
        """A required list of texts; None in the place of each that is wrong."""
        raw = self.get(key)
        values = as_list(raw)
        if not values:
            self.fail(f"{key} must be a list of texts that is not empty", f"is {show(raw)}")
            return ()
        return tuple(self.check_text(f"a text of {key}", item) for item in values)

    def number(self, key: str, low: float, high: float = math.inf) -> float | None:
        """An optional finite number in [low, high]."""
        value = self.get(key)
        if value is None:
            return None
        result = number(value)
        if result is None or not low <= result <= high:
            bounds = f"of at least {low:g}" if math.isinf(high) else f"between {low:g} and {high:g}"
            bounds = "" if math.isinf(low) else f" {bounds}"
            self.fail(f"{key} must be a finite number{bounds}", f"is {show(value)}")
            return None
        return result

    def numbers(self, key: str) -> tuple[float, ...]:
        """A required list of finite numbers; empty when it is wrong."""
        raw = self.get(key)
        values = [number(item) for item in as_list(raw) or [None]]
        if None in values:
            self.fail(f"{key} must be a list of finite numbers", f"is {show(raw)}")
            return ()
        return tuple(value for value in values if value is not None)

    def flag(self, key: str) -> bool | None:
        """An optional true or false; 1 and 0 are taken for them."""
        value = self.get(key)
        if value is None or isinstance(value, bool):
            return value
        if number(value) in (0.0, 1.0):
            return bool(value)
        self.fail(f"{key} must be true or false", f"is {show(value)}")
        return None

    def ranges(self, name: str, value: Any, length: int | None) -> tuple[Range, ...]:
        """Character ranges [start, end) inside a text of `length` characters; () when absent."""
        if value is None:
            return ()
        items = as_list(value)
        if items is None:
            self.fail(f"{name} must be a list of [start, end) pairs", f"is {show(value)}")
            return ()
        found: list[Range] = []
        for i, item in enumerate(items):
            pair = as_list(item)
            if pair is None or len(pair) != 2 or not all(type(end) is int for end in pair):
                self.fail(f"{name} must be a list of [start, end) pairs", f"[{i}] is {show(item)}")
                return ()
            start, end = int(pair[0]), int(pair[1])
            if length is not None and not 0 <= start < end <= length:
                self.fail(
                    f"{name} must lie inside the response",
                    f"[{i}] is [{start}, {end}) and the response has {length} characters",
                )
            found.append((start, end))
        return tuple(found)

    def _turn(self, name: str, value: Any) -> Turn | None:
        turn = as_object(value) or {}
        if len(turn) > 2:
            turn = {k: v for k, v in turn.items() if v not in (None, [], {})}
        further = {key: turn[key] for key in TURN_KEYS if turn.get(key) not in (None, "")}
        role, content = turn.get("role"), turn.get("content")
        if content is None and any(key in further for key in SPEAKING):
            content = ""
        if not isinstance(role, str) or not isinstance(content, str):
            what = f"{name} must hold messages with a text `role` and `content`"
            self.fail(what, f"holds {show(value)}")
            return None
        if further and not self._may_be_further(name, further):
            return None
        extra = self._as_json(f"a message of {name}", further) if further else ""
        if extra is None or not self._check_string(name, role + content, may_be_empty=True):
            return None
        return role, content, extra

    def _may_be_further(self, name: str, further: dict[str, Any]) -> bool:
        """Whether what a message has beside its content is what templates take."""
        for key in _WORDS:
            if not isinstance(further.get(key, ""), str):
                self.fail(f"{key} in a message of {name} must be text", f"is {show(further[key])}")
                return False
        calls = as_list(further.get("tool_calls", []))
        if calls is None or not all(as_object((as_object(c) or {}).get("function")) for c in calls):
            what = f"tool_calls in a message of {name} must be a list of {{function}} objects"
            self.fail(what, f"is {show(further['tool_calls'])}")
            return False
        return True

    def json(self, key: str, shape: type[dict[str, Any]] | type[list[Any]]) -> str:
        """An optional object, or list of objects, as JSON text; "" when absent, empty or wrong."""
        value = self.get(key)
        if isinstance(value, str) and value.strip():
            with suppress(ValueError, RecursionError):
                value = json.loads(value)
        if value in (None, "", [], {}):
            return ""
        items = as_list(value) if shape is list else [value]
        if items is None or not all(as_object(item) for item in items):
            what = "a list of objects" if shape is list else "an object"
            self.fail(f"{key} must be {what}, or the JSON text of one", f"is {show(self.get(key))}")
            return ""
        return self._as_json(key, value) or ""

    def _as_json(self, name: str, value: Any) -> str | None:
        """The JSON text of a value, the same for equal values."""
        try:
            text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            self.fail(f"{name} holds what JSON cannot", f"{error}")
            return None
        return text if self._check_string(name, text) else None

    def _check_string(self, name: str, value: str, *, may_be_empty: bool = False) -> bool:
        if not may_be_empty and not value.strip():
            self.fail(f"{name} is empty")
            return False
        try:
            value.encode()
        except UnicodeEncodeError as error:
            self.fail(f"{name} holds half of a surrogate pair", f"character {error.start} is one")
            return False
        return True


LONGEST = 16 * 2**20
"""Bytes of a line, or characters of a record in an array."""

MOST_PARTS = 200_000
"""Values of one record."""

_CHUNK = 2**18
_SPACE = re.compile(r"[ \t\n\r]*")


class NotJsonError(Exception):
    """What is wrong with a text, as a clause of a message."""


def _refuse(constant: str) -> Any:
    raise NotJsonError(f"{constant} is not a number that JSON can hold")


_DECODER = json.JSONDecoder(parse_constant=_refuse)  # one for all lines: making it takes time


def parse(text: str) -> Any:
    """The value of a text, of which nothing is left that UTF-8 or later work cannot take.

    Args:
        text: Decoded with `surrogateescape`, so that bytes that are not UTF-8 are found here.

    Raises:
        NotJsonError: It has none, or one that is too deep or too large.
    """
    try:
        value = _DECODER.decode(text)
    except RecursionError as error:
        raise NotJsonError("nested too deeply") from error
    except ValueError as error:  # JSONDecodeError, and whole numbers of thousands of digits
        _require_utf8(text)
        raise NotJsonError(f"not JSON: {error}") from error
    return _checked(value, text)


def _checked(value: Any, text: str) -> Any:
    _require_utf8(text)
    if "\\ud" in text or "\\uD" in text:  # an escape may be half of a pair
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise NotJsonError(f"holds half of a surrogate pair, {half!a}") from error
        except RecursionError as error:
            raise NotJsonError("nested too deeply") from error
    parts = text.count("[") + text.count("{")
    if parts > DEEPEST and is_deep(value):
        raise NotJsonError("nested too deeply")
    counts = accumulate(map(len, _levels(value)))
    if parts + text.count(",") > MOST_PARTS and any(count > MOST_PARTS for count in counts):
        raise NotJsonError(f"holds more than {MOST_PARTS:,} values")
    return value


def _require_utf8(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise NotJsonError(
            f"not UTF-8 at character {error.start}; save the file as UTF-8"
        ) from error


class JsonText:
    """A JSON text that is read as far as its values are asked for.

    A file of one array is read like lines: no more of it is in memory than its longest record.
    """

    def __init__(self, handle: IO[bytes]) -> None:
        self._handle = handle
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._text, self._at, self._has_ended = "", 0, False

    def records(self) -> Iterator[Any]:
        """The members of the array that follows.

        Raises:
            NotJsonError: The text is damaged, or a member is too large.
        """
        for _ in self._members("[]", "array"):
            yield self.value()

    def names(self) -> Iterator[str]:
        """The names in the object that follows; the caller takes the value of each."""
        for _ in self._members("{}", "object"):
            name = self.value()
            if not isinstance(name, str) or not self.take(":"):
                raise NotJsonError("not JSON: an object must have names in quotes, and colons")
            yield name

    def _members(self, brackets: str, what: str) -> Iterator[None]:
        """Stop before each member of an array or object, which the caller takes."""
        self.take(brackets[0])
        if self.take(brackets[1]):
            return
        while True:
            yield
            if self.take(brackets[1]):
                return
            if not self.take(","):
                raise NotJsonError(f"not JSON: a comma or the end of the {what} is missing")

    def peek(self) -> str:
        """The next character that is not a space; "" at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            self._at = space.end() if space else self._at
            if self._at < len(self._text) or self._has_ended:
                return self._text[self._at : self._at + 1]
            self._read_on(_CHUNK)

    def take(self, mark: str) -> bool:
        """Whether the next character is `mark`, which then is passed."""
        found = self.peek() == mark
        self._at += found
        return found

    def value(self) -> Any:
        """The next value."""
        if not self.peek():
            raise NotJsonError("not JSON: the file ends too early; it is cut off")
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
                if end < len(self._text) or self._has_ended:  # else a number may go on
                    break
            except RecursionError as error:
                raise NotJsonError("nested too deeply") from error
            except ValueError as error:
                if self._has_ended:
                    _require_utf8(self._text[self._at :])
                    raise NotJsonError(f"not JSON: {getattr(error, 'msg', error)}") from error
            if len(self._text) - self._at > LONGEST:
                raise NotJsonError(
                    f"not JSON, or a record of more than {LONGEST // 2**20} MiB, which is too long"
                )
            self._read_on(max(_CHUNK, len(self._text) - self._at))
        text = self._text[self._at : end]
        self._at = end
        return _checked(value, text)

    def _read_on(self, size: int) -> None:
        data = self._handle.read(size)
        self._has_ended = not data
        self._text = self._text[self._at :] + self._decoder.decode(data, final=not data)
        self._at = 0


_LARGEST = 2**53  # a step beyond it is not a count


def read_lines(path: Path) -> tuple[list[Record], int]:
    """The records of a file that a run has written step by step, and how many lines hold none.

    A record is an object with its `step`. A line ends at a line feed alone. A run that was killed
    while it wrote leaves a torn last line.
    """
    if not path.is_file():
        return [], 0
    found = [_record(line) for line in path.read_bytes().split(b"\n") if line.strip()]
    records = [record for record in found if record is not None]
    return records, len(found) - len(records)


def left_out(path: Path, odd: int) -> str:
    """The sentence about lines that are not records."""
    return f"{path.name}: {odd} unreadable line{'s' if odd > 1 else ''} left out"


def _record(line: bytes) -> Record | None:
    try:
        value: Any = json.loads(line)
        step: Any = value["step"]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None
    return value if type(step) is int and 0 <= step < _LARGEST else None
