"""JSON as data files hold it: checked values, and the members of an array one by one.

A file of one array is read like lines: no more of it is in memory than its longest record.
"""

from __future__ import annotations

import codecs
import json
import re
from typing import IO, TYPE_CHECKING, Any

from mmalign.data.fields import DEEPEST, is_deep

if TYPE_CHECKING:
    from collections.abc import Iterator

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
    if parts + text.count(",") > MOST_PARTS and _num_parts(value) > MOST_PARTS:
        raise NotJsonError(f"holds more than {MOST_PARTS:,} values")
    return value


def _require_utf8(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise NotJsonError(
            f"not UTF-8 at character {error.start}; save the file as UTF-8"
        ) from error


def _num_parts(value: Any) -> int:
    """Values in lists and objects, themselves counted."""
    count = 0
    level: list[Any] = [value]
    while level and count <= MOST_PARTS:
        count += len(level)
        inner: list[Any] = [v.values() if isinstance(v, dict) else v for v in level if _holds(v)]
        level = [member for members in inner for member in members]
    return count


def _holds(value: Any) -> bool:
    return isinstance(value, list | dict)


class JsonText:
    """A JSON text that is read as far as its values are asked for."""

    def __init__(self, handle: IO[bytes]) -> None:
        self._handle = handle
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._text, self._at, self._has_ended = "", 0, False

    def records(self) -> Iterator[Any]:
        """The members of the array that follows.

        Raises:
            NotJsonError: The text is damaged, or a member is too large.
        """
        self.take("[")
        if self.take("]"):
            return
        while True:
            yield self.value()
            if self.take("]"):
                return
            if not self.take(","):
                raise NotJsonError("not JSON: a comma or the end of the array is missing")

    def names(self) -> Iterator[str]:
        """The names in the object that follows; the caller takes the value of each."""
        self.take("{")
        if self.take("}"):
            return
        while True:
            name = self.value()
            if not isinstance(name, str) or not self.take(":"):
                raise NotJsonError("not JSON: an object must have names in quotes, and colons")
            yield name
            if self.take("}"):
                return
            if not self.take(","):
                raise NotJsonError("not JSON: a comma or the end of the object is missing")

    def peek(self) -> str:
        """The next character that is no space; "" at the end."""
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
