"""Draw the rooms of the package and who imports whom: `python docs/rooms.py` writes docs/rooms.svg.

`--check` writes nothing and fails where the picture no longer shows the code. Imports inside
functions and for annotations count. An arrow is left out where a longer way says the same.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] / "mmalign"
FILE = Path(__file__).with_suffix(".svg")
WIDE, HIGH, GAP, FLOOR, EDGE = 104, 32, 28, 72, 20  # pixels

Graph = dict[str, set[str]]


def rooms() -> list[str]:
    """The folders and modules at the top of the package."""
    folders = (path.parent for path in ROOT.glob("*/__init__.py"))
    modules = (path for path in ROOT.glob("*.py") if not path.stem.startswith("__"))
    return sorted(path.stem for path in (*folders, *modules))


def imports(known: list[str]) -> Graph:
    """Which rooms each room imports, in any way."""
    graph: Graph = {name: set() for name in known}
    for path in sorted(ROOT.rglob("*.py")):
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            for package, other, *_ in (f"{name}.".split(".") for name in names):
                if package == ROOT.name and room in graph and other in graph and other != room:
                    graph[room].add(other)
    return graph


def reduced(graph: Graph) -> Graph:
    """The arrows that no longer way stands for."""

    def below(name: str) -> set[str]:
        return graph[name].union(*(below(other) for other in graph[name]))

    return {
        name: {o for o in others if not any(o in below(x) for x in others - {o})}
        for name, others in graph.items()
    }


def floors(graph: Graph) -> list[list[str]]:
    """Rooms from the ground up, each right above the highest room that it imports."""

    def height(name: str) -> int:
        return 1 + max(map(height, graph[name]), default=-1)

    found: list[list[str]] = [[] for _ in range(1 + max(map(height, graph)))]
    for name in graph:
        found[height(name)].append(name)
    return found


def drawn(graph: Graph) -> str:
    """The picture: an arrow points from a room to one that it imports."""
    levels = floors(graph)
    width = 2 * EDGE + max(len(level) * (WIDE + GAP) - GAP for level in levels)
    height = 2 * EDGE + len(levels) * FLOOR - (FLOOR - HIGH)
    places: dict[str, tuple[float, float]] = {}
    for number, level in enumerate(levels):
        # Beneath what it stands on, so that arrows run straight.
        level.sort(key=lambda name: (_middle(places, graph[name], width), name))
        start = (width - len(level) * (WIDE + GAP) + GAP) / 2
        for index, name in enumerate(level):
            y = height - EDGE - HIGH - number * FLOOR
            places[name] = (start + index * (WIDE + GAP), y)
    arrows = [
        _arrow(places[name], places[other])
        for name in places
        for other in sorted(graph[name], key=places.__getitem__)
    ]
    boxes = [
        f'<rect x="{x:g}" y="{y:g}" width="{WIDE}" height="{HIGH}" rx="6"/>'
        f'<text x="{x + WIDE / 2:g}" y="{y + HIGH / 2 + 5:g}">{name}</text>'
        for name, (x, y) in places.items()
    ]
    return "\n".join([_HEAD.format(width=width, height=height), *arrows, *boxes, "</svg>\n"])


def _middle(places: dict[str, tuple[float, float]], below: set[str], width: float) -> float:
    known = [places[name][0] for name in below]
    return sum(known) / len(known) if known else width / 2


def _arrow(start: tuple[float, float], end: tuple[float, float]) -> str:
    x1, y1, x2, y2 = start[0] + WIDE / 2, start[1] + HIGH, end[0] + WIDE / 2, end[1] - 5
    bend = (y2 - y1) / 2
    path = f"M{x1:g} {y1:g}C{x1:g} {y1 + bend:g} {x2:g} {y2 - bend:g} {x2:g} {y2:g}"
    return f'<path d="{path}" marker-end="url(#head)"/>'


_HEAD = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" \
width="{width:g}" height="{height:g}" role="img" aria-label="Rooms of mmalign and their imports">
<style>
rect {{ fill: #e8eef7; stroke: #4a6fa5 }}
text {{ font: 13px sans-serif; text-anchor: middle; fill: #1b2a41 }}
path {{ fill: none; stroke: #8a94a6; stroke-width: 1.2 }}
marker path {{ fill: #8a94a6; stroke: none }}
@media (prefers-color-scheme: dark) {{
  rect {{ fill: #22304a; stroke: #7fa3d9 }} text {{ fill: #e6ecf5 }}
}}
</style>
<defs><marker id="head" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="7" markerHeight="7" \
orient="auto"><path d="M0 0L8 4L0 8z"/></marker></defs>"""


def main() -> int:
    """Draw, or compare with what is drawn."""
    picture = drawn(reduced(imports(rooms())))
    if "--check" not in sys.argv[1:]:
        FILE.write_text(picture, encoding="utf-8")
        return 0
    if not FILE.is_file() or FILE.read_text(encoding="utf-8") != picture:
        print(f"{FILE} shows other rooms or arrows than the code has: python docs/rooms.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
