"""What each stage of a round was made of: `done.json`, and what of it has changed since."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mmalign
from mmalign.errors import DataError
from mmalign.safe import write_text

FILE = "done.json"
_PACKAGES = ("torch", "transformers", "diffusers", "peft")


_known: dict[tuple[Any, ...], str] = {}


def digest(path: Path) -> str:
    """sha256 of a file, or of all weights below a folder by name and content.

    It is computed once as long as places, sizes and times of the files stay.
    """
    files = [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
    states = [file.stat() for file in files]
    places = ((str(f), s.st_size, s.st_mtime_ns) for f, s in zip(files, states, strict=True))
    key = (str(path), *places)
    if key not in _known:
        _known[key] = _sha256(path, files)
    return _known[key]


def _sha256(path: Path, files: Sequence[Path]) -> str:
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256")
        if file == path:
            return found.hexdigest()
        total.update(file.relative_to(path).as_posix().encode() + found.digest())
    return total.hexdigest()


def seed_of(*parts: object) -> int:
    """A 31-bit seed, a function of the run's seed, the round and what it is for."""
    key = repr(parts).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "little") >> 1


class Ledger:
    """What the stages of one round were made of.

    A stage is done when what it makes is there, renamed into place; whoever made it. What it was
    made of is written down when it is first seen, and must be the same from then on: other inputs
    or settings would make another result. A result that somebody puts in another's place is taken,
    as long as nothing was made of the old one.
    """

    def __init__(self, folder: Path) -> None:
        """Read the `done.json` of a round's folder, if there is one."""
        self.folder, self._path = folder, folder / FILE
        self._stages: dict[str, dict[str, Any]] = {}
        if self._path.is_file():
            try:
                self._stages = json.loads(self._path.read_text(encoding="utf-8"))["stages"]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{self._path}: is damaged; delete it") from error

    def is_done(
        self, name: str, inputs: Mapping[str, Path | str], settings: Mapping[str, Any]
    ) -> bool:
        """Whether a stage's result is there, and was made of what is there now.

        Args:
            name: Of the result, in the round's folder.
            inputs: Files and folders that it is made of, or texts that stand for them.
            settings: What else decides it, as JSON can say it.

        Raises:
            DataError: It was made of other inputs or with other settings.
        """
        result = self.folder / name
        if not result.exists():
            self._stages.pop(name, None)
            return False
        now = self._facts(result, inputs, settings)
        before = self._stages.get(name)
        if before is not None:
            self._compare(result, before, now)
        if before is None or before["sha256"] != now["sha256"]:
            self._write(name, now)
        return True

    def note(
        self,
        name: str,
        inputs: Mapping[str, Path | str],
        settings: Mapping[str, Any],
        **more: Any,
    ) -> None:
        """Write down what a stage's result was made of, and `more` that is worth knowing."""
        self._write(name, self._facts(self.folder / name, inputs, settings) | more)

    def told(self, name: str, key: str) -> Any:
        """What was noted with a stage; None where nothing was."""
        return self._stages.get(name, {}).get(key)

    def _facts(
        self, result: Path, inputs: Mapping[str, Path | str], settings: Mapping[str, Any]
    ) -> dict[str, Any]:
        return {
            "sha256": digest(result),
            "inputs": {
                key: value if isinstance(value, str) else digest(value)
                for key, value in inputs.items()
            },
            "settings": json.loads(json.dumps(settings, default=str)),
            "versions": _versions(),
        }

    def _compare(self, result: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        again = f"delete {result} and what was made of it to make it again"
        for key, found in now["inputs"].items():
            if before["inputs"].get(key) != found:
                raise DataError(
                    f"{result}: was made of another {key} than the one there is now; put that "
                    f"back, or {again}"
                )
        for key in sorted(now["settings"].keys() | before["settings"].keys()):
            then, here = before["settings"].get(key), now["settings"].get(key)
            if then != here:
                raise DataError(
                    f"{result}: was made with {_difference(key, then, here)}; put that back, or "
                    f"{again}"
                )

    def _write(self, name: str, facts: Mapping[str, Any]) -> None:
        self._stages[name] = dict(facts)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self._path, json.dumps({"stages": self._stages}, indent=1) + "\n")


def _difference(key: str, then: Any, now: Any) -> str:
    """The first setting that differs, by its dotted name, before and now."""
    if isinstance(then, dict) and isinstance(now, dict):
        for inner in sorted(then.keys() | now.keys()):
            if then.get(inner) != now.get(inner):
                return _difference(f"{key}.{inner}", then.get(inner), now.get(inner))
    return f"{key} {json.dumps(then)}, and it is {json.dumps(now)} now"


def _versions() -> dict[str, str]:
    found = {"mmalign": mmalign.__version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
