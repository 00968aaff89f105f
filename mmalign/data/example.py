"""One preference record, parsed once at the edge; nothing downstream looks at raw dicts."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

ExampleKind = Literal["pair", "unpaired", "list", "plain"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


Prompt = str | tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One (context, response) pair of a row; what is None comes from the row."""

    response: str | Path | tuple[Message, ...]
    prompt: Prompt | None = None  # None: the row's prompt
    video: Path | None = None  # None: the row's video
    spans: tuple[tuple[int, int], ...] = ()  # character ranges [start, end) of the response
    role: str = ""  # "" rated | "mismatched" | "calibration" | "rationale" | "online"
    complete: bool = True  # False: the text was cut, so no end token may be learned after it


@dataclass(frozen=True, slots=True)
class Example:
    """One row: a prompt and K candidates with labels."""

    id: str
    prompt: Prompt
    candidates: tuple[Candidate, ...]  # K
    labels: tuple[float, ...]  # K
    kind: ExampleKind = "pair"
    weight: float = 1.0
    video: Path | None = None
    audio: Path | None = None
    meta: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
