"""Modules under their earlier names: still found, with a warning that gives the new one."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "benchmark": "bench",
    "benchmark.show": "bench.score",
    "bench.registry": "bench",
    "bench.vidhalluc": "bench.hallucination",
    "bench.videohallucer": "bench.hallucination",
    "configfile": "config.yaml",
    "data.folders": "data.files",
    "data.kept": "data.cache",
    "data.phrases": "data.words",
    "data.prompts": "data.records",
    "data.spans": "data.parse",
    "data.unread": "data.convert",
    "diffusion.draws": "diffusion.estimators",
    "diffusion.models": "diffusion.components",
    "diffusion.samples": "diffusion.sample",
    "making": "pairs",
    "offline": "inference",
    "quickstart.chat_model": "quickstart.chat",
    "quickstart.clip_model": "quickstart.clips",
    "quickstart.clip_questions": "quickstart.clips",
    "quickstart.digits_base": "quickstart.digits",
    "quickstart.digits_pairs": "quickstart.digits",
    "quickstart.video_base": "quickstart.video_pairs",
    "quickstart.video_exam": "quickstart.video_pairs",
    "text.head": "text.logps",
    "text.token_adapter": "text.adapter",
    "train.holdout": "train.final",
    "video.check_journal": "video.checks",
    "video.clue_part": "video.clues",
    "video.frames": "video.sizes",
    "video.pami": "video.candidates",
}
"""Earlier name of a module to its new one, within the package."""

FUNCTIONS = {"config.check": "preflight.check.check_config"}
"""The same for functions of modules that are still there."""


def function(module: str, name: str) -> Any:
    """What a module's `__getattr__` answers for functions that stand elsewhere now.

    Raises:
        AttributeError: It never had one of that name.
    """
    new = FUNCTIONS.get(f"{module.partition('.')[2]}.{name}")
    if new is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    place, _, new_name = f"mmalign.{new}".rpartition(".")
    warnings.warn(f"{module}.{name} is {place}.{new_name} now", DeprecationWarning, stacklevel=3)
    return getattr(import_module(place), new_name)


def new_name(name: str) -> str | None:
    """Where a module is that had this name; None where none had. A folder moves with its modules.

    Args:
        name: Within the package: `making.predict`.
    """
    if name in MOVED:
        return MOVED[name]
    parent, _, own = name.rpartition(".")
    moved = new_name(parent) if parent else None
    return None if moved is None else f"{moved}.{own}"


class _Finder:
    """Finds modules by their earlier names.

    Without `importlib.abc`, which loads files that `mmalign --help` needs for nothing.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package != "mmalign" or new_name(name) is None:
            return None
        loader: Any = self  # all that a loader has to be
        return ModuleSpec(fullname, loader, is_package=True)

    def create_module(self, spec: ModuleSpec) -> None:
        """The usual kind of module."""

    def exec_module(self, module: ModuleType) -> None:
        new = f"mmalign.{new_name(module.__name__.partition('.')[2])}"
        warnings.warn(f"{module.__name__} is {new} now", DeprecationWarning, stacklevel=2)
        found = import_module(new)

        def get(name: str) -> Any:
            return getattr(found, name)

        module.__getattr__ = get  # type: ignore[method-assign]


def install() -> None:
    """Let old names be imported."""
    sys.meta_path.append(_Finder())
