"""Any public layout to a canonical record, recognized by its columns, and what is left unread."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from difflib import SequenceMatcher, get_close_matches
from functools import cache
from typing import Any

from mmalign.data.example import Example
from mmalign.data.fields import TURN_KEYS, as_list, as_object, number, show
from mmalign.data.layouts import (
    LAYOUTS,
    LISTED,
    SCORED,
    is_bookkeeping,
    turns_or_text,
    with_system,
)
from mmalign.data.media_layouts import Layout, shown_in_messages
from mmalign.data.parse import KIND_KEYS, OPTIONAL, TEXT_KEYS
from mmalign.data.parse_media import MEDIA_KEYS, PICTURE_KEYS
from mmalign.data.turns import (
    SPOKEN,
    STRUCTURED,
    Columns,
    Turns,
    are_messages,
    as_tools,
    exchange,
    read_back,
    turns,
)
from mmalign.errors import DataError
from mmalign.safe import printable

# Public files whose columns have names of their own:
#
# ultrafeedback-binarized-preferences   instruction, chosen_response, rejected_response
# HelpSteer3, HelpSteer2-preference     context or prompt, response1, response2, overall_preference
# stack-exchange-paired                 question, response_j, response_k
# Code-Preference-Pairs                 instruction, accepted, rejected
# SHP                                   history, human_ref_A, human_ref_B, labels
# Preference-Collection                 orig_instruction, orig_response_A and _B, orig_preference
# OpenAI's preference format            input, preferred_output, non_preferred_output
# arena-human-preference-55k            prompt, response_a, response_b as JSON lists; winner_model_a

_RENAMED: tuple[tuple[tuple[str, ...], dict[str, str]], ...] = (
    (("chosen", "rejected", "messages", "query"), {
        "chosen_response": "chosen", "rejected_response": "rejected",
    }),
    (("chosen", "rejected"), {"preferred_output": "chosen", "non_preferred_output": "rejected"}),
    (("chosen", "rejected"), {"response_j": "chosen", "response_k": "rejected"}),
    (("chosen",), {"accepted": "chosen", "rejected": "rejected"}),
    (("response_1",), {"response1": "response_1", "response2": "response_2"}),
    (("response_a",), {"human_ref_A": "response_a", "human_ref_B": "response_b"}),
    (("response_a", "instruction", "prompt"), {
        "orig_response_A": "response_a", "orig_response_B": "response_b",
        "orig_instruction": "prompt",
    }),
    (("conversations", "messages", "chosen", "prompt"), {"conversation": "conversations"}),
)  # fmt: skip
"""For each: columns that must not be there, and the old names, all of which must be, to the new."""

_OWN = frozenset(name for _, names in _RENAMED for name in names) | {
    *("input", "rationale", "rationales", "overall_preference", "preference_strength"),
    *("winner_tie", "response_a"),
}
"""Columns without one of which there is nothing to do."""

_SIGNED = ("overall_preference", "preference_strength")
_JUDGED = frozenset(("generations", "rating", "ratings"))
_FLAGS = {"winner_model_a": "a", "winner_model_b": "b", "winner_tie": "tie"}


def renamed(row: Columns) -> Columns:
    """The row with columns of the files above under the names that layouts read.

    Raises:
        DataError: A column that says which response won holds what it cannot.
    """
    if _OWN.isdisjoint(row):
        return row
    row = dict(row)
    scores = {"score_A": "score_a", "score_B": "score_b"} if "human_ref_A" in row else {}
    _of_openai(row)
    _of_arena(row)
    _winner(row)
    for unless, names in _RENAMED:
        if set(names) <= set(row) and not set(unless) & set(row):
            row = {names.get(name, name): value for name, value in row.items()}
    if "rationale_prompt" not in row and _JUDGED & set(row):
        # A judge's reasons for its ratings answer no question of the row.
        reasons = {name: row.pop(name) for name in ("rationale", "rationales") if name in row}
        row |= {"meta": {**reasons, **(as_object(row.get("meta")) or {})}} if reasons else {}
    return row | {new: row.pop(old) for old, new in scores.items() if old in row}


def _of_openai(row: Columns) -> None:
    """`input` of {messages, tools, parallel_tool_calls} as columns of the row."""
    asked = as_object(row.get("input"))
    if asked is None or "messages" not in asked or "prompt" in row:
        return
    del row["input"]
    row["prompt"] = asked["messages"]
    for key, value in asked.items():
        if key != "messages" and value is not None:
            row.setdefault(key, value)


def _of_arena(row: Columns) -> None:
    """A prompt and two responses that are each a list of turns, or its JSON text, as two talks."""
    names = ("prompt", "response_a", "response_b")
    said = {name: _turns_of_one(row.get(name)) for name in names}
    if not all(said.values()):
        return
    asked = said["prompt"]
    for name in names[1:]:
        if len(said[name]) != len(asked):
            found = f"it holds {len(said[name])} for {len(asked)}"
            raise DataError(f"{name} must hold an answer to every turn of prompt, but {found}")
        talk: Turns = []
        for question, answer in zip(asked, said[name], strict=True):
            if question is None or answer is None:
                raise DataError(f"a turn of {'prompt' if question is None else name} is null")
            talk += exchange(question, answer)
        row[f"conversation_{name[-1]}"] = talk
    for name in names:
        del row[name]


def _turns_of_one(value: Any) -> list[str | None]:
    """The texts of a list of texts or nulls, or of its JSON text; [] for anything else."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    items = as_list(value) or []
    return items if all(isinstance(item, str | None) for item in items) else []


