"""Any public layout to a canonical record, recognised by its columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import SequenceMatcher
from functools import cache
from typing import Any

from mmalign.data.columns import turns_or_text, with_system
from mmalign.data.fields import as_object
from mmalign.data.layout import Layout
from mmalign.data.layouts import LAYOUTS
from mmalign.data.message_media import shown_in_messages
from mmalign.data.parse import KIND_KEYS, TEXT_KEYS
from mmalign.data.parse_pictures import PICTURE_KEYS
from mmalign.data.public import renamed
from mmalign.data.stored import read_back
from mmalign.data.tools import as_tools
from mmalign.data.unread import meant
from mmalign.errors import DataError
from mmalign.safe import printable

MOST_COLUMNS = 10_000
_LONGEST_NAME = 256
_COMPARED = 100  # columns in which names of layouts are looked for
_BOXES = ("<bbox>", "<ref-object>")
"""What ms-swift puts in the place of entries of `objects`."""


def to_record(raw: Mapping[str, Any], layout: str | None = None) -> dict[str, Any]:
    """The canonical record of a row in any layout; see `example.py` for its keys.

    Args:
        raw: One row. Null columns count as absent, as tables fill every missing cell with null.
        layout: A name of `LAYOUTS`; None to recognise the layout by its columns.

    Raises:
        DataError: when no layout fits, or several do, or the row breaks the one that fits.
    """
    _require_few(raw)
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


def _require_few(raw: Mapping[str, Any]) -> None:
    """Refuse columns that are no names: each is compared with all that is known."""
    if len(raw) > MOST_COLUMNS:
        raise DataError(f"has {len(raw):,} columns; at most {MOST_COLUMNS:,} are read")
    longest = max(map(len, raw), default=0)
    if longest > _LONGEST_NAME:
        raise DataError(
            f"has a column whose name is {longest:,} characters long, and at most {_LONGEST_NAME} "
            "are a name; is the header missing?"
        )


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
    own = [name for name, layout in LAYOUTS.items() if not layout.named]
    fits = [name for name in own if _fits(LAYOUTS[name], columns)]
    if len(fits) == 1:
        return fits[0], ""
    if fits:
        choices = ", ".join(fits)
        return "", f"the columns {_names(columns)} fit several layouts; set `layout`: {choices}"
    some = sorted(columns)[:_COMPARED]
    near = sorted(own, key=lambda name: -_likeness(LAYOUTS[name], some))[:3]
    choices = "; ".join(f"{name} ({LAYOUTS[name].columns})" for name in near)
    slips = {printable(name): meant(name) for name in some if meant(name)}
    hint = "".join(f" Did you mean {key} by {name}?" for name, key in slips.items())
    return "", f"no layout has the columns {_names(columns)}.{hint} The nearest are: {choices}"


def _fits(layout: Layout, columns: frozenset[str]) -> bool:
    needs = all(columns & set(group) for group in layout.needs)
    return needs and not columns & set(layout.unless)


def _names(columns: Iterable[str]) -> str:
    return ", ".join(map(printable, sorted(columns))) or "(none)"


def _likeness(layout: Layout, columns: Iterable[str]) -> float:
    """How well a layout's needed columns are met by the most alike of those found, 0 to 1."""
    best = [
        max((SequenceMatcher(None, a, b).ratio() for a in group for b in columns), default=0.0)
        for group in layout.needs
    ]
    return sum(best) / len(best)
