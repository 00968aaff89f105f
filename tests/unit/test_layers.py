"""The import layers, read from the source: who may know whom, and what loads when."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

import mmalign

ROOT = Path(mmalign.__file__).resolve().parent
BELOW = {"safe", "errors", "core", "data", "models", "config"}
ALLOWED: dict[str, set[str]] = {
    "safe": set(),
    "errors": {"safe"},
    "core": {"errors"},
    "data": {"safe", "errors"},
    "config": {"safe", "errors"},
    "models": {"errors", "core", "data", "config"},
    "text": BELOW,
    "diffusion": BELOW | {"evaluate"},  # intervals of win rates
    "video": BELOW | {"text"},
    "evaluate": BELOW,
    "benchmark": {"safe", "errors", "data", "evaluate"},
    "preflight": {"errors", "core", "data", "models", "config"},
    "train": BELOW | {"evaluate", "preflight"},
}
"""What a part of the package may import when it loads; parts not listed may import everything."""

FOR_TYPES = {"config", "core", "models"}
"""What annotations may name from anywhere but the core: nothing is imported at run time."""

MODALITIES = {"text", "diffusion", "video"}

HEAVY = {
    "accelerate", "av", "bitsandbytes", "datasets", "diffusers", "matplotlib", "open_clip", "peft",
    "pyarrow", "tokenizers", "torchvision", "transformers",
}  # fmt: skip


@dataclass(frozen=True)
class Import:
    """One imported module, and when it is imported."""

    source: Path
    line: int
    module: str
    when: str  # "loading" | "later", inside a function | "types", under TYPE_CHECKING

    def __str__(self) -> str:
        return f"{self.source.relative_to(ROOT.parent)}:{self.line} imports {self.module}"


def parts(module: str) -> str:
    """The layer of a module: `mmalign.text.logps` is text."""
    pieces = module.split(".")
    return pieces[1] if len(pieces) > 1 else "mmalign"


def module_of(path: Path) -> str:
    pieces = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(pieces[:-1] if pieces[-1] == "__init__" else pieces)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _walk(node: ast.AST, path: Path, when: str) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(path, child.lineno, alias.name, when)
        elif isinstance(child, ast.ImportFrom):
            base = "." * child.level + (child.module or "")
            for alias in child.names:
                name = f"{base}.{alias.name}"
                yield Import(path, child.lineno, name if _is_module(name) else base, when)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _walk(child, path, "later" if when == "loading" else when)
        elif isinstance(child, ast.expr):
            continue
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from _walk(child, path, "types")
        else:
            yield from _walk(child, path, when)


@cache
def _is_module(name: str) -> bool:
    path = ROOT.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


@cache
def imports() -> tuple[Import, ...]:
    found: list[Import] = []
    for path in sorted(ROOT.rglob("*.py")):
        found += _walk(tree(path), path, "loading")
    return tuple(found)


def ours(item: Import) -> bool:
    return item.module.split(".")[0] == "mmalign" and item.module != "mmalign"


def layer(item: Import) -> str:
    return parts(module_of(item.source))


def test_the_reader_sees_imports_of_every_kind() -> None:
    """A test of the test: an empty list would let everything pass."""
    assert {item.when for item in imports()} == {"loading", "later", "types"}
    assert any(layer(i) == "core" and i.module == "mmalign.errors" for i in imports())
    assert any(layer(i) == "text" and i.module.startswith("mmalign.core") for i in imports())


def test_imports_are_absolute() -> None:
    assert [str(item) for item in imports() if item.module.startswith(".")] == []


@pytest.mark.parametrize("name", ALLOWED)
def test_layers_know_only_what_is_below(name: str) -> None:
    allowed = ALLOWED[name] | {name}
    wrong = []
    for item in imports():
        if layer(item) != name or not ours(item):
            continue
        more = FOR_TYPES - {name} if item.when == "types" else set()
        if name in ("core", "errors"):
            more = set()
        if parts(item.module) not in allowed | more:
            wrong.append(str(item))
    assert wrong == []


@pytest.mark.parametrize("name", ["train", "evaluate", "models", "core", "data"])
def test_lower_layers_never_name_a_modality_package(name: str) -> None:
    """Not even for types, and not by comparing `modality`."""
    found = [i for i in imports() if layer(i) == name and ours(i)]
    assert [str(i) for i in found if parts(i.module) in MODALITIES] == []
    folder = ROOT / name
    for path in (
        [ROOT / f"{name}.py"] if folder.with_suffix(".py").is_file() else folder.rglob("*.py")
    ):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq | ast.NotEq):
                assert "modality" not in ast.unparse(node.left), f"{path}:{node.lineno}"


def test_core_imports_torch_errors_and_the_standard_library_only() -> None:
    known = sys.stdlib_module_names | {"torch", "mmalign"}
    outside = [i for i in imports() if layer(i) == "core" and i.module.split(".")[0] not in known]
    assert [str(item) for item in outside] == []


def test_data_loads_numpy_and_the_standard_library_only() -> None:
    known = sys.stdlib_module_names | {"numpy", "mmalign"}
    outside = [
        item
        for item in imports()
        if layer(item) == "data"
        and item.when == "loading"
        and item.module.split(".")[0] not in known
    ]
    assert [str(item) for item in outside] == []


def test_heavy_libraries_load_where_they_are_needed() -> None:
    """Inside functions, or in the modules of models, modalities and training."""
    free = {"models", "train", "evaluate", *MODALITIES}
    early = [
        item
        for item in imports()
        if item.when == "loading" and item.module.split(".")[0] in HEAVY and layer(item) not in free
    ]
    assert [str(item) for item in early] == []


def test_no_module_loads_itself_through_others() -> None:
    graph: dict[str, set[str]] = {}
    for item in imports():
        if item.when == "loading" and ours(item):
            graph.setdefault(module_of(item.source), set()).add(item.module)
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail[trail.index(module) :], module))
        if module not in done:
            for other in graph.get(module, ()):
                visit(other, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def loaded_by(statement: str) -> set[str]:
    code = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


def test_importing_the_package_or_the_command_line_loads_nothing_heavy() -> None:
    loaded = loaded_by("import mmalign, mmalign.cli, mmalign.config, mmalign.data")
    assert not loaded & (HEAVY | {"torch"})


def test_importing_the_core_loads_torch_and_nothing_heavier() -> None:
    loaded = loaded_by("import mmalign.core")
    assert "torch" in loaded
    assert not loaded & (HEAVY | {"pydantic", "yaml", "typer", "rich"})
