"""Rows of text as a run takes them, kept in a folder, so that a large file is parsed once.

What is kept is found by the bytes of every file, by what the config and the objective ask of them,
and by the code that reads them; any change makes it a miss.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import zlib
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mmalign.data.example import Candidate, Example, Message, Template
from mmalign.data.jobs import waiting
from mmalign.safe import replacing

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from mmalign.config import DataConfig
    from mmalign.data.select import Needs

    Parts = tuple[list[Example], list[Example]]

FEWEST = 10_000  # rows; fewer are read in a moment
_LARGEST = 2 << 30  # bytes of all files together
_LATER = {"max_prompt_length", "max_response_length", "truncate_prompt", "num_workers"}

log = logging.getLogger("mmalign.data")


class KeptRows:
    """One file for each set of sources and each way to read them."""

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
            with path.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        self.file = folder / f"{digest.hexdigest()[:40]}.json"

    def get(self) -> Parts | None:
        """The rows, after what was logged about them; None where they must be read (again)."""
        if self.file is None or not self.file.is_file():
            return None
        try:
            with waiting("reading rows"), no_collection():
                head, _, body = self.file.read_bytes().partition(b"\n")
                checksum, lines = json.loads(head)
                if zlib.crc32(body) != checksum:
                    return None
                rows, places = json.loads(body)
                examples = [_unpacked(row) for row in rows]
                parts: Parts = ([examples[i] for i in places[0]], [examples[i] for i in places[1]])
        except (OSError, ValueError, TypeError, IndexError):
            return None
        for line in lines:
            log.warning("%s", line)
        return parts

    def put(self, parts: Parts, lines: Sequence[str]) -> None:
        """Keep the rows and what was logged; what cannot be kept or written is read again."""
        rows = {id(row): row for part in parts for row in part}
        if self.file is None or len(rows) < FEWEST:
            return
        numbers = {key: number for number, key in enumerate(rows)}
        places = [[numbers[id(row)] for row in part] for part in parts]
        try:
            with no_collection():
                packed = [[_packed(row) for row in rows.values()], places]
                body = json.dumps(packed, ensure_ascii=False).encode()
            self.file.parent.mkdir(parents=True, exist_ok=True)
            head = json.dumps([zlib.crc32(body), list(lines)]).encode()
            with replacing(self.file, several=True) as partial:
                partial.write_bytes(head + b"\n" + body)
        except (OSError, _NotTextError, TypeError, UnicodeEncodeError):  # dates in meta, say
            return


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


class _NotTextError(Exception):
    """A row shows something, or its response is a picture."""


@cache
def _code() -> str:
    """Identifies the code that reads rows."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _packed(row: Example) -> list[Any]:
    if row.media or any(candidate.media for candidate in row.candidates):
        raise _NotTextError
    return [
        row.id,
        _packed_text(row.prompt),
        [_packed_candidate(candidate) for candidate in row.candidates],
        row.labels,
        row.kind,
        row.weight,
        row.template.tools,
        row.template.options,
        row.meta,
        row.place if row.place != row.id else None,
    ]


def _packed_candidate(c: Candidate) -> list[Any]:
    own = None if c.prompt is None else _packed_text(c.prompt)
    rest = [own, c.spans, c.steps, c.role, c.complete]
    text = _packed_text(c.response)
    return [text] if rest == [None, (), (), "", True] else [text, *rest]


def _packed_text(text: Any) -> str | list[list[str]]:
    if isinstance(text, str):
        return text
    if not isinstance(text, tuple):
        raise _NotTextError
    turns = cast("tuple[Message, ...]", text)
    return [[turn.role, turn.content, turn.extra] for turn in turns]


_NO_TEMPLATE = Template()


def _unpacked(row: list[Any]) -> Example:
    identity, prompt, candidates, labels, kind, weight, tools, options, meta, place = row
    return Example(
        id=identity,
        prompt=_text(prompt),
        candidates=tuple(_candidate(item) for item in candidates),
        labels=tuple(labels),
        kind=kind,
        weight=weight,
        template=Template(tools, options) if tools or options else _NO_TEMPLATE,
        meta=meta,
        place=identity if place is None else place,
    )


def _candidate(item: list[Any]) -> Candidate:
    if len(item) == 1:
        return Candidate(_text(item[0]))
    text, own, spans, steps, role, complete = item
    return Candidate(
        _text(text),
        prompt=None if own is None else _text(own),
        spans=tuple((first, last) for first, last in spans),
        steps=tuple((first, last) for first, last in steps),
        role=role,
        complete=complete,
    )


def _text(value: str | list[list[str]]) -> str | tuple[Message, ...]:
    return value if isinstance(value, str) else tuple(Message(*turn) for turn in value)