def _winner(row: Columns) -> None:
    """Which response won, as `winner`."""
    if "winner" in row:
        return
    found: dict[str, str | None] = {}  # columns to the winner
    if ("response1" in row or "response_1" in row) and not {"chosen", "rejected"} & set(row):
        found |= {key: _sign(key, row[key]) for key in _SIGNED if key in row}
    if "human_ref_A" in row and "labels" in row:
        won = {1.0: "a", 0.0: "b"}.get(number(row["labels"]) or 0.0)
        found["labels"] = None if isinstance(row["labels"], str | bool) else won
    if "orig_response_A" in row and "orig_preference" in row and "instruction" not in row:
        found["orig_preference"] = {"A": "a", "B": "b"}.get(str(row["orig_preference"]))
    if {"response_a", "conversation_a"} & set(row) and set(_FLAGS) <= set(row):
        given = [key for key in _FLAGS if number(row[key]) == 1 or row[key] is True]
        found[", ".join(_FLAGS)] = _FLAGS[given[0]] if len(given) == 1 else None
    for key, winner in found.items():
        values = [row.pop(name) for name in key.split(", ")]
        if winner is None:
            raise DataError(f"{key} must say which response won, but is {show(values)}")
        row["winner"] = winner


def _sign(key: str, value: Any) -> str | None:
    """HelpSteer's preference: below 0 the first response is the better one, above 0 the second."""
    strength = number(value)
    if strength is None:
        return None
    return "tie" if strength == 0 else "a" if strength < 0 else "b"


MOST_COLUMNS = 10_000
_LONGEST_NAME = 256
_COMPARED = 100  # columns in which names of layouts are looked for
_BOXES = ("<bbox>", "<ref-object>")
"""What ms-swift puts in the place of entries of `objects`."""


def to_record(raw: Mapping[str, Any], layout: str | None = None) -> dict[str, Any]:
    """The canonical record of a row in any layout; see `parse.py` for its keys.

    Args:
        raw: One row. Null columns count as absent, as tables fill every missing cell with null.
        layout: A name of `LAYOUTS`; None to recognize the layout by its columns.

    Raises:
        DataError: when no layout fits, or several do, or the row breaks the one that fits.
    """
    if len(raw) > MOST_COLUMNS:  # each is compared with all that is known
        raise DataError(f"has {len(raw):,} columns; at most {MOST_COLUMNS:,} are read")
    longest = max(map(len, raw), default=0)
    if longest > _LONGEST_NAME:
        raise DataError(
            f"has a column whose name is {longest:,} characters long, and at most {_LONGEST_NAME} "
            "are a name; is the header missing?"
        )
    row = {key: value for key, value in raw.items() if value is not None}
    row = shown_in_messages(renamed(read_back(row)))
    if "tools" in row:
        row["tools"] = as_tools(row["tools"])
    record = _find(row, layout).read(row)
    spoken = bool(set(record) & set(TEXT_KEYS))
    if spoken:
        record = _whole(row, record)
    # A column that would make the record another kind (a `response` beside a pair) steps aside.
    shown = set(PICTURE_KEYS) if spoken else set[str]()
    stray = {key: row.pop(key) for key in KIND_KEYS if key in row and key not in shown}
    if stray:
        row["meta"] = {**stray, **(as_object(row.get("meta")) or {})}
    return {**row, **record}


