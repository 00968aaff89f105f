"""Any public layout to a canonical record, recognised by its columns."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import SequenceMatcher
from typing import Any

from mmalign.data.layouts import LAYOUTS, Layout
from mmalign.data.parse import KIND_KEYS
from mmalign.errors import DataError


def to_record(raw: Mapping[str, Any], layout: str | None = None) -> dict[str, Any]:
    """The canonical record of a row in any layout; see `example.py` for its keys.

    Args:
        raw: One row. Null columns count as absent, as tables fill every missing cell with null.
        layout: A name of `LAYOUTS`; None to recognise the layout by its columns.

    Raises:
        DataError: when no layout fits, or several do, or the row breaks the one that fits.
    """
    row = {key: value for key, value in raw.items() if value is not None}
    record = _find(row, layout).read(row)
    # A column that would change the kind of the record (UltraFeedback's `messages` beside its
    # pair does not, a stray `response` would) is kept out of the way.
    stray = {key: row.pop(key) for key in KIND_KEYS if key in row}
    if stray:
        row["meta"] = {**stray, **row.get("meta", {})}
    return {**row, **record}


def find_layout(columns: Mapping[str, Any]) -> list[str]:
    """The names of the layouts whose columns these are."""
    present = {key for key, value in columns.items() if value is not None}
    return [name for name, layout in LAYOUTS.items() if _fits(layout, present)]


def _fits(layout: Layout, present: set[str]) -> bool:
    needs = all(present & set(group) for group in layout.needs)
    return needs and not present & set(layout.unless)


def _find(row: dict[str, Any], layout: str | None) -> Layout:
    if layout is not None:
        if layout not in LAYOUTS:
            raise DataError(
                f"there is no layout {layout!r}; it must be one of {', '.join(LAYOUTS)}"
            )
        missing = [group for group in LAYOUTS[layout].needs if not set(row) & set(group)]
        if missing:
            wanted = " and ".join(" or ".join(group) for group in missing)
            raise DataError(f"layout {layout} needs {wanted}; the columns are {_names(row)}")
        return LAYOUTS[layout]
    names = find_layout(row)
    if len(names) == 1:
        return LAYOUTS[names[0]]
    if names:
        raise DataError(
            f"the columns {_names(row)} fit more than one layout; set `layout` to one of "
            f"{', '.join(names)}"
        )
    near = sorted(LAYOUTS, key=lambda name: -_likeness(LAYOUTS[name], row))[:3]
    choices = "; ".join(f"{name} ({LAYOUTS[name].columns})" for name in near)
    raise DataError(f"no layout has the columns {_names(row)}. The nearest are: {choices}")


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(sorted(map(str, row))) or "(none)"


def _likeness(layout: Layout, row: Mapping[str, Any]) -> float:
    """How well a layout's needed columns are met by the most alike of those found, 0 to 1."""
    best = [
        max((SequenceMatcher(None, a, str(b)).ratio() for a in group for b in row), default=0.0)
        for group in layout.needs
    ]
    return sum(best) / len(best)
