"""Docstrings name what is there: every entry of `Args` is a parameter, of `Attributes` a field."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import mmalign

ROOT = Path(mmalign.__file__).parent
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def entries(docstring: str, title: str) -> list[str]:
    """Names of a section: `a: ...`, and each of `a, b: ...`."""
    found = re.search(rf"^{title}:\n((?:[ ]+.*\n|\n)*)", docstring + "\n", re.MULTILINE)
    lines = [line for line in found[1].splitlines() if line.strip()] if found else []
    depth = min((len(line) - len(line.lstrip()) for line in lines), default=0)
    heads = [re.match(rf" {{{depth}}}(\*{{0,2}}\w+(?:, \*{{0,2}}\w+)*):(?: |$)", x) for x in lines]
    return [name.strip(" *") for head in heads if head for name in head[1].split(",")]


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    given = function.args
    single = [item for item in (given.vararg, given.kwarg) if item]
    return {i.arg for i in (*given.posonlyargs, *given.args, *given.kwonlyargs, *single)}


def members(cls: ast.ClassDef) -> set[str]:
    """Fields, properties, methods, parameters, and what methods set on `self` or `cls`."""
    found: set[str] = set()
    for node in ast.walk(cls):
        if isinstance(node, ast.FunctionDef):
            found |= {node.name} | parameters(node)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return found


def unknown(tree: ast.Module) -> Iterator[str]:
    classes = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    for node in ast.walk(tree):
        if not isinstance(node, Definition):
            continue
        text = ast.get_docstring(node) or ""
        if isinstance(node, ast.ClassDef):
            bases = [
                classes[b.id] for b in node.bases if isinstance(b, ast.Name) and b.id in classes
            ]
            known = members(node).union(*map(members, bases))
            named = entries(text, "Attributes") + entries(text, "Args")
        else:
            known, named = parameters(node), entries(text, "Args")
        yield from (f"{node.lineno} {node.name}: {name}" for name in named if name not in known)


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_what_docstrings_name_is_there(file: Path) -> None:
    assert list(unknown(ast.parse(file.read_text(encoding="utf-8")))) == []


def test_other_names_are_found() -> None:
    """A test of the test."""
    source = '''
def paint(picture, *rest):
    """Paint.

    Args:
        image: What to paint.
        rest: More:
            and more.
    """

class Frame:
    """A frame.

    Attributes:
        wide, high: In pixels.
    """

    wide: int
'''
    assert list(unknown(ast.parse(source))) == ["2 paint: image", "11 Frame: high"]
