"""The files of a run folder that do not change while it trains, and what a run is made of,
by content.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from io import RawIOBase
from pathlib import Path
from random import Random
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

import mmalign
from mmalign.config import RunConfig, dump
from mmalign.core.presets import source as loss_source
from mmalign.data.example import Example, Media, Picture
from mmalign.data.jobs import LOCK, track
from mmalign.errors import CheckpointError, ConfigError
from mmalign.models.adapter import tools_of
from mmalign.models.files import ADAPTER_CONFIG, read_json, weight_files
from mmalign.safe import write_text
from mmalign.train.run import Run

Print = dict[str, Any]  # path, bytes, time and hash of a file, and whether that is of all of it
Table = dict[str, dict[str, Print]]  # kind of file, name


WHOLE = 512 << 20  # bytes; a larger file of a model or of rows is hashed in parts
_PARTS = 64 << 20  # bytes of all of these parts, spread evenly from its start to its end
_MODEL = ("config.json", ADAPTER_CONFIG, "model_index.json", "scheduler_config.json", "*.py")
_TOKENIZER = (
    "tokenizer*.json", "vocab*", "merges.txt", "*.model", "*.tiktoken", "special_tokens_map.json",
    "added_tokens.json", "chat_template*", "additional_chat_templates/*.jinja",
)  # fmt: skip
_PROCESSOR = ("*processor_config.json",)


def model_files(kind: str, path: str | None, revision: str | None) -> Table:
    """The files of a model, its tokenizer and its processor; without them, its name."""
    if path is None:
        return {}
    folder = _folder(path, revision)
    if folder is None:
        known = {"path": f"the {kind}", "bytes": -1, "time": 0, "hash": path, "whole": True}
        return {kind: {"name": known}}
    if folder.is_file():
        return {kind: {"weights": print_of(folder, WHOLE)}}
    parts = [folder]
    if (folder / "model_index.json").is_file():
        parts += sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    table: Table = {kind: {}}
    for part in parts:
        settings = matching(part, _MODEL)
        table[kind] |= _prints(folder, [*_weights(part), *settings])
        for name, patterns in (("tokenizer", _TOKENIZER), ("processor", _PROCESSOR)):
            if (found := matching(part, patterns)) and kind in ("model", "base"):
                table[name] = table.get(name, {}) | _prints(folder, found)
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file():
        base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        if kind == "model" and isinstance(base, str) and base != path:
            table = model_files("base", base, None) | table
    return table


def _folder(path: str, revision: str | None) -> Path | None:
    """Where a model lies on this machine; None where that cannot be told."""
    if os.path.exists(path):
        return Path(path)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, revision=revision, local_files_only=True))
    except (OSError, ValueError):  # the hub's errors are both
        return None


def _weights(folder: Path) -> list[Path]:
    try:
        return weight_files(folder)
    except CheckpointError:
        return []


def matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """The files in a folder whose names fit one of the patterns, in order; hidden ones do not."""
    found = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    return sorted(file for file in found if not file.name.startswith("."))


def _prints(folder: Path, files: Iterable[Path]) -> dict[str, Print]:
    hashed = track(files, f"hashing {folder}", unit="files")
    return {file.relative_to(folder).as_posix(): print_of(file, WHOLE) for file in hashed}


def print_of(file: Path, whole: int) -> Print:
    """Path, size, time of change, and the hash of a file; of parts where it is above `whole`.

    Where `whole` is 0 nothing of the file is read, and the hash is "".
    """
    found = ""
    try:
        info = file.stat()
        if whole:
            with file.open("rb", buffering=0) as stream:
                info = os.fstat(stream.fileno())
                if info.st_size <= whole:
                    found = hashlib.file_digest(stream, "sha256").hexdigest()
                else:
                    found = _of_parts(stream, info.st_size, min(whole, _PARTS))
    except OSError as error:
        return {"path": str(file), "bytes": -1, "time": 0, "hash": error.strerror, "whole": True}
    return {
        "path": str(file),
        "bytes": info.st_size,
        "time": info.st_mtime_ns,
        "hash": found[:16],
        "whole": info.st_size <= whole,
    }


def _of_parts(stream: RawIOBase, length: int, read: int) -> str:
    """The hash of the first and the last bytes of a file, and of some between."""
    count = max(4, min(64, read >> 20))
    size = read // count
    digest = hashlib.sha256()
    for number in range(count):
        stream.seek(number * (length - size) // (count - 1))
        digest.update(stream.read(size) or b"")
    return digest.hexdigest()


def words(found: Mapping[str, Any]) -> str:
    """A fingerprint as messages and checkpoints have it, without place and time."""
    if found["bytes"] < 0:  # nothing but a name is known of it
        return str(found["hash"])
    of = f", hash {found['hash']}" if found["hash"] else ""
    return f"{found['bytes']} bytes{of}"


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
    for kind, path, revision in tools_of(config.modality).named_models(config):
        table |= model_files(kind, path, revision)
    data: dict[Path, None] = {}
    for source in config.data.train:
        path = Path(source.path)
        found = [path] if path.is_file() else matching(path, (*_ROWS, *(f"*/{r}" for r in _ROWS)))
        data.update(dict.fromkeys(found))
    table["data"] = _prints_of(list(data), _ALL_ROWS)
    media = dict.fromkeys(file for row in rows for file in files_of(row))
    table["media"] = _prints_of(list(media), _ALL_MEDIA)
    return table


def _prints_of(files: Sequence[Path], most: int) -> dict[str, Print]:
    """Fingerprints by name, for which no more than `most` bytes are read.

    Of very many files the same sample of places is read each time.
    """
    places = range(len(files))
    read = frozenset(Random(len(files)).sample(places, min(len(files), _MOST_READ)))
    whole = most // max(1, len(read))
    with ThreadPoolExecutor(8) as pool:  # most of it is waiting for the disk
        prints = pool.map(lambda i: print_of(files[i], whole if i in read else 0), places)
        hashed = track(prints, "hashing files", total=len(files), unit="files")
        return dict(zip(map(str, files), hashed, strict=True))


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


_PACKAGES = ("torch", "transformers", "diffusers", "peft", "accelerate", "datasets", "safetensors")
_BEGINNING = ("env.json", TABLE)  # written before config.yaml, which makes a folder a run
_LEFT = re.compile(
    r"\.(checkpoint-\d+|final|best)\.(tmp|old)|\.(env\.json|inputs\.json|config\.yaml|report\.html|"
    r"(metrics|eval|samples)\.jsonl)\.tmp"
)


def require_output(run_dir: Path, *, resume: bool) -> None:
    """Refuse to mix two runs in one folder, or to resume where there is none.

    A run that ended before it had written its config.yaml can be begun again, by either way.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"output {run_dir} is a file; give a folder")
    names = sorted(path.name for path in run_dir.iterdir()) if run_dir.exists() else []
    found = [name for name in names if name != LOCK]
    if resume and "config.yaml" in found:
        return
    foreign = [name for name in found if not _is_left_over(run_dir / name)]
    if resume and (foreign or not found):
        raise CheckpointError(
            f"{run_dir}: there is no run to resume; check `output`, or start one without --resume"
        )
    if foreign:
        some = ", ".join(found[:4]) + (", ..." if len(found) > 4 else "")
        raise ConfigError(
            f"output {run_dir} is not empty (it holds {some}). Continue that run with --resume, "
            "choose another output, or delete the folder"
        )


