"""What is known of pictures and model files from an earlier look, so that none is read twice."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmalign.data.cache import TensorCache
from mmalign.data.pictures import decode_all
from mmalign.diffusion.pipeline import component, component_fingerprint
from mmalign.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from PIL.Image import Image

    from mmalign.config import RunConfig
    from mmalign.data.example import Picture

    Size = tuple[int, int]  # height, width, in pixels

FLUSH_SECONDS = 30.0
"""Longest that finished work waits in memory: what an interruption may lose."""


_PART = 1024  # pictures between two looks at the clock


def cache_folder(config: RunConfig) -> Path:
    """Where the caches lie: `diffusion.cache_folder`, or cache/ beside the run folder."""
    return config.diffusion.cache_folder or config.output.parent / "cache"


def open_store(folder: Path, settings: Mapping[str, str]) -> TensorCache:
    """A cache whose finished work is on disk within `FLUSH_SECONDS`."""
    return TensorCache(folder, settings, seconds=FLUSH_SECONDS)


class Contents:
    """What identifies a picture: its file with size and time of change, and its cell.

    A file is looked at once in the life of the object.
    """

    def __init__(self) -> None:
        self._files: dict[Path, list[Any]] = {}

    def __call__(self, picture: Picture) -> list[Any]:
        """Path, size in bytes, time of change, row and column.

        Raises:
            DataError: There is no such file.
        """
        file = self._files.get(picture.path)
        if file is None:
            try:
                info = picture.path.stat()
            except OSError as error:
                raise DataError(f"{picture}: cannot be read: {error}") from error
            file = self._files[picture.path] = [
                str(picture.path),
                info.st_size,
                info.st_mtime_ns,
            ]
        return [*file, picture.row, picture.column]


class PictureNotes:
    """What decoding a picture once has shown: its size, or why it cannot be decoded."""

    def __init__(self, config: RunConfig, contents: Contents | None = None) -> None:
        self._contents = contents or Contents()
        self._known: dict[Picture, Size | DataError] = {}
        self.store = open_store(cache_folder(config) / "pictures", {"holds": "sizes"})

    def get(self, picture: Picture) -> Size | DataError | None:
        """Height and width in pixels, the error that decoding gave, or None: not known."""
        found = self._known.get(picture)
        if found is not None:
            return found
        key = self.key(picture)
        if not self.store.missing([key]) and (entry := self.store.get(key)) is not None:
            if "bad" in entry:
                found = DataError(entry["bad"].tobytes().decode("utf-8"))
            else:
                height, width = entry["size"].tolist()
                found = (height, width)
            self._known[picture] = found
        return found

    def put(self, picture: Picture, found: Size | DataError) -> None:
        """Remember what decoding gave; a file that could not be read may be readable again."""
        self._known[picture] = found
        if isinstance(found, DataError):
            if "cannot be read" in str(found):
                return
            entry = {"bad": np.frombuffer(str(found).encode("utf-8"), np.uint8)}
        else:
            entry = {"size": np.array(found, np.int32)}
        self.store.put(self.key(picture), entry)

    def key(self, picture: Picture) -> str:
        """The picture's entry."""
        return self.store.key(self._contents(picture))


def look(
    config: RunConfig,
    pictures: Iterable[Picture],
    *,
    notes: PictureNotes | None = None,
    seen: Callable[[int], None] | None = None,
) -> dict[Picture, Size | DataError]:
    """The sizes of pictures, or why one cannot be decoded; only those not known are decoded.

    Args:
        config: The run; says where notes lie.
        pictures: May repeat.
        notes: To add to; without them nothing is written.
        seen: Called with the number of pictures decoded since the last call.
    """
    known = notes or PictureNotes(config)
    found: dict[Picture, Size | DataError] = {}
    unknown: list[Picture] = []
    for picture in dict.fromkeys(pictures):
        try:
            size = known.get(picture)
        except DataError as error:  # the file is gone
            size = error
        if size is None:
            unknown.append(picture)
        else:
            found[picture] = size
    unknown.sort(key=lambda p: (p.path, p.row, p.column))
    for start in range(0, len(unknown), _PART):
        decoded = decode_all(unknown[start : start + _PART], _size)
        found |= decoded
        if notes is not None:
            for picture, size in decoded.items():
                notes.put(picture, size)
        if seen is not None:
            seen(len(decoded))
    return found


def _size(image: Image) -> Size:
    return (image.height, image.width)


def fingerprint_of(config: RunConfig, name: str) -> str:
    """Hash of the files of a part of the run's model: "vae", "text_encoder", "unet", ...

    Reading gigabytes at every start of a run takes longer than loading them would; so hashes are
    kept in the cache folder, by the place, sizes and times of change of the files.
    """
    model = config.model
    folder = component(model.path, name, model.revision).resolve()
    files = [(item.name, item.stat()) for item in sorted(folder.iterdir()) if item.is_file()]
    state = [str(folder), [[item, info.st_size, info.st_mtime_ns] for item, info in files]]
    key = hashlib.sha256(json.dumps(state).encode()).hexdigest()
    file = cache_folder(config) / "fingerprints.json"
    if key not in _FINGERPRINTS:
        with suppress(OSError, ValueError, TypeError):
            _FINGERPRINTS.update(json.loads(file.read_text(encoding="utf-8")))
    if key not in _FINGERPRINTS:
        _FINGERPRINTS[key] = component_fingerprint(model.path, name, model.revision)
        partial = file.with_name(f".{file.name}.{os.getpid()}.part")
        with suppress(OSError):  # no caches yet, or others' that may only be read
            partial.write_text(json.dumps(_FINGERPRINTS, indent=1), encoding="utf-8")
            partial.replace(file)
    return _FINGERPRINTS[key]


_FINGERPRINTS: dict[str, str] = {}  # by the state of the files: true for as long as they stay


def require(store: TensorCache, what: str, lacking: int, total: int, of: str = "rows") -> None:
    """Refuse a cache that lacks something.

    Raises:
        ConfigError: With the command that writes it.
    """
    if lacking:
        raise ConfigError(
            f"{store.folder} lacks {what} of {lacking} of {total} {of} under this model and these "
            "settings. Write them with `mmalign cache CONFIG`, or train without (diffusion.cache: "
            "off, reference.kind: auto)"
        )


def lost(store: TensorCache, what: str) -> ConfigError:
    """The error for an entry that is not there in the course of a run."""
    if store.bad_shards:
        return ConfigError(
            f"{store.bad_shards[-1]} is damaged and held {what}. Remove this file, and write what "
            "it held anew with `mmalign cache CONFIG`"
        )
    return ConfigError(
        f"{store.folder}: {what} are missing. Write them with `mmalign cache CONFIG`"
    )
