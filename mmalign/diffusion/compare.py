"""Two models by their images of the same prompts and seeds: who wins, by how much, how surely."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmalign.data.example import Picture
from mmalign.data.files import IMAGE_SUFFIXES, read_rows
from mmalign.data.jobs import OnProgress, first_few, no_progress, write_lines
from mmalign.diffusion.scorers import Scorer
from mmalign.diffusion.scorers.files import Item, score_items
from mmalign.errors import DataError
from mmalign.safe import write_text
from mmalign.stats import WinRate, win_rate

SAMPLES = "samples.jsonl"
"""What `mmalign sample` writes beside the images: id, prompt, seed and image of each."""

SHEETS = ("grid.png", "sheet.png")
"""Sheets of images that it writes too; they belong to no prompt."""


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
    """Image name to what is known of it."""
    if not file.is_file():
        raise DataError(
            f"{file}: there is no such file. `mmalign sample` writes it beside the images; for "
            "other images give their prompts with --prompts FILE, JSONL with `image` and `prompt`"
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
        raise DataError(f"{file}: names no images")
    return samples


def settings_of(folder: Path) -> dict[str, Any]:
    """How the images of a folder were made, as its samples.jsonl has it; all were made alike."""
    first = next(iter(read_rows(folder / SAMPLES))).value or {}
    settings = first.get("settings")
    return settings if isinstance(settings, dict) else {}


def _names(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder")
    files = (p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    names = sorted(p.name for p in files if p.name not in SHEETS)
    if not names:
        raise DataError(f"{folder}: holds no images ({', '.join(IMAGE_SUFFIXES)})")
    return names


def _same_names(first: Path, a: set[str], second: Path, b: set[str]) -> None:
    for here, there, alone in ((first, second, a - b), (second, first, b - a)):
        if alone:
            raise DataError(f"{here}: {_some(sorted(alone))} not in {there}; give equal file names")


def _some(names: Sequence[str]) -> str:
    return ", ".join(first_few(names))


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two folders of images under some scorers.

    Attributes:
        folders: The two, as they were given.
        rates: Scorer name to what it found.
        rows: One a prompt: image, prompt, seed where it is known, and [a, b] for each scorer.
        dropped: Prompts with an image that cannot be decoded, as sentences; neither side has them.
        settings: How each side was sampled, where its samples.jsonl says so.
    """

    folders: tuple[str, str]
    rates: dict[str, WinRate]
    rows: list[dict[str, Any]]
    dropped: list[str] = field(default_factory=list[str])
    settings: tuple[dict[str, Any], dict[str, Any]] = ({}, {})

    def text(self) -> str:
        """A table for a terminal."""
        first, second = self.folders
        lines = [f"A  {first}", f"B  {second}", f"{len(self.rows)} prompts, same seeds"]
        lines += _sampled(*self.settings)
        if self.dropped:
            left_out = "; ".join(first_few(self.dropped))
            lines.append(f"{len(self.dropped)} prompts left out: {left_out}")
        width = max(map(len, self.rates))
        head = f"{'':<{width}}  {'A wins':>7}  {'95 %':<15}  {'B wins':>7}  {'ties':>6}"
        lines += ["", f"{head}  {'mean A':>9}  {'mean B':>9}  A - B, 95 %"]
        for name, rate in self.rates.items():
            low, high = rate.interval
            between = f"{low:.1%} to {high:.1%}"
            lines.append(
                f"{name:<{width}}  {rate.a:>7.1%}  {between:<15}  {rate.b:>7.1%}  {rate.ties:>6.1%}"
                f"  {rate.mean_a:>9.4g}  {rate.mean_b:>9.4g}  {rate.mean_difference:.3g}, "
                f"{rate.difference_interval[0]:.3g} to {rate.difference_interval[1]:.3g}"
            )
        return "\n".join(lines)

    def write(self, out: Path) -> Path:
        """Write the summary as JSON to `out`, and the rows beside it as JSONL, whose path it is."""
        table = out.with_suffix(".jsonl")
        if table == out:
            raise DataError(f"--out {out}: give a name that ends in .json; the rows go to .jsonl")
        out.parent.mkdir(parents=True, exist_ok=True)
        write_lines(table, self.rows)
        summary = {
            "a": self.folders[0],
            "b": self.folders[1],
            "settings": {"a": self.settings[0], "b": self.settings[1]},
            "dropped": self.dropped,
            "scorers": {name: asdict(rate) for name, rate in self.rates.items()},
            "rows": table.name,
        }
        write_text(out, json.dumps(summary, indent=2) + "\n")
        return table


def _sampled(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """The settings that both share in one line, and each that differs in one of its own."""
    same = [f"{k} {v}" for k, v in a.items() if k in b and b[k] == v and v is not None]
    other = [k for k in dict.fromkeys([*a, *b]) if a.get(k) != b.get(k)]
    lines = [", ".join(same)] if same else []
    return lines + [f"differs: {k} is {a.get(k)} in A, {b.get(k)} in B" for k in other]


def compare(
    folder_a: str | Path,
    folder_b: str | Path,
    scorers: Mapping[str, Scorer],
    *,
    prompts: Path | None = None,
    batch_size: int = 16,
    progress: OnProgress = no_progress,
) -> Comparison:
    """Score two folders of images that belong to the same prompts and seeds.

    An image wins where its score is strictly the greater one; ties count for nobody, so that the
    two win rates may add to less than 1. Prompts are drawn with replacement for the intervals, with
    both of their images at once: what makes a prompt easy for both models does not widen them.

    Args:
        folder_a: Images and their samples.jsonl, as `mmalign sample` writes them.
        folder_b: The same names.
        scorers: Name to scorer.
        prompts: JSONL with `image` and `prompt` of each image, for folders without samples.jsonl.
        batch_size: Prompts at one time; two images each.
        progress: Told of every batch how many prompts it had, and how many there are.

    Raises:
        DataError: The folders hold other names, prompts or seeds, or nothing to compare.

    Source: G-U-N/Diffusion-NPO, compare_rate.py.
    Departs: all images are compared, not at most 500 drawn at random; intervals.
    """
    if not scorers:
        raise DataError("compare: name at least one scorer")
    folders = (Path(folder_a), Path(folder_b))
    samples = same_samples(*folders, prompts)
    settings = ({}, {}) if prompts else (settings_of(folders[0]), settings_of(folders[1]))
    items = (
        Item(s, tuple(Picture(f / s["image"]) for f in folders), (s["prompt"], s["prompt"]))
        for s in samples
    )
    rows: list[dict[str, Any]] = []
    dropped: list[str] = []
    for part in score_items(items, scorers, batch_size):
        for item, scores in part:
            if isinstance(scores, DataError):
                dropped.append(f"{item.key['image']}: {scores}")
            else:
                rows.append({**item.key, **scores})
        progress(len(part), len(samples))
    if not rows:
        raise DataError(
            f"{folder_a}, {folder_b}: no image can be decoded. {'; '.join(dropped[:2])}"
        )
    rates = {
        name: win_rate([row[name][0] for row in rows], [row[name][1] for row in rows])
        for name in scorers
    }
    return Comparison((str(folder_a), str(folder_b)), rates, rows, dropped, settings)