def _whole(row: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """The record of texts with its system text, and its further responses in the standard form."""
    for key in ("calibration", "rationale", "rationale_prompt", "rejected_irrelevant"):
        if key in row:
            row[key] = turns_or_text(row[key], key)
    if as_object(row.get("objects")) and any(mark in repr(record) for mark in _BOXES):
        raise DataError(
            "<bbox> and <ref-object> stand for entries of `objects`, which are not read, as every "
            "model writes boxes in its own way; write them into the texts as your model does"
        )
    return with_system(row, record)


def find_layout(columns: Iterable[str]) -> str:
    """The name of the one layout these columns fit; DataError when none does or several do."""
    name, complaint = _recognise(frozenset(columns))
    if complaint:
        raise DataError(complaint)
    return name


def _find(row: Mapping[str, Any], layout: str | None) -> Layout:
    if layout is None:
        return LAYOUTS[find_layout(row)]
    if layout not in LAYOUTS:
        raise DataError(f"there is no layout {layout!r}; it must be one of {', '.join(LAYOUTS)}")
    missing = [group for group in LAYOUTS[layout].needs if not set(row) & set(group)]
    if missing:
        wanted = " and ".join(" or ".join(group) for group in missing)
        raise DataError(f"layout {layout} needs {wanted}; the columns are {_names(row)}")
    return LAYOUTS[layout]


@cache
def _recognise(columns: frozenset[str]) -> tuple[str, str]:
    """The layout's name, or why there is none; cached, since all rows of a file have the same."""
    own = {name: layout for name, layout in LAYOUTS.items() if not layout.named}
    fits = [
        name
        for name, layout in own.items()
        if all(columns & set(group) for group in layout.needs) and not columns & set(layout.unless)
    ]
    if len(fits) == 1:
        return fits[0], ""
    if fits:
        choices = ", ".join(fits)
        return "", f"the columns {_names(columns)} fit several layouts; set `layout`: {choices}"
    some = sorted(columns)[:_COMPARED]
    near = sorted(own, key=lambda name: -_likeness(own[name], some))[:3]
    choices = "; ".join(f"{name} ({own[name].columns})" for name in near)
    slips = {printable(name): meant(name) for name in some if meant(name)}
    hint = "".join(f" Did you mean {key} by {name}?" for name, key in slips.items())
    return "", f"no layout has the columns {_names(columns)}.{hint} The nearest are: {choices}"


def _names(columns: Iterable[str]) -> str:
    return ", ".join(map(printable, sorted(columns))) or "(none)"


def _likeness(layout: Layout, columns: Iterable[str]) -> float:
    """How well a layout's needed columns are met by the most alike of those found, 0 to 1."""
    best = [
        max((SequenceMatcher(None, a, b).ratio() for a in group for b in columns), default=0.0)
        for group in layout.needs
    ]
    return sum(best) / len(best)


_READ = (
    *(*KIND_KEYS, *OPTIONAL, *MEDIA_KEYS, *SPOKEN, *STRUCTURED, "system", "label", "labels"),
    *("winner", "kto_tag", "ratings", "ranks", "votes_a", "votes_b", "better_response_id"),
    *("label_0", "label_1"),
)
OF_TURNS = " of messages"
"""What follows the name of a key that messages have."""


def unread_of(raw: Mapping[str, Any], record: Mapping[str, Any], row: Example) -> tuple[str, ...]:
    """The names of what a row has and nothing reads, which is kept in `meta`.

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
    for part in (row.prompt, *(text for c in row.candidates for text in (c.prompt, c.response))):
        if isinstance(part, str):
            texts.add(part)
        elif isinstance(part, tuple):
            texts.update(turn.content for turn in part)
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
    known = (*LISTED, *SCORED, "role", "rank")
    found: set[str] = set()
    for column in ("completions", "answers", "responses"):
        for item in as_list(raw.get(column)) or ():
            found |= {f"{k} of {column}" for k in as_object(item) or {} if k not in known}
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
