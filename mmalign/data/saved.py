"""Folders of `datasets.save_to_disk`: whether the files that they name lie in them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from mmalign.data.arrow_files import require_plain
from mmalign.data.fields import as_list, as_object
from mmalign.data.guard import Fence
from mmalign.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

_LONGEST = 64 * 2**20  # bytes; a state names every arrow file


def require_saved(folder: Path) -> None:
    """Refuse a saved dataset, or one of splits, that names no, damaged or other folders' files.

    Raises:
        DataError: A link or a name leads out of the folder, what describes it is damaged, or a file
            unfolds to far more than it holds.
    """
    fence = Fence(folder)
    splits = _described(fence, folder / "dataset_dict.json").get("splits")
    parts = [folder] if splits is None else [folder / str(name) for name in as_list(splits) or ()]
    for part in parts:
        if part != folder and part.parent != folder:
            raise DataError(f"{folder}: names a split {part.name!r} that is no folder in it")
        state = _described(fence, part / "state.json")
        if not state:
            continue
        for entry in as_list(state.get("_data_files")) or [None]:
            name = (as_object(entry) or {}).get("filename")
            if not isinstance(name, str):
                raise DataError(f"{part / 'state.json'}: names no files; save the dataset again")
            require_plain(fence.require(part / name))


def _described(fence: Fence, file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no file."""
    if not file.exists():
        return {}
    try:
        value = as_object(json.loads(fence.read_text(file, _LONGEST)))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not JSON: {error}") from error
    if value is None:
        raise DataError(f"{file}: must hold an object; save the dataset again")
    return value
