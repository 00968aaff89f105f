"""Fingerprints of files, and which files of a model's folder decide what it computes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.errors import CheckpointError
from mmalign.models.files import ADAPTER_CONFIG, read_json, weight_files

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from io import RawIOBase

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
    return {file.relative_to(folder).as_posix(): print_of(file, WHOLE) for file in files}


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
