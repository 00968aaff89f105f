"""Tensors and rows kept on disk, and found again by a hash of everything they depend on."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import math
import os
import re
import struct
import time
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np

from mmalign.data.example import Example
from mmalign.data.jobs import track, waiting
from mmalign.data.opening import OpenFiles
from mmalign.data.select import Needs
from mmalign.errors import DataError
from mmalign.safe import open_file, replacing

if TYPE_CHECKING:
    from pydantic import TypeAdapter

    from mmalign.config import DataConfig

log = logging.getLogger("mmalign.data")

Array = np.ndarray[Any, np.dtype[Any]]
Parts = tuple[list[Example], list[Example]]

HEADER_BYTES = 220
"""What a tensor costs beside its values: its name, shape, place and checksum in a shard."""

VERSION = "1"  # raise it when entries of the same key change meaning
_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BOOL": "?",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1",
}  # fmt: skip
_SIZES = {name: np.dtype(kind).itemsize for name, kind in _DTYPES.items()}
_MOST_HEADER = 100_000_000  # bytes, as the library that writes it has it

_Layout = tuple[tuple[str, str, tuple[int, ...]], ...]  # name, dtype and shape of each tensor

_OWN_NAME = re.compile(r"[0-9a-f]{32}\.safetensors")  # of a shard; other files are not ours
_PARTIAL = re.compile(r"\.[0-9a-f]{32}(\.safetensors)?\.\d+\.part")  # one that is being written
_DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
_PLACE = struct.Struct("<QI")  # offset in the shard, checksum


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where an entry's tensors lie; small, since a run has one for every image."""

    shard: Path
    layout: _Layout  # shared with the entries like it
    places: bytes  # a `_PLACE` for each tensor of the layout
    older: _Entry | None  # of the same key in another shard: written again, it stands beside it


