"""What a run is made of, known by content: model, tokenizer, data and media, wherever they lie."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list

from mmalign.data.example import Picture
from mmalign.models.adapter import adapter_class
from mmalign.train.prints import WHOLE, matching, model_files, print_of, words

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mmalign.config import RunConfig
    from mmalign.data.example import Example, Media
    from mmalign.train.prints import Print, Table
    from mmalign.train.run import Run

TABLE = "inputs.json"
_KEYS = ("path", "bytes", "time", "hash")
_ALL_ROWS, _ALL_MEDIA = WHOLE, 256 << 20  # bytes read of all these files together
_MOST_READ = 4096  # files; of more a sample is read, and of the others size and time are known
_ROWS = ("*.jsonl", "*.json", "*.parquet", "*.arrow", "*.csv", "*.tsv", "*.txt")


def look_once(run: Run) -> Table:
    """What the main process sees of the files of a run; all processes are told the same."""
    table: Table = {}
    if run.accelerator.is_main_process:
        table = look(run.config, run.train_rows)
    return broadcast_object_list([table])[0]


def look(config: RunConfig, rows: Sequence[Example]) -> Table:
    """Size, time of change and hash of every file that decides what a run learns.

    Args:
        config: Of the run.
        rows: To train on; their media count, in the order in which they are shown.
    """
    table: Table = {}
    for kind, path, revision in adapter_class(config.modality).named_models(config):
        table |= model_files(kind, path, revision)
    data: dict[Path, None] = {}
    for source in config.data.train:
        path = Path(source.path)
        found = [path] if path.is_file() else matching(path, (*_ROWS, *(f"*/{r}" for r in _ROWS)))
        data.update(dict.fromkeys(found))
    table["data"] = _prints(list(data), _ALL_ROWS)
    media = dict.fromkeys(file for row in rows for file in files_of(row))
    table["media"] = _prints(list(media), _ALL_MEDIA)
    return table


def _prints(files: Sequence[Path], most: int) -> dict[str, Print]:
    """Fingerprints by name, for which no more than `most` bytes are read.

    Of very many files the same sample of places is read each time.
    """
    places = range(len(files))
    read = frozenset(Random(len(files)).sample(places, min(len(files), _MOST_READ)))
    whole = most // max(1, len(read))
    with ThreadPoolExecutor(8) as pool:  # most of it is waiting for the disk
        prints = pool.map(lambda i: print_of(files[i], whole if i in read else 0), places)
        return dict(zip(map(str, files), prints, strict=True))


def identity(table: Table) -> dict[str, Any]:
    """What of it a resumed run must have in common: content, not place or time.

    What the rows of data files say is compared instead of the files.
    """
    told: dict[str, Any] = {
        kind: {name: words(found) for name, found in files.items()}
        for kind, files in table.items()
        if kind not in ("data", "media")
    }
    media = [words(found) for found in table["media"].values()]
    if media:
        told["media"] = f"{len(media)} files, {hashlib.sha256(repr(media).encode()).hexdigest()}"
    return told


def differences(
    then: Mapping[str, Any], now: Mapping[str, Any], table: Table, run_dir: Path
) -> list[str]:
    """Which files are others than when the run began, as sentences without an end.

    Args:
        then: What `identity` said when a checkpoint was saved.
        now: What it says of this run.
        table: What `look` found now.
        run_dir: Holds what it found when the run began, for the names of media.
    """
    found: list[str] = []
    for kind in sorted(then.keys() | now.keys()):
        before, after = then.get(kind), now.get(kind)
        if before == after:
            continue
        if isinstance(before, dict) or isinstance(after, dict):
            before, after = before or {}, after or {}
            found += [
                _difference(_path(table, kind, name), before.get(name), after.get(name))
                for name in sorted(before.keys() | after.keys())
                if before.get(name) != after.get(name)
            ]
        else:
            others = changed_files(run_dir, table, kind)
            found += others or [_difference(kind, before, after)]
    return found


def changed_files(run_dir: Path, table: Table, kind: str) -> list[str]:
    """The same for rows and media, from the table in the run folder.

    Files of rows are the same by name, media by their place in the rows.
    """
    then, now = _kept(run_dir).get(kind, {}), table.get(kind, {})
    if kind == "media":
        pairs = list(zip(then.values(), now.values(), strict=False))
    else:
        pairs = [(then[name], found) for name, found in now.items() if name in then]
    states = [(found["path"], words(before), words(found)) for before, found in pairs]
    return [_difference(*state) for state in states if state[1] != state[2]]


def _difference(what: str, then: str | None, now: str | None) -> str:
    return f"{what} was {then or 'not there'} when the run began, and is {now or 'not there'} now"


def _path(table: Table, kind: str, name: str) -> str:
    found = table.get(kind, {}).get(name)
    return found["path"] if found else f"{name} ({kind})"


def touched(run_dir: Path, table: Table) -> list[str]:
    """Files not hashed whole that were written again since then, alike in what was looked at."""
    then = _kept(run_dir)
    return [
        found["path"]
        for kind, files in table.items()
        for name, found in files.items()
        if not found["whole"] and (before := then.get(kind, {}).get(name))
        if (before["path"], words(before)) == (found["path"], words(found))
        if before["time"] != found["time"]
    ]


def _kept(run_dir: Path) -> Table:
    """What the run folder says of its files; empty where that cannot be read."""
    try:
        table: Any = json.loads((run_dir / TABLE).read_text(encoding="utf-8"))
        return {
            kind: {name: {key: found[key] for key in _KEYS} for name, found in files.items()}
            for kind, files in table.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def files_of(row: Example) -> Iterator[Path]:
    """Every file that a row and its candidates show, play or answer with, in order."""
    yield from _shown(row.media)
    for candidate in row.candidates:
        if candidate.media is not None:
            yield from _shown(candidate.media)
        response = candidate.response
        if isinstance(response, Picture):
            yield response.path
        elif isinstance(response, Path):
            yield response


def _shown(media: Media) -> Iterator[Path]:
    for file in media.files():
        yield file.path if isinstance(file, Picture) else file
    if media.change is not None and media.change.donor is not None:
        yield media.change.donor.path
