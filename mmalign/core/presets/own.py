"""A loss of one's own: `module:function`, found beside the config that names it."""

from __future__ import annotations

import functools
import importlib
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.core.objective import Objective
from mmalign.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from types import ModuleType


def is_own(name: str) -> bool:
    """Whether a name stands for a function of the user's and not for a preset."""
    return ":" in name


def source(name: str, folder: Path | None) -> tuple[Path, Path] | None:
    """Where the module of `module:function` lies: the folder to import it from, and its file in it.

    Looked for beside the config first, then in the current directory; None where neither has it.

    Raises:
        ConfigError: The name is not written as `module:function`.
    """
    path = Path(*_parts(name)[0].split("."))
    for place in (folder, Path.cwd()):
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if place is not None and (place / file).is_file():
                return place.absolute(), file
    return None


def imported(name: str, folder: Path | None) -> Callable[..., Objective]:
    """The function of `module:function`.

    Args:
        name: The module may be a file beside the config, in the current directory, or installed.
        folder: Of the config; None where there is none.

    Raises:
        ConfigError: No such module or function, a module that cannot be imported, or (when it is
            called) a function that returns no Objective.
    """
    module_name, function_name = _parts(name)
    found = source(name, folder)
    try:
        module = _load(module_name, None if found is None else found[0])
    except (ImportError, SyntaxError) as error:
        sought = (
            "" if found else f", and there is no {module_name.replace('.', '/')}.py beside the "
        )
        sought += "" if found else "config or in the current directory"
        raise ConfigError(
            f"objective.name is {name!r}, but {module_name!r} cannot be imported: {error}{sought}"
        ) from error
    function: Any = getattr(module, function_name, None)
    if not callable(function):
        raise ConfigError(
            f"objective.name is {name!r}, but {module_name!r} has no such function"
            f"{f' (read from {found[0] / found[1]})' if found else ''}"
        )

    def checked(**keywords: Any) -> Objective:
        objective = function(**keywords)
        if not isinstance(objective, Objective):
            raise ConfigError(
                f"objective.name is {name!r}, but it returned {objective!r}, not an Objective"
            )
        return objective

    return functools.wraps(function)(checked)


def _parts(name: str) -> tuple[str, str]:
    module_name, _, function_name = name.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), function_name]):
        raise ConfigError(
            f"objective.name is {name!r}; a loss of your own is written as module:function, e.g. "
            "my_losses:cautious_dpo for a function in my_losses.py beside the config"
        )
    return module_name, function_name


@functools.cache
def _load(module_name: str, folder: Path | None) -> ModuleType:
    if folder is None:
        return importlib.import_module(module_name)
    importlib.invalidate_caches()  # the file may be younger than this process
    with _first_on_path(folder, module_name.partition(".")[0]):
        return importlib.import_module(module_name)


@contextmanager
def _first_on_path(folder: Path, top: str) -> Generator[None]:
    """Import from `folder`, as Python does for a script in it.

    What went by the module's name before, from another config's folder, comes back afterwards.
    """
    others = {
        name: module
        for name, module in sys.modules.items()
        if name.partition(".")[0] == top and not _is_in(module, folder)
    }
    for name in others:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        sys.modules.update(others)


def _is_in(module: ModuleType, folder: Path) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).absolute().is_relative_to(folder)
