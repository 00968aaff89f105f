"""Files of what a model is to answer: prompts, with what they show and play."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mmalign.data.columns import ASKING, SYSTEM, asked, with_system
from mmalign.data.files import read_rows
from mmalign.data.parse import read_record
from mmalign.data.parse_media import MEDIA_KEYS, WHOLE_KEYS
from mmalign.data.pictures import PictureRoot
from mmalign.data.row import Row
from mmalign.data.stored import read_back
from mmalign.data.tools import as_tools
from mmalign.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mmalign.data.example import Example
    from mmalign.data.turns import Columns

_SHOWN = tuple(key for key in MEDIA_KEYS if "_" not in key)
_BESIDE = (*_SHOWN, *WHOLE_KEYS, "tools", "chat_template_kwargs")
_READ = ("prompt", *ASKING, "instruction", *SYSTEM, *_BESIDE)


def read_prompts(path: Path) -> list[Example]:
    """Rows without a response: one a line of a text file, else what each record asks.

    A record may have `system`, `tools` and `chat_template_kwargs`, and show and play `video`,
    `image` and `audio` as training rows do; their paths start from the file's folder. What else it
    holds is not read.

    Raises:
        DataError: The file is missing, empty, or a record has no usable prompt or media.
    """
    root = PictureRoot(path.parent)
    rows = [_read(row, root) for row in (_lines(path) if _is_text(path) else read_rows(path))]
    if not rows:
        raise DataError(f"{path}: holds no prompts")
    return rows


def _is_text(path: Path) -> bool:
    return path.suffix == ".txt" and path.is_file()


def _lines(path: Path) -> Iterator[Row]:
    """The lines of a text, with the spaces at their ends: a prompt may end in one."""
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        place = f"{path}:{number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r")
        except UnicodeDecodeError as error:
            raise DataError(f"{place}: not UTF-8 ({error}); save the file as UTF-8") from error
        if text.strip():
            yield Row(place, {"prompt": text})


def _read(row: Row, root: PictureRoot) -> Example:
    try:
        record = _record(dict(row.value or {}))
    except DataError as error:
        raise DataError(f"{row.place}: {error}") from error
    if not record["prompt"]:
        raise DataError(f"{row.place}: {row.problem or 'has no `prompt`'}")
    example, problems = read_record(record, where=row.place, root=root, alone=True)
    if example is None:
        raise DataError(f"{row.place}: " + "; ".join(map(str, problems)))
    return replace(example, meta={})


def _record(value: Columns) -> Columns:
    """What is asked, shown, played and handed to the chat template."""
    row = read_back({key: value[key] for key in _READ if value.get(key) is not None})
    if "tools" in row:
        row["tools"] = as_tools(row["tools"])
    record = {key: row.pop(key) for key in _BESIDE if key in row}
    return with_system(row, record | {"prompt": asked(row)})
