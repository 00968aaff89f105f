"""Folders of sampled pictures: which there are, and whether two belong to the same prompts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.data.files import read_rows
from mmalign.data.folders import SUFFIXES
from mmalign.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

SAMPLES = "samples.jsonl"
"""What `mmalign sample` writes beside the pictures: id, prompt, seed and image of each."""

SHEETS = ("grid.png", "sheet.png")
"""Pictures of pictures that it writes too; they belong to no prompt."""

NAMED = 8
"""How many names a message lists."""


def same_samples(first: Path, second: Path, prompts: Path | None) -> list[dict[str, Any]]:
    """The samples of both folders: image, prompt, and seed where it is known.

    Raises:
        DataError: They differ in names, prompts or seeds, or there are none.
    """
    if prompts is not None:
        listed = _samples(prompts)
        a, b = ({name: listed.get(name) for name in _names(f)} for f in (first, second))
        _same_names(first, set(a), second, set(b))
        lacking = [name for name, sample in a.items() if sample is None]
        if lacking:
            raise DataError(f"{prompts}: has no prompt for {_some(lacking)}")
        return [sample for _, sample in sorted(a.items()) if sample is not None]
    a, b = (_samples(folder / SAMPLES) for folder in (first, second))
    _same_names(first, set(a), second, set(b))
    for what in ("prompt", "seed"):
        other = [n for n in a if a[n].get(what) != b[n].get(what)]
        if other:
            name = other[0]
            raise DataError(
                f"{first} and {second}: the {what}s differ in {_some(other)}; that of {name} is "
                f"{a[name].get(what)!r} and {b[name].get(what)!r}. Sample both models with the "
                "same prompts and seeds"
            )
    return list(a.values())


def _samples(file: Path) -> dict[str, dict[str, Any]]:
    """Picture name to what is known of it."""
    if not file.is_file():
        raise DataError(
            f"{file}: there is no such file. `mmalign sample` writes it beside the pictures; for "
            "other pictures give their prompts with --prompts FILE, JSONL with `image` and `prompt`"
        )
    samples: dict[str, dict[str, Any]] = {}
    for row in read_rows(file):
        value = row.value or {}
        image, prompt = value.get("image"), value.get("prompt")
        if not isinstance(image, str) or not isinstance(prompt, str):
            raise DataError(f"{row.place}: {row.problem or 'needs the texts `image` and `prompt`'}")
        if Path(image).name != image or image in samples:
            what = "is there twice" if image in samples else "must be a name without folders"
            raise DataError(f"{row.place}: the image {image!r} {what}")
        kept = {key: value[key] for key in ("id", "prompt", "seed") if value.get(key) is not None}
        samples[image] = {"image": image, **kept}
    if not samples:
        raise DataError(f"{file}: names no pictures")
    return samples


def settings_of(folder: Path) -> dict[str, Any]:
    """How the pictures of a folder were made, as its samples.jsonl has it; all were made alike."""
    first = next(iter(read_rows(folder / SAMPLES))).value or {}
    settings = first.get("settings")
    return settings if isinstance(settings, dict) else {}


def _names(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder")
    files = (p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
    names = sorted(p.name for p in files if p.name not in SHEETS)
    if not names:
        raise DataError(f"{folder}: holds no pictures ({', '.join(SUFFIXES)})")
    return names


def _same_names(first: Path, a: set[str], second: Path, b: set[str]) -> None:
    for here, there, alone in ((first, second, a - b), (second, first, b - a)):
        if alone:
            raise DataError(f"{here}: {_some(sorted(alone))} not in {there}; give equal file names")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
