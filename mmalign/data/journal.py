"""What is done of a long job, line by line, so that a killed one goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmalign.data.fields import as_object
from mmalign.errors import DataError


class Journal:
    """A JSONL file of results by id, appended to as they come.

    The first line says what was asked. A last line that is cut off, as a killed process leaves it,
    is taken back; its row is done again.
    """

    def __init__(self, path: Path, asked: dict[str, Any]) -> None:
        """Open, or begin, the journal of a job.

        Raises:
            DataError: The file is the journal of another job, or damaged.
        """
        self.path = path
        self.done: dict[str, dict[str, Any]] = {}
        lines = self._whole_lines()
        if lines:
            before = as_object(lines[0]["asked"]) or {}
            if before != asked:
                keys = sorted(key for key in asked if before.get(key) != asked[key])
                raise DataError(
                    f"{path}: was begun for something else ({', '.join(keys) or 'another job'} "
                    "differs). Run that command again to end it, or delete the file"
                )
            self.done = {line.pop("id"): line for line in lines[1:]}
        self._handle = path.open("a", encoding="utf-8")
        if not lines:
            self._write([{"asked": asked}])

    def _whole_lines(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        data = self.path.read_bytes()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            with self.path.open("r+b") as handle:
                handle.truncate(end)
        lines: list[dict[str, Any]] = []
        for number, text in enumerate(data[:end].splitlines(), start=1):
            try:
                line = as_object(json.loads(text))
                if line is None or ("asked" if number == 1 else "id") not in line:
                    raise ValueError
            except ValueError:
                raise DataError(f"{self.path}:{number}: is damaged; delete the file") from None
            lines.append(line)
        return lines

    def add(self, results: dict[str, dict[str, Any]]) -> None:
        """Write down the results of some ids."""
        self._write([{"id": key, **result} for key, result in results.items()])
        self.done |= results

    def _write(self, lines: list[dict[str, Any]]) -> None:
        self._handle.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        self._handle.flush()

    def close(self) -> None:
        """Close the file; it stays."""
        self._handle.close()

    def remove(self) -> None:
        """Close and delete it: the job is done."""
        self.close()
        self.path.unlink(missing_ok=True)
