"""What of a row nothing reads: kept in `meta`, and named once for each file."""

from __future__ import annotations

import re
from collections import Counter
from difflib import get_close_matches
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from mmalign.data.fields import TURN_KEYS, as_list, as_object
from mmalign.data.parse import KIND_KEYS, OPTIONAL
from mmalign.data.parse_media import MEDIA_KEYS
from mmalign.data.turns import SPOKEN, STRUCTURED, are_messages, turns
from mmalign.data.words import listed
from mmalign.safe import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from mmalign.data.example import Example, Message

_OPINIONS = frozenset(listed("feedback critique critiques rationale rationales explanation"))
_BOOKKEEPING = _OPINIONS | frozenset(
    listed(
        "id ids uid idx index uuid hash at source sources origin dataset datasets subset category "
        "categories domain topic task type tag tags language lang license url version date "
        "timestamp created updated annotator annotators annotations model models generator score "
        "scores rating ratings reward rewards rank ranks difficulty length tokens count metadata "
        "ratio difference utc tstamp severity level sha 256"
    )
)
"""Last words of names that say where a row comes from, or what somebody thought of it.

Nobody expects such a column to be trained on, and the public files that are read unaided all have
some: `data check` lists them and a run logs them as information, but do not warn of them. Any
other name may be a slip, and is one.
"""
_SIDE = frozenset(("chosen", "rejected", *"ab012"))
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")

_LISTED = {
    "completions": ("response", "text", "completion", "answer", "content", "role"),
    "answers": ("response", "text", "completion", "answer", "content", "role"),
    "responses": ("response", "text", "completion", "answer", "content", "role"),
}
_OF_LISTED = ("score", "overall_score", "rating", "rank", "pm_score")
_READ = (
    *(*KIND_KEYS, *OPTIONAL, *MEDIA_KEYS, *SPOKEN, *STRUCTURED, "system", "label", "labels"),
    *("winner", "kto_tag", "ratings", "ranks", "votes_a", "votes_b", "better_response_id"),
    *("label_0", "label_1"),
)
OF_TURNS = " of messages"
"""What follows the name of a key that messages have."""


def is_bookkeeping(name: str) -> bool:
    """Whether a column is named like an id, a source, a score: not like anything to train on."""
    words = [word.lower() for word in _WORD.findall(name)]
    while len(words) > 1 and words[-1] in _SIDE:
        words.pop()
    if not name or name.startswith(("__", "Unnamed: ")):  # what pandas and arrow add
        return True
    flag = len(words) > 1 and words[0] in ("num", "is", "are", "has")
    return flag or (bool(words) and words[-1] in _BOOKKEEPING)


def is_opinion(name: str) -> bool:
    """Whether a column is named like what somebody wrote about the answers."""
    return bool(_OPINIONS & {word.lower() for word in _WORD.findall(name)})


def unread_of(raw: Mapping[str, Any], record: Mapping[str, Any], row: Example) -> tuple[str, ...]:
    """The names of what a row has and nothing reads.

    Args:
        raw: The row as its file has it.
        record: The canonical record made of it.
        row: The same as it is trained on.
    """
    own = as_object(raw.get("meta")) or {}
    left = [key for key in row.meta if key not in own and not _is_empty(raw.get(key))]
    said = _said(row) if left else set[str]()
    left = [key for key in left if not _repeats(raw.get(key), said)]
    inside = [f"{key}{OF_TURNS}" for key in sorted(_keys_of_turns(record))]
    return (*left, *inside, *_keys_of_listed(raw))


def _is_empty(value: Any) -> bool:
    """Whether a column of a row is there and holds nothing."""
    return not value.strip() if isinstance(value, str) else value in ([], {})


def _said(row: Example) -> set[str]:
    """Every text that the row's prompts and responses consist of."""
    texts: set[str] = set()
    parts: list[Any] = [row.prompt]
    for candidate in row.candidates:
        parts += [candidate.prompt, candidate.response]
    for part in parts:
        if isinstance(part, str):
            texts.add(part)
        elif isinstance(part, tuple):
            texts.update(turn.content for turn in cast("tuple[Message, ...]", part))
    return texts


def _repeats(value: Any, said: set[str]) -> bool:
    """Whether a column says what the row's texts say already."""
    if isinstance(value, str):
        return value in said
    if not are_messages(value):
        return False
    return all(str(turn["content"]) in said for turn in turns(value, ""))


def _keys_of_turns(record: Mapping[str, Any]) -> set[str]:
    """Keys of messages that no chat template is given."""
    known = {"role", "content", *TURN_KEYS}
    found: set[str] = set()
    for key in ("prompt", "chosen", "rejected", "response", "responses"):
        for item in as_list(record.get(key)) or ():
            for turn in as_list(item) or [item]:
                parts = as_object(turn) or {}
                for name, value in parts.items() if len(parts) > 2 else ():
                    if name not in known and value not in (None, "", [], {}):
                        found.add(name)
    return found


def _keys_of_listed(raw: Mapping[str, Any]) -> list[str]:
    """Keys of the responses of a list beside their text and score."""
    found: set[str] = set()
    for column, known in _LISTED.items():
        for item in as_list(raw.get(column)) or ():
            parts = as_object(item) or {}
            found |= {f"{k} of {column}" for k in parts if k not in (*known, *_OF_LISTED)}
    return sorted(found)


_MOST_TOLD = 30


class Unread:
    """What nothing reads, counted by file."""

    def __init__(self) -> None:
        self._rows: dict[str, Counter[str]] = {}  # file -> name -> rows

    def add(self, source: str, names: Iterable[str]) -> None:
        """Take in what one row of a file has unread."""
        self._rows.setdefault(source, Counter()).update(names)

    def lines(self) -> list[str]:
        """A line for each file with what may have been meant to be read."""
        return self._lines("read by nothing", bookkeeping=False)

    def notes(self) -> list[str]:
        """A line for each file with the bookkeeping that it carries."""
        return self._lines("kept and not read", bookkeeping=True)

    def _lines(self, what: str, *, bookkeeping: bool) -> list[str]:
        lines: list[str] = []
        for source, counts in self._rows.items():
            told = [_told(n, c) for n, c in counts.items() if _is_calm(n) == bookkeeping]
            if told:
                more = f" and {len(told) - _MOST_TOLD:,} more" if len(told) > _MOST_TOLD else ""
                lines.append(f"{source}: {what}: {', '.join(told[:_MOST_TOLD])}{more}")
        return lines


def _told(name: str, count: int) -> str:
    near = meant(name)
    rows = f"{count} row{'s' if count > 1 else ''}"
    return f"{printable(name) or repr(name)} ({rows}{f'; did you mean {near}?' if near else ''})"


def _is_calm(name: str) -> bool:
    """Whether no one expects a key to be read. OpenAI's format has `parallel_tool_calls` always."""
    if name == "parallel_tool_calls":
        return True
    return is_bookkeeping(name.partition(" of ")[0]) and not meant(name)


@cache
def meant(name: str) -> str:
    """The key that a name is nearly, such as video for vidoe; "" where there is none."""
    if name.endswith(OF_TURNS):
        known: Iterable[str] = ("role", "content", *TURN_KEYS)
    elif " of " in name or is_bookkeeping(name):
        return ""
    else:
        known = _READ
    key = name.removesuffix(OF_TURNS)
    near = get_close_matches(key, [k for k in known if len(k) > 3], 1, 0.8)
    return near[0] if near and near[0] != key else ""
