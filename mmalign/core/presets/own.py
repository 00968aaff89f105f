"""A user's own loss or rule: `module:function`, found beside the config that names it.

Importing runs code. What lies beside a config came with it; anything else a config may name only
where the function is marked (`@mmalign.objective`, `@mmalign.rule`), which is read before anything
is imported.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from mmalign.core.objective import Objective
from mmalign.errors import ArgumentError, MmalignError


@dataclass(frozen=True, slots=True)
class Own:
    """What a user's function is, as messages name it."""

    key: str  # of the config
    what: str
    mark: str  # the decorator `@mmalign.MARK`, which sets the attribute __mmalign_MARK__
    example: str  # module:function


LOSS = Own("name", "a loss", "objective", "my_losses:cautious_dpo")


def is_own(name: str) -> bool:
    """True for the name of a user's function, false for that of a preset."""
    return ":" in name


def source(name: str, folder: Path | None, own: Own = LOSS) -> tuple[Path, Path] | None:
    """The folder to import the module of `module:function` from, and its file in that folder.

    Looked for beside the config first, then in the current directory; None where neither has it.

    Raises:
        ArgumentError: The name is not written as `module:function`.
    """
    path = Path(*_parts(name, own)[0].split("."))
    for place in (folder, Path.cwd()):
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if place is not None and (place / file).is_file():
                return place.absolute(), file
    return None


def imported(name: str, folder: Path | None) -> Callable[..., Objective]:
    """The function of `module:function`, which makes a loss.

    Raises:
        ArgumentError: As `function_of`, or (when it is called) a function that fails or returns no
            Objective.
    """
    function = function_of(name, folder)

    def checked(**keywords: Any) -> Objective:
        try:
            objective = function(**keywords)
        except MmalignError:
            raise
        except Exception as error:  # the user's code, which may raise anything
            raise ArgumentError(
                f"name is {name!r}, which fails: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(objective, Objective):
            raise ArgumentError(
                f"name is {name!r}, but it returned {objective!r}, not an Objective"
            )
        return objective

    return functools.wraps(function)(checked)


def function_of(name: str, folder: Path | None, own: Own = LOSS) -> Callable[..., Any]:
    """The function of `module:function`.

    Args:
        name: The module may be a file beside the config, in the current directory, or installed.
        folder: Of the config; None where there is none.
        own: What the function is.

    Raises:
        ArgumentError: No such module or function, one that a config may not name, or a module that
            cannot be imported.
    """
    module_name, function_name = _parts(name, own)
    found = source(name, folder, own)
    must_be_marked = folder is not None and (found is None or found[0] != folder.absolute())
    file = found[0] / found[1] if found else _installed(module_name)
    if must_be_marked and file and not _is_marked(module_name, function_name, file, own):
        raise ArgumentError(
            f"{own.key} is {name!r}, but {module_name!r} does not lie beside the config, and "
            f"holds no function {function_name!r} marked by @mmalign.{own.mark}: put the module "
            "beside the config, or mark the function"
        )
    try:
        module = _load(module_name, None if found is None else found[0])
    except (ImportError, SyntaxError) as error:
        absent = f"{module_name.replace('.', '/')}.py beside the config or in the current directory"
        sought = "" if found else f", and there is no {absent}"
        raise ArgumentError(
            f"{own.key} is {name!r}, but {module_name!r} cannot be imported: {error}{sought}"
        ) from error
    except Exception as error:  # the user's code, which may raise anything
        raise ArgumentError(
            f"{own.key} is {name!r}, but {module_name!r} fails when it is imported: "
            f"{type(error).__name__}: {error}"
        ) from error
    function: Any = getattr(module, function_name, None)
    if not callable(function):
        raise ArgumentError(
            f"{own.key} is {name!r}, but {module_name!r} has no such function"
            f"{f' (read from {found[0] / found[1]})' if found else ''}"
        )
    return function


def _parts(name: str, own: Own) -> tuple[str, str]:
    module_name, _, function_name = name.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), function_name]):
        raise ArgumentError(
            f"{own.key} is {name!r}; {own.what} of your own is written as module:function, e.g. "
            f"{own.example} for a function in {own.example.partition(':')[0]}.py beside the config"
        )
    return module_name, function_name


def _is_marked(module_name: str, function_name: str, file: Path, own: Own) -> bool:
    """True if its mark decorates a function, as its source says; nothing is imported."""
    known = sys.modules.get(module_name)
    if getattr(getattr(known, function_name, None), f"__mmalign_{own.mark}__", False) is True:
        return True
    if file.suffix != ".py":
        return False
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return False
    return any(
        isinstance(node, ast.FunctionDef)
        and node.name == function_name
        and any(ast.unparse(one).rpartition(".")[2] == own.mark for one in node.decorator_list)
        for node in tree.body
    )


def _installed(module_name: str) -> Path | None:
    """The file of an installed module; None where not even its package is there.

    `find_spec` of a whole name would import its packages.
    """
    top, *below = module_name.split(".")
    try:
        spec = importlib.util.find_spec(top)
        if spec is None:
            return None
        for part in below:
            places = None if spec is None else spec.submodule_search_locations
            spec = PathFinder.find_spec(part, list(places)) if places else None
    except (ImportError, ValueError):  # a module without a specification, made in memory
        return Path(module_name)
    return Path((spec and spec.origin) or module_name)


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
