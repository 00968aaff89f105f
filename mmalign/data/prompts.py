"""Files of what a model is to answer: prompts, with what they show and play."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mmalign.data.example import Candidate, Example
from mmalign.data.files import read_rows
from mmalign.data.parse import read_record
from mmalign.data.parse_media import MEDIA_KEYS, WHOLE_KEYS
from mmalign.data.pictures import PictureRoot
from mmalign.data.turns import prompt_of
from mmalign.errors import DataError

if TYPE_CHECKING:
    from mmalign.data.row import Row

_SHOWN = tuple(key for key in MEDIA_KEYS if "_" not in key)


def read_prompts(path: Path) -> list[Example]:
    """Rows without a response: one a line of a text file, else the `prompt` of each record.

    A record may show and play `video`, `image` and `audio` as training rows do; their paths start
    from the file's folder. What else it holds is not read.

    Raises:
        DataError: The file is missing, empty, or a record has no usable prompt or media.
    """
    if path.suffix == ".txt" and path.is_file():
        lines = enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        rows = [_alone(f"{path}:{number}", line) for number, line in lines if line.strip()]
    else:
        root = PictureRoot(path.parent)
        rows = [_read(row, root) for row in read_rows(path)]
    if not rows:
        raise DataError(f"{path}: holds no prompts")
    return rows


def _read(row: Row, root: PictureRoot) -> Example:
    value = row.value or {}
    prompt = prompt_of(value.get("prompt"))
    if not prompt:
        raise DataError(f"{row.place}: {row.problem or 'has no `prompt`'}")
    shown = {key: value[key] for key in (*_SHOWN, *WHOLE_KEYS) if key in value}
    record = {"prompt": prompt, **shown}
    example, problems = read_record(record, where=row.place, root=root, alone=True)
    if example is None:
        raise DataError(f"{row.place}: " + "; ".join(map(str, problems)))
    return replace(example, meta={})


def _alone(place: str, prompt: str) -> Example:
    return Example(place, prompt, (Candidate(""),), (0.0,), "plain")
