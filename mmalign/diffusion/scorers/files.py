"""A file of picture pairs or lists to the same with scores; `mmalign data score`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.data.example import Picture, as_text
from mmalign.data.jobs import Journal
from mmalign.data.pictures import PictureRoot
from mmalign.data.records import PictureCopies, ProblemList, Record, read_records
from mmalign.diffusion.scorers.base import CosineScorer
from mmalign.diffusion.scorers.batches import Item, score_items
from mmalign.diffusion.scorers.labels import Smooth, label_list, label_pair, score_range
from mmalign.errors import DataError

if TYPE_CHECKING:
    from mmalign.data.example import Example
    from mmalign.diffusion.scorers import Scorer

NAMED = 8
"""How many left-out rows a message names."""


@dataclass(frozen=True, slots=True)
class Source:
    """Rows to score, as `read_records` takes them."""

    path: str
    split: str | None = None
    layout: str | None = None
    pictures: Path | None = None  # where their paths start; None: the folder of `path`

    def records(self) -> Iterator[Record]:
        """Its rows."""
        return read_records(self.path, split=self.split, layout=self.layout, pictures=self.pictures)

    def facts(self) -> dict[str, Any]:
        """What tells it from another, and from itself before a change."""
        file = Path(self.path)
        state = file.stat() if file.is_file() else None
        return {
            "source": self.path,
            "source_size": state and state.st_size,
            "source_time": state and state.st_mtime_ns,
            "split": self.split,
            "layout": self.layout,
            "pictures": None if self.pictures is None else str(self.pictures),
        }

    def root(self) -> PictureRoot:
        """Where paths of its pictures start."""
        file = Path(self.path)
        own = None if not file.exists() else file if file.is_dir() else file.parent
        return PictureRoot(self.pictures or own)


@dataclass(slots=True)
class Scored:
    """What `score_file` did."""

    out: Path
    num_written: int = 0
    num_pairs: int = 0
    swapped: int = 0
    tied: int = 0
    resumed: int = 0
    left_out: list[str] = field(default_factory=list[str])

    def text(self) -> str:
        """For a terminal."""
        lines = [f"{self.out}: {self.num_written} rows scored"]
        if self.resumed:
            lines[0] += f", of which {self.resumed} had been before"
        if self.swapped or self.tied:
            lines.append(f"of {self.num_pairs} pairs {self.swapped} swapped, {self.tied} tied")
        if self.left_out:
            shown = "; ".join(self.left_out[:NAMED])
            more = len(self.left_out) - NAMED
            shown += f"; and {more} more" if more > 0 else ""
            lines.append(f"{len(self.left_out)} rows left out: {shown}")
        return "\n".join(lines)


def score_file(
    source: Source,
    out: Path,
    names: Sequence[str],
    load: Callable[[], Mapping[str, Scorer]],
    *,
    relabel: bool = False,
    smooth: Smooth | None = None,
    settings: Mapping[str, Any] | None = None,
    batch_size: int = 16,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> Scored:
    """Write pairs or lists of pictures with their scores, in mmalign's own layout.

    Scores go to OUT.partial as they come, so that the same call after an interruption goes on; the
    labels are made from them at the end. PickScore's are raw cosines, about 0.2, as SmPO's
    constants and the published selectors have them. A picture is scored for the row's prompt, or
    its own caption where the row has none. Rows with a picture that cannot be decoded are left out.

    Args:
        source: The rows.
        out: The JSONL file to write; it appears whole or not at all.
        names: Of the scorers; the first labels.
        load: Gives the scorers by name; called when there is something to score and all rows have
            been looked at.
        relabel: The higher score wins; see `label_pair`.
        smooth: Range for the probability that the chosen one is better; None for none.
        settings: What scores depend on besides, so that others are not mixed with these.
        batch_size: Rows at one time.
        progress: Told of every batch how many rows it had, and how many there are in all.

    Raises:
        DataError: The file is there, rows have problems or no pictures, or none can be used.
    """
    partial = out.with_name(out.name + ".partial")
    if out.exists() and not partial.exists():
        raise DataError(f"{out}: is there already; delete it, or give another --out")
    total = _check(source, smooth is not None)
    out.parent.mkdir(parents=True, exist_ok=True)
    journal = Journal(partial, {**source.facts(), "scorers": list(names), **(settings or {})})
    result = Scored(out, resumed=len(journal.done))
    try:
        progress(result.resumed, total)
        if result.resumed < total:
            for part in score_items(_items(source, journal), _raw(load()), batch_size):
                journal.add({item.key: _line(found) for item, found in part})
                progress(len(part), total)
        _write(source, out, journal, relabel, smooth, result)
    finally:
        journal.close()
    journal.remove()
    return result


def _line(found: dict[str, list[float]] | DataError) -> dict[str, Any]:
    return {"broken": str(found)} if isinstance(found, DataError) else {"scores": found}


def _raw(scorers: Mapping[str, Scorer]) -> dict[str, Callable[..., Any]]:
    return {n: s.cosine if isinstance(s, CosineScorer) else s for n, s in scorers.items()}


def _check(source: Source, pairs_only: bool) -> int:
    """How many rows there are; all problems are told before anything is scored."""
    problems = ProblemList()
    total = 0
    for record in source.records():
        problems.add(record, *record.problems)
        row = record.example
        total += 1
        if row is None:
            continue
        if row.kind not in ("pair", "list") or not _is_of_pictures(row):
            raise DataError(
                f"{record.place}: is not a pair or list of pictures; `mmalign data score` compares "
                "pictures of one prompt"
            )
        if pairs_only and row.kind == "list":
            raise DataError(f"{record.place}: --smooth makes labels of pairs, and this is a list")
    if problems.groups:
        raise problems.error(source.path)
    if not total:
        raise DataError(f"{source.path}: holds no records")
    return total


def _is_of_pictures(row: Example) -> bool:
    return all(isinstance(candidate.response, Picture) for candidate in row.candidates)


def _items(source: Source, journal: Journal) -> Iterator[Item[str]]:
    """The rows that are still to be scored."""
    for record in source.records():
        row = record.example
        if row is not None and record.id not in journal.done:
            pictures = [c.response for c in row.candidates if isinstance(c.response, Picture)]
            prompts = [as_text(row.prompt or c.prompt or "") for c in row.candidates]
            yield Item(record.id, tuple(pictures), tuple(prompts))


def _write(
    source: Source,
    out: Path,
    journal: Journal,
    relabel: bool,
    smooth: Smooth | None,
    result: Scored,
) -> None:
    """Labels from the journal's scores; the file replaces nothing until it is whole."""
    found = {key: line["scores"] for key, line in journal.done.items() if "scores" in line}
    result.left_out = [f"{k}: {v['broken']}" for k, v in journal.done.items() if "broken" in v]
    if not found:
        raise DataError(f"{source.path}: no row can be scored. {'; '.join(result.left_out[:2])}")
    limits = score_range(smooth, [s for own in found.values() for s in next(iter(own.values()))])
    copies = PictureCopies(out, source.root())
    temporary = out.with_name(f".{out.name}.tmp")
    with temporary.open("w", encoding="utf-8") as handle:
        for record in source.records():
            if record.example is None or record.id not in found:
                continue
            value = {**record.value, "id": record.id, **copies.columns(record.example)}
            own = found[record.id]
            if record.example.kind == "pair":
                labelled = label_pair(value, own, relabel=relabel, limits=limits)
                result.num_pairs += 1
                result.swapped += labelled.swapped
                result.tied += labelled.tied
            else:
                labelled = label_list(value, own, relabel=relabel)
            line = json.dumps(labelled.record, ensure_ascii=False, default=str)
            handle.write(line + "\n")
            result.num_written += 1
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, out)
