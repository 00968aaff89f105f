"""Rows of Arrow tables as JSON would have them: JSON texts read, null members left out."""

from __future__ import annotations

import json
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any

from mmalign.data.fields import as_list, as_object

if TYPE_CHECKING:
    from collections.abc import Mapping


def batch_records(batch: Any) -> list[dict[str, Any] | str]:
    """The rows of a record batch; what is wrong in the place of one that cannot be read."""
    kinds = {field.name: field.type for field in batch.schema}
    try:
        records = batch.to_pylist()
    except UnicodeDecodeError:
        return [_one(batch.slice(i, 1), kinds) for i in range(batch.num_rows)]
    return [_record(record, kinds) for record in records]


def _one(batch: Any, kinds: Mapping[str, Any]) -> dict[str, Any] | str:
    record: dict[str, Any] = {}
    for name in batch.schema.names:
        try:
            record[name] = batch.column(name)[0].as_py()
        except UnicodeDecodeError as error:
            return f"{name} is not UTF-8 ({error.reason} at byte {error.start})"
    return _record(record, kinds)


def _record(record: Mapping[str, Any], kinds: Mapping[str, Any]) -> dict[str, Any]:
    return {name: plain(_json_read(value, kinds[name])) for name, value in record.items()}


def _json_read(value: Any, kind: Any) -> Any:
    """A value with the texts of its `arrow.json` members read."""
    if value is None or not _has_json(kind):
        return value
    types: Any = import_module("pyarrow").types
    if str(getattr(kind, "extension_name", "")) == "arrow.json":
        with suppress(ValueError, RecursionError):
            return json.loads(value)
        return value
    if types.is_struct(kind):
        fields = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
        return {name: _json_read(member, fields[name]) for name, member in value.items()}
    return [_json_read(member, kind.value_type) for member in value]


def _has_json(kind: Any) -> bool:
    """Whether a type is, or holds in lists and objects, JSON text."""
    types: Any = import_module("pyarrow").types
    if types.is_struct(kind):
        return any(_has_json(kind.field(i).type) for i in range(kind.num_fields))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _has_json(kind.value_type)
    return str(getattr(kind, "extension_name", "")) == "arrow.json"


def plain(value: Any) -> Any:
    """A value without the null members of its objects: a table fills what one row lacks with null.

    Cells of the row itself stay, null or not.
    """
    record = as_object(value)
    if record is not None:
        return {name: _filled(member) for name, member in record.items()}
    return _filled(value)


def _filled(value: Any) -> Any:
    items, parts = as_list(value), as_object(value)
    if parts is not None:
        return {name: _filled(member) for name, member in parts.items() if member is not None}
    return value if items is None else [_filled(member) for member in items]