def _is_left_over(path: Path) -> bool:
    """Whether a run that never began has left this file."""
    if path.name not in _BEGINNING:
        return _LEFT.fullmatch(path.name) is not None
    try:
        said: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(said, dict) and (not said or "mmalign" in said or path.name == TABLE)


def sweep(run_dir: Path) -> None:
    """Remove what a run that was killed has left half-written; nothing that is not its own."""
    for path in run_dir.glob(".*"):
        if _LEFT.fullmatch(path.name):
            is_folder = path.is_dir() and not path.is_symlink()
            shutil.rmtree(path, ignore_errors=True) if is_folder else path.unlink(missing_ok=True)


def rows_hash(rows: Sequence[Example]) -> str:
    """A hash of what the rows say, in their order; 16 hexadecimal digits.

    A file counts by its number among those that the rows show: the rows are the same where they lie
    in another place. Noise is drawn by the names of images and of their folders, so these count.
    Ids count for nothing, since those that are made up name the file.
    """
    digest = hashlib.sha256()
    numbers: dict[Path, int] = {}
    for row in track(rows, "hashing rows", total=len(rows)):
        said = (row.kind, row.prompt, row.template, row.candidates, row.labels, row.weight)
        text = repr((*said, row.media) if row.media else said)
        for picture in (c.response for c in row.candidates if isinstance(c.response, Picture)):
            path = picture.path
            text = text.replace(repr(path), f"{path.parent.name}/{path.name}")
        for file in files_of(row):
            text = text.replace(repr(file), f"file {numbers.setdefault(file, len(numbers))}")
        digest.update(text.encode())
    return digest.hexdigest()[:16]


def describe_environment(run: Run) -> dict[str, Any]:
    """Versions, device and data: what one needs to know to run the same again elsewhere."""
    accelerator = run.accelerator
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "mmalign": mmalign.__version__,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "system": platform.system(),
        "packages": {package: _version(package) for package in _PACKAGES},
        "device": device.type,
        "device_name": name,
        "distributed": accelerator.distributed_type.value,
        "num_processes": accelerator.num_processes,
        "num_threads": torch.get_num_threads(),
        "losses": {
            name: hashlib.sha256(text.encode()).hexdigest()[:16]
            for name, text in own_losses(run.config).items()
        },
        "data": {
            "train_rows": len(run.train_rows),
            "train_hash": rows_hash(run.train_rows),
            "eval_rows": len(run.eval_rows),
            "eval_hash": rows_hash(run.eval_rows),
            "notes": list(run.notes),
        },
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of mmalign itself where it runs from a checkout."""
    root = Path(mmalign.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        told = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return told.stdout.strip()


def fixed_facts(environment: Mapping[str, Any]) -> dict[str, Any]:
    """What of it must be the same when a run resumes."""
    facts = {
        "data": {"train_hash": environment["data"]["train_hash"]},
        "num_processes": environment["num_processes"],
    }
    return facts | ({"losses": environment["losses"]} if environment["losses"] else {})


def own_losses(config: RunConfig) -> dict[str, str]:
    """The text of each module with losses of the user's own, by its path beside the config.

    Modules that are installed are not among them.
    """
    objective = config.objective
    found = [loss_source(name, objective.folder) for name in objective.own]
    return {
        file.as_posix(): (folder / file).read_text(encoding="utf-8")
        for folder, file in filter(None, found)
    }


def begin(run: Run, environment: Mapping[str, Any], made_of: Mapping[str, Any]) -> None:
    """Open the run folder with config.yaml, env.json and inputs.json."""
    if run.accelerator.is_main_process:
        output = run.config.output
        output.mkdir(parents=True, exist_ok=True)
        write_text(output / TABLE, json.dumps(made_of, indent=1) + "\n")
        write_text(output / "env.json", json.dumps(environment, indent=2) + "\n")
        write_text(output / "config.yaml", dump(run.config))
        for name, text in own_losses(run.config).items():  # so that the folder stands alone
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            write_text(output / name, text)
    run.accelerator.wait_for_everyone()