class TensorCache:
    """A store of named arrays by key, for reading while training and for writing beforehand.

    Shards are read by offset and not through `safetensors.safe_open`: that maps a whole file, so
    that one which is cut short meanwhile ends the process (SIGBUS), where a read that comes back
    short is a miss; and it takes 1.2 times as long for an entry.

    Attributes:
        hits, misses: Lookups so far.
        corrupt: Shards and entries that could not be used; they count as misses.
        bad_shards: The files they are in.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: Mapping[str, str],
        *,
        shard_bytes: int = 64 << 20,
        seconds: float = math.inf,
    ) -> None:
        """Open a folder, made when it is first written to.

        Args:
            folder: Where the shards lie; may serve several models and settings.
            settings: All that decides the values beside the record: fingerprints of model and
                encoding, dtype, what is stored. Any change makes every old entry a miss.
            shard_bytes: Size at which `put` writes what it has gathered.
            seconds: Age of the oldest gathered entry at which it does so too.
        """
        self.folder = Path(folder)
        self.settings = dict(settings)
        self.shard_bytes, self.seconds = shard_bytes, seconds
        self.hits = self.misses = self.corrupt = 0
        self.bad_shards: list[Path] = []
        self._pending: dict[str, dict[str, Array]] = {}
        self._pending_bytes = 0
        self._pending_since = 0.0
        self._files = OpenFiles()
        self._index: dict[str, _Entry] = {}
        self._layouts: dict[_Layout, _Layout] = {}
        for shard in sorted(self.folder.glob("*.safetensors")):
            self._read_header(shard)

    def __len__(self) -> int:
        """Entries on disk, of any settings, and those not yet written."""
        return len(self._index.keys() | self._pending.keys())

    def __iter__(self) -> Iterator[str]:
        """Their keys."""
        return iter(self._index.keys() | self._pending.keys())

    def __enter__(self) -> Self:
        """The cache itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Write what is left, also when the work was interrupted."""
        self.flush()

    def key(self, content: object) -> str:
        """The key of a record under these settings; see `content_of` for examples."""
        parts = [VERSION, sorted(self.settings.items()), content]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def missing(self, keys: Iterable[str], *, read: bool = False) -> list[str]:
        """The keys that have no entry yet, in order, each once.

        Args:
            keys: From `key`.
            read: Read every entry that is there: what is damaged is missing too.
        """
        wanted = [key for key in dict.fromkeys(keys) if key not in self._pending]
        if read:
            for key in wanted:
                self._read(key)  # a damaged one leaves the index
        return [key for key in wanted if key not in self._index]

    def repair(self) -> int:
        """Write what is whole in damaged shards again, and delete them; returns how many.

        Without it, a run would meet them again, though their entries have been written elsewhere.
        """
        shards = {shard for shard in self.bad_shards if _OWN_NAME.fullmatch(shard.name)}
        for key in [key for key, entry in self._index.items() if entry.shard in shards]:
            arrays = self._read(key)
            if arrays is not None and self._index[key].shard in shards:
                self.put(key, arrays)
        self.flush()
        self._files.clear()
        for shard in shards:
            shard.unlink(missing_ok=True)
        self.bad_shards = [shard for shard in self.bad_shards if shard not in shards]
        return len(shards)

    def get(self, key: str) -> dict[str, Array] | None:
        """The arrays of an entry; None, and a miss, when there is none that can be trusted."""
        found = self._pending[key] if key in self._pending else self._read(key)
        self.hits += found is not None
        self.misses += found is None
        return found

    def put(self, key: str, arrays: Mapping[str, Array]) -> None:
        """Add an entry; written once enough have been gathered, or by `flush`.

        Args:
            key: From `key`.
            arrays: Any numpy arrays; bfloat16 goes in as its bits, viewed as int16.
        """
        if not self._pending:
            self._pending_since = time.monotonic()
        self._pending[key] = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        self._pending_bytes += sum(array.nbytes for array in arrays.values())
        waited = time.monotonic() - self._pending_since
        if self._pending_bytes >= self.shard_bytes or waited >= self.seconds:
            self.flush()

    def flush(self) -> None:
        """Write what was put so far as one shard.

        Raises:
            DataError: The disk is full or refuses.
        """
        if not self._pending:
            return
        from safetensors.numpy import save

        tensors = {
            f"{k}/{n}": array for k, entry in self._pending.items() for n, array in entry.items()
        }
        sums = {name: str(zlib.crc32(array.tobytes())) for name, array in tensors.items()}
        name = hashlib.sha256("".join(sorted(tensors)).encode()).hexdigest()[:32]
        shard = self.folder / f"{name}.safetensors"
        self._files.clear()  # a damaged shard of the same entries may be among them
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(shard, several=True, flush=True) as partial:
                partial.write_bytes(save(tensors, metadata=sums))
        except OSError as error:
            raise DataError(f"{shard}: cannot be written: {error}") from error
        self._pending, self._pending_bytes = {}, 0
        self._read_header(shard)

    def sweep(self) -> None:
        """Remove unfinished shards, for who alone writes here: whoever began them was killed."""
        for partial in self.folder.glob(".*.part"):
            if _PARTIAL.fullmatch(partial.name):
                partial.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the files that are open for reading; the next `get` opens its own again."""
        self._files.clear()

    def _read_header(self, shard: Path) -> None:
        """Index a shard from its header: 8 bytes of length, JSON, then the tensors' bytes."""
        try:
            with open_file(shard) as stream:
                length = int.from_bytes(stream.read(8), "little")
                size = os.fstat(stream.fileno()).st_size
                if length > _MOST_HEADER:
                    raise ValueError("its header is too long")
                header = json.loads(stream.read(length))
            sums = header.pop("__metadata__")
            entries: dict[str, list[tuple[str, str, tuple[int, ...], bytes]]] = {}
            for name, entry in header.items():
                key, _, array = name.partition("/")
                place = _PLACE.pack(8 + length + entry["data_offsets"][0], int(sums[name]))
                found = (array, _DTYPES[entry["dtype"]], _shape(entry), place)
                entries.setdefault(key, []).append(found)
            if max(entry["data_offsets"][1] for entry in header.values()) + 8 + length > size:
                raise ValueError("it ends too early")
        except (*_DAMAGE, struct.error) as error:
            self._damaged(shard, str(error))
            return
        for key, tensors in entries.items():
            layout = tuple(tensor[:3] for tensor in tensors)
            layout = self._layouts.setdefault(layout, layout)
            places = b"".join(tensor[3] for tensor in tensors)
            self._index[key] = _Entry(shard, layout, places, self._index.get(key))

    def _read(self, key: str) -> dict[str, Array] | None:
        while entry := self._index.get(key):
            arrays = self._arrays(entry)
            if arrays is not None:
                return arrays
            if entry.older is None:
                del self._index[key]
            else:
                self._index[key] = entry.older
        return None

    def _arrays(self, entry: _Entry) -> dict[str, Array] | None:
        arrays: dict[str, Array] = {}
        places = _PLACE.iter_unpack(entry.places)
        for (name, kind, shape), (offset, checksum) in zip(entry.layout, places, strict=True):
            dtype = np.dtype(kind)
            try:
                data = self._files.read(entry.shard, offset, math.prod(shape) * dtype.itemsize)
            except OSError as error:
                self._damaged(entry.shard, str(error))
                return None
            if zlib.crc32(data) != checksum:
                self._damaged(entry.shard, f"the checksum of {name} is wrong")
                return None
            arrays[name] = np.frombuffer(bytearray(data), dtype).reshape(shape)
        return arrays

    def _damaged(self, shard: Path, reason: str) -> None:
        self.corrupt += 1
        self.bad_shards.append(shard)
        if self.bad_shards.count(shard) == 1:  # else it is said already
            log.warning("%s cannot be used (%s); its entries are computed again", shard, reason)


