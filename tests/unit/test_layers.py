"""The import layers, read from the source: who may know whom, and what loads when."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

import mmalign

ROOT = Path(mmalign.__file__).resolve().parent
BASE = {"safe", "errors", "config", "core", "data"}
MODALITIES = {"text", "diffusion", "video"}
RUNS = BASE | {"models", "evaluate", "preflight", "train"}
ALLOWED: dict[str, set[str]] = {
    "moved": set(),
    "safe": set(),
    "errors": {"safe"},
    "stats": {"errors"},
    "config": {"moved", "safe", "errors"},
    "core": {"errors"},
    "data": {"safe", "errors", "config"},
    "models": BASE,
    "evaluate": BASE | {"models", "stats"},
    "preflight": BASE | {"models"},
    "bench": {"safe", "errors", "data", "stats"},
    "text": BASE | {"models"},
    "diffusion": BASE | {"models", "stats"},
    "video": BASE | {"models", "text"},
    "train": BASE | {"models", "evaluate", "preflight"},
    "inference": RUNS,
    "report": BASE | {"evaluate", "stats"},
    "pairs": RUNS | {"bench", "inference", "video"},
    "judging": RUNS | {"stats", "inference", "pairs", "diffusion"},
    "rounds": RUNS | {"inference", "judging", "stats"},
    "quickstart": RUNS | MODALITIES | {"inference", "report", "stats"},
    "cli": RUNS
    | MODALITIES
    | {"inference", "report", "bench", "pairs", "judging", "rounds", "quickstart"},
    "__main__": {"cli"},
}
"""The rooms, from the ground up, and what each may import: when it loads, later or for types."""

MOST_ROOMS = 22

FOR_TYPES: dict[str, set[str]] = {"data": {"config"}}
"""What a room may only name in annotations."""

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


def room(module: str) -> str:
    """The room of a module: `mmalign.text.logps` is in text."""
    pieces = module.split(".")
    return pieces[1] if len(pieces) > 1 else "mmalign"


@cache
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
        elif isinstance(child, ast.If) and _is_for_types(child.test):
            yield from _walk(child, path, "types")
        else:
            yield from _walk(child, path, when)


def _is_for_types(test: ast.expr) -> bool:
    """Whether it is `TYPE_CHECKING` or `typing.TYPE_CHECKING`, alone or among others."""
    names = (getattr(node, "id", getattr(node, "attr", "")) for node in ast.walk(test))
    return "TYPE_CHECKING" in names


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


def source_room(item: Import) -> str:
    return room(module_of(item.source))


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """A way through a graph that comes back to where it began; empty where there is none."""
    done: set[str] = set()

    def visit(node: str, trail: tuple[str, ...]) -> list[str]:
        if node in trail:
            return [*trail[trail.index(node) :], node]
        if node not in done:
            for other in sorted(graph.get(node, ())):
                found = visit(other, (*trail, node))
                if found:
                    return found
            done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := visit(node, ()))), [])


def test_the_reader_sees_imports_of_every_kind() -> None:
    """A test of the test: an empty list would let everything pass."""
    assert {item.when for item in imports()} == {"loading", "later", "types"}
    assert any(source_room(i) == "core" and i.module == "mmalign.errors" for i in imports())
    assert any(source_room(i) == "text" and i.module.startswith("mmalign.core") for i in imports())


def test_a_circle_is_found() -> None:
    """Another one: of graphs with and without a way back."""
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_imports_are_absolute() -> None:
    assert [str(item) for item in imports() if item.module.startswith(".")] == []


def test_every_room_is_listed_and_there_are_few() -> None:
    rooms = {module_of(path).split(".")[1] for path in ROOT.rglob("*.py") if path.parent != ROOT}
    rooms |= {path.stem for path in ROOT.glob("*.py")} - {"__init__"}
    assert rooms == set(ALLOWED)
    assert len(rooms - {"__main__"}) <= MOST_ROOMS


def test_rooms_are_listed_from_the_ground_up() -> None:
    """So that arrows between rooms point one way, whatever two rooms are asked."""
    below: set[str] = set()
    for name, allowed in ALLOWED.items():
        assert allowed <= below, f"{name} may import {sorted(allowed - below)} above it"
        below.add(name)


@pytest.mark.parametrize("name", ALLOWED)
def test_rooms_know_only_what_is_below(name: str) -> None:
    """Inside functions and for annotations too."""
    wrong: list[str] = []
    for item in imports():
        if source_room(item) != name or not ours(item) or room(item.module) == name:
            continue
        only_types = room(item.module) in FOR_TYPES.get(name, set()) and item.when != "types"
        if room(item.module) not in ALLOWED[name] or only_types:
            wrong.append(f"{item} ({item.when})")
    assert wrong == []


def test_no_module_comes_back_to_itself() -> None:
    """By imports of any kind: a reader follows those inside functions and for types too."""
    graph: dict[str, set[str]] = {}
    for item in imports():
        if ours(item) and item.module != module_of(item.source):
            graph.setdefault(module_of(item.source), set()).add(item.module)
    assert " -> ".join(circle(graph)) == ""


@pytest.mark.parametrize("name", ["train", "evaluate", "models", "core", "data"])
def test_lower_rooms_never_name_a_modality(name: str) -> None:
    """Not even by comparing `modality`."""
    assert not ALLOWED[name] & MODALITIES
    folder = ROOT / name
    for path in (
        [ROOT / f"{name}.py"] if folder.with_suffix(".py").is_file() else folder.rglob("*.py")
    ):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq | ast.NotEq):
                assert "modality" not in ast.unparse(node.left), f"{path}:{node.lineno}"


def test_core_imports_torch_errors_and_the_standard_library_only() -> None:
    known = sys.stdlib_module_names | {"torch", "mmalign"}
    outside = [
        item
        for item in imports()
        if source_room(item) == "core" and item.module.split(".")[0] not in known
    ]
    assert [str(item) for item in outside] == []


def test_data_loads_numpy_and_the_standard_library_only() -> None:
    known = sys.stdlib_module_names | {"numpy", "mmalign"}
    outside = [
        item
        for item in imports()
        if source_room(item) == "data"
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
        if item.when == "loading"
        and item.module.split(".")[0] in HEAVY
        and source_room(item) not in free
    ]
    assert [str(item) for item in early] == []


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
