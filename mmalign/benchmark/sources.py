"""Files of benchmarks as they are published: lists and objects of JSON, JSONL, parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmalign.data.fields import is_deep, number, show
from mmalign.data.files import read_rows
from mmalign.data.opening import open_data
from mmalign.errors import DataError

MAX_OPTIONS = 26


@dataclass(frozen=True, slots=True)
class Entry:
    """One JSON object of a file, with the place that messages name."""

    value: dict[str, Any]
    where: str

    def maybe(self, *keys: str) -> str | None:
        """The text of the first key that is there; numbers are written out, null is absent."""
        for key in keys:
            value = self.value.get(key)
            if value is not None:
                if isinstance(value, str | int | float) and not isinstance(value, bool):
                    return str(value)
                raise DataError(f"{self.where}: {key!r} must be text; found {show(value)}")
        return None

    def text(self, *keys: str) -> str:
        """The same, which must be there."""
        found = self.maybe(*keys)
        if found is None:
            raise DataError(f"{self.where}: has no {keys[0]!r}; found {show(sorted(self.value))}")
        return found

    def texts(self, key: str) -> list[str]:
        """A list of texts, at most one a letter."""
        value = self.value.get(key)
        if not isinstance(value, list) or not value:
            raise DataError(f"{self.where}: {key!r} must be a list of texts; found {show(value)}")
        if len(value) > MAX_OPTIONS:
            raise DataError(f"{self.where}: {key!r} holds {len(value)}, of {MAX_OPTIONS} at most")
        return [str(item) for item in value]

    def seconds(self, key: str) -> float | None:
        """A time in seconds, or None."""
        value = self.value.get(key)
        found = number(value)
        if value is not None and found is None:
            raise DataError(f"{self.where}: {key!r} must be seconds; found {show(value)}")
        return found

    def inner(self, key: str) -> Entry:
        """The object under a key."""
        return entry(self.value.get(key), f"{self.where} {key}")


@dataclass(frozen=True, slots=True)
class Source:
    """A file that was read; `value` is its JSON, for JSONL and parquet a list of the rows."""

    path: Path
    value: Any

    def entries(self) -> Iterator[Entry]:
        """The objects of a list; those of a JSONL file are named by number too."""
        if not isinstance(self.value, list):
            raise DataError(f"{self.path}: must hold a list; found {_kind(self.value)}")
        for i, item in enumerate(self.value, start=1):
            yield entry(item, f"{self.path}:{i}")

    def keyed(self) -> Iterator[tuple[str, Any]]:
        """The members of an object."""
        if not isinstance(self.value, dict):
            raise DataError(f"{self.path}: must hold an object; found {_kind(self.value)}")
        yield from self.value.items()


def entry(value: Any, where: str) -> Entry:
    """A value that must be an object."""
    if not isinstance(value, dict):
        raise DataError(f"{where}: must be an object; found {show(value)}")
    return Entry(value, where)


def load(path: Path) -> Source:
    """Read a file.

    Raises:
        DataError: It is not there, is empty, or is not what its name says.
    """
    if path.suffix.lower() != ".json" or not path.is_file():
        rows = list(read_rows(path)) if path.suffix else _no_suffix(path)
        bad = [row for row in rows if row.value is None]
        if bad:
            more = f"; {len(bad) - 1} more lines like it" if len(bad) > 1 else ""
            raise DataError(f"{bad[0].place}: {bad[0].problem}{more}")
        return _filled(path, [row.value for row in rows])
    try:
        with open_data(path) as handle:
            text = handle.read().decode("utf-8-sig")
        value = json.loads(text)
        if "\\ud" in text or "\\uD" in text:  # an escape may be half of a pair
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise DataError(f"{path}: holds half of a surrogate pair, {half!a}") from error
    except RecursionError as error:
        raise DataError(f"{path}: not JSON: nested too deeply") from error
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    if is_deep(value):
        raise DataError(f"{path}: nested too deeply")
    return _filled(path, value)


def _no_suffix(path: Path) -> list[Any]:
    raise DataError(f"{path}: must be a .json, .jsonl or .parquet file")


def _filled(path: Path, value: Any) -> Source:
    if not value:
        raise DataError(f"{path}: holds no questions")
    return Source(path, value)


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        return f"an object with {show(sorted(value))}"
    return f"a list of {len(value)}" if isinstance(value, list) else show(value)