def _shape(entry: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape of a header's entry, which must need the bytes that it says it has.

    Raises:
        ValueError: It does not: a damaged header may ask for more than any memory holds.
    """
    shape = tuple(map(int, entry["shape"]))
    start, end = entry["data_offsets"]
    if min(shape, default=1) < 0 or math.prod(shape) * _SIZES[entry["dtype"]] != end - start:
        raise ValueError("a tensor's shape does not fit its bytes")
    return shape


def content_of(example: Example) -> dict[str, Any]:
    """All of an example that a model sees, ready for `TensorCache.key`.

    Left out are its name, labels and weight, which change no log-probability. A file counts with
    its path, size and time of change.
    """
    names = ("prompt", "candidates", "media", *(("template",) if example.template else ()))
    return {name: plain(getattr(example, name)) for name in names}


def plain(value: Any) -> Any:
    """A value ready for JSON: dataclasses as objects, files as path, size and time of change."""
    if isinstance(value, Path):
        info = value.stat()
        return [str(value), info.st_size, info.st_mtime_ns]
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, tuple | list):
        return [plain(item) for item in cast("Sequence[Any]", value)]
    return value


FEWEST = 10_000  # rows; fewer are read in a moment
_LARGEST = 2 << 30  # bytes of all files together
_AT_ONCE = 1000  # rows of a line of the file, so that no more of it lies in memory
_LATER = {"max_prompt_length", "max_response_length", "truncate_prompt", "num_workers"}


class KeptRows:
    """Rows of text as a run takes them, kept in a folder, so that a large file is parsed once.

    They are found by the bytes of every file, by what the config and the objective ask of them, and
    by the code that reads them; any change makes it a miss.
    """

    def __init__(self, folder: Path, config: DataConfig, needs: Needs, seed: int) -> None:
        """`folder` is made when it is first written to; nothing is kept of what is not a file."""
        sources = [Path(source.path) for source in (*config.train, *config.eval)]
        self.file: Path | None = None
        if any(not path.is_file() for path in sources):
            return
        if sum(path.stat().st_size for path in sources) > _LARGEST:
            return
        asked = [needs.rows, needs.candidates, needs.roles, needs.labels, seed]
        settings = config.model_dump_json(exclude=_LATER)
        digest = hashlib.sha256(json.dumps([_code(), settings, asked]).encode())
        for path in sources:
            with path.open("rb") as stream, waiting(f"looking at {path}"):
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        self.file = folder / f"{digest.hexdigest()[:40]}.json"

    def get(self) -> Parts | None:
        """The rows, after what was logged about them; None where they must be read (again)."""
        if self.file is None or not self.file.is_file():
            return None
        rows: list[Example] = []
        checksum = 0
        try:
            with self.file.open("rb") as stream, no_collection():
                count, lines = json.loads(stream.readline())
                chunks = (stream.readline() for _ in range(0, count, _AT_ONCE))
                for chunk in track(chunks, "reading rows", total=count, size=_AT_ONCE):
                    checksum = zlib.crc32(chunk, checksum)
                    rows += _examples().validate_json(chunk)
                places = stream.readline()
                if zlib.crc32(places, checksum) != int(stream.read()):
                    return None
                train, held_out = json.loads(places)
                parts: Parts = ([rows[i] for i in train], [rows[i] for i in held_out])
        except (OSError, ValueError, TypeError, IndexError):
            return None
        for line in lines:
            log.warning("%s", line)
        return parts

    def put(self, parts: Parts, lines: Sequence[str]) -> None:
        """Keep the rows and what was logged; what cannot be kept or written is read again."""
        by_id = {id(row): row for part in parts for row in part}
        rows = list(by_id.values())
        if self.file is None or len(rows) < FEWEST or not all(map(_is_text, rows)):
            return
        numbers = {key: number for number, key in enumerate(by_id)}
        places = [[numbers[id(row)] for row in part] for part in parts]
        checksum = 0
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.file, several=True) as partial, partial.open("wb") as stream:
                stream.write(_line([len(rows), list(lines)]))
                starts = range(0, len(rows), _AT_ONCE)
                for start in track(starts, "keeping rows", total=len(rows), size=_AT_ONCE):
                    part = rows[start : start + _AT_ONCE]
                    chunk = _line(_examples().dump_python(part, exclude_defaults=True))
                    checksum = zlib.crc32(chunk, checksum)
                    stream.write(chunk)
                last = _line(places)
                stream.write(last + str(zlib.crc32(last, checksum)).encode())
        except (OSError, TypeError, UnicodeEncodeError):  # dates in meta, say
            return


def _line(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


@contextmanager
def no_collection() -> Generator[None]:
    """Make many objects that stay, without looking through all of them again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.freeze()  # nor later on
            gc.enable()


@cache
def _code() -> str:
    """Identifies the code that reads rows."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


@cache
def _examples() -> TypeAdapter[list[Example]]:
    from pydantic import TypeAdapter

    return TypeAdapter(list[Example])


def _is_text(row: Example) -> bool:
    """Whether a row shows nothing, and no response of it is an image."""
    texts = all(isinstance(c.response, str | tuple) and not c.media for c in row.candidates)
    return texts and not row.media
