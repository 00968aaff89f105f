"""What is known of media from earlier runs: a JSONL file in the cache folder, found by every run.

A file that was found whole is not decoded again until it, or how it is read, changes. What was
found broken is looked at again by the next run: a disk may have been away for a moment.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

from mmalign.data.jobs import is_main_process
from mmalign.video.seen import Seen

if TYPE_CHECKING:
    from pathlib import Path

    from mmalign.config import VideoConfig
    from mmalign.data.example import Clip, Picture, Sound

FILE = "media_checks.jsonl"
VERSION = 2  # raise it when the same file gets another verdict
_DECIDING = {"num_frames", "fps", "max_frames", "min_frames", "max_seconds", "max_side",
             "decode_timeout", "no_sound"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of decoding one reference.

    Attributes:
        fault: What is wrong, naming the file; "" for one that is whole.
        silent: Nothing but that no sound is there.
        seen: Sizes, times and lengths of one that is whole.
    """

    fault: str = ""
    silent: bool = False
    seen: Seen | None = None


class CheckJournal:
    """Verdicts by what was decoded: file, size, time of change, part, and the settings that matter.

    Of several processes that train one model the first one decodes; the others, which come after
    it, take over its verdicts, so that all leave out the same rows.
    """

    def __init__(
        self, path: Path | None, settings: VideoConfig, longest: float | None = None
    ) -> None:
        """Read what is there; None for neither reading nor writing anything.

        `longest` is the window of a model that hears, in seconds.
        """
        import av

        self.path = path
        self._settings = {
            **settings.model_dump(mode="json", include=_DECIDING),
            "av": av.__version__,
            "longest": longest,
            "version": VERSION,
        }
        self._follows = not is_main_process()
        self._known: dict[str, Verdict] = {}
        if path is not None and path.is_file():
            for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
                self._take(line)

    def __enter__(self) -> Self:
        self._handle = None
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = self.path.open("a+b")
            if self._handle.tell():
                self._handle.seek(-1, os.SEEK_END)
                if self._handle.read(1) != b"\n":  # a process was killed within a line
                    self._handle.write(b"\n")
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            self._handle.close()

    def find(self, reference: Clip | Picture | Sound, heard: bool) -> Verdict | None:
        """What is known; None where the reference is to be decoded."""
        found = self._known.get(self._key(reference, heard))
        return found if found is None or self._follows or not found.fault else None

    def add(self, reference: Clip | Picture | Sound, heard: bool, verdict: Verdict) -> None:
        """Write a verdict down; the last one about a reference counts."""
        key = self._key(reference, heard)
        if self._handle is None or not key:
            return
        said: dict[str, Any] = {}
        if verdict.fault:
            said = {"fault": verdict.fault, "silent": verdict.silent}
        elif verdict.seen is not None:
            said = {"seen": verdict.seen.to_json()}
        line = json.dumps({"of": json.loads(key), **said}, ensure_ascii=False)
        self._handle.write(line.encode() + b"\n")
        self._handle.flush()

    def _take(self, line: str) -> None:
        try:
            entry = json.loads(line)
            key = json.dumps(entry["of"], sort_keys=True)
            seen = Seen.from_json(entry["seen"]) if "seen" in entry else None
            verdict = Verdict(str(entry.get("fault", "")), bool(entry.get("silent", False)), seen)
        except (ValueError, KeyError, TypeError, AttributeError):
            return  # cut off or damaged: its file is decoded again
        self._known[key] = verdict

    def _key(self, reference: Clip | Picture | Sound, heard: bool) -> str:
        """Of the file as it is now; "" where it cannot be looked at."""
        try:
            info = reference.path.stat()
        except OSError:
            return ""
        part: dict[str, Any] = asdict(reference)
        about = {
            **part,
            "path": str(reference.path),
            "kind": type(reference).__name__,
            "size": info.st_size,
            "mtime_ns": info.st_mtime_ns,
            "heard": heard,
            "settings": self._settings,
        }
        return json.dumps(about, sort_keys=True)
