"""Every regular expression of the package takes time in proportion to the text, whatever it says.

Texts come from models and from strangers' files; one of a hundred thousand characters is ordinary.
"""

from __future__ import annotations

import ast
import re
import re._parser as parser  # the one reader of patterns there is
import time
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import mmalign
from mmalign.data.doubts import bare
from mmalign.data.media_layouts import read_cat
from mmalign.pairs.judge import options_of
from mmalign.text.masks import mark_steps
from mmalign.video.candidates import allowed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Parts = tuple[str, str, str]  # a beginning, what repeats, an end

ROOT = Path(mmalign.__file__).parent
METHODS = {"search", "match", "fullmatch", "finditer", "findall", "sub", "split"}
SHORT, LONG = 2000, 16_000  # characters
SLOW = 0.004  # seconds for a short text, of which a pattern in proportion to it takes a hundredth
CHARACTERS = "aAz1 \n\t()[]<>{}'\"*_`#.,!?-=\\/|:;~\u4e00\u0300"


def used_in(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Names of patterns, or constant patterns themselves, and the methods they are used with."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or node.attr not in METHODS:
            continue
        if isinstance(node.value, ast.Name) and node.value.id != "re":
            yield node.value.id, node.attr
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("re."):
            first = node.args[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield first.value, ast.unparse(node.func)[3:]


def patterns() -> dict[str, tuple[re.Pattern[str], str]]:
    """Every pattern with a method that it is used with, by where it stands."""
    found: dict[str, tuple[re.Pattern[str], str]] = {}
    for file in sorted(ROOT.rglob("*.py")):
        name = ".".join(("mmalign", *file.relative_to(ROOT).with_suffix("").parts))
        source = file.read_text(encoding="utf-8")
        if "import re\n" not in source or file.name == "__main__.py":
            continue
        module = import_module(name.removesuffix(".__init__"))
        uses = set(used_in(ast.parse(source)))
        for text, method in uses:
            if method in METHODS and not text.isidentifier():
                found[f"{name}: {text} {method}"] = re.compile(text), method
        for key, value in vars(module).items():
            if isinstance(value, re.Pattern) and isinstance(value.pattern, str):
                methods = {method for text, method in uses if text == key} or {"search"}
                found |= {f"{name}.{key} {method}": (value, method) for method in methods}
    return found


def words_of(pattern: re.Pattern[str]) -> set[str]:
    """Runs of letters that a pattern looks for."""
    words: set[str] = set()

    def walk(items: Any) -> None:
        run = ""
        for item in items:
            if isinstance(item, tuple) and item[0] is parser.LITERAL:
                run += chr(item[1])
                continue
            words.add(run)
            run = ""
            for part in item if isinstance(item, tuple | list) else ():
                if isinstance(part, tuple | list | parser.SubPattern):
                    walk(part)
        words.add(run)

    walk(parser.parse(pattern.pattern, pattern.flags & ~re.UNICODE & ~re.DEBUG))
    return {word for word in words if len(word) > 1}


def parts_of_texts(pattern: re.Pattern[str]) -> Iterator[Parts]:
    """What makes patterns go back and forth: runs, runs behind a beginning, many beginnings."""
    words = sorted(words_of(pattern))[:4]
    units = [*CHARACTERS, "a ", "a.", "1.", "_a", "ab-", "(A) ", "(A)", "<a", "['", '"a" :']
    units += [*words, *(f"{word} " for word in words)]
    yield from product(("", "a"), units, ("\0", "a"))
    yield from product(("(A) a", *words[:2]), units, ("\0",))


def seconds(call: Callable[[str], object], parts: Parts, length: int) -> float:
    begin, unit, end = parts
    text = begin + unit * (length // len(unit)) + end
    before = time.process_time()
    call(text)
    return time.process_time() - before


def is_steep(call: Callable[[str], object], parts: Parts) -> bool:
    """Whether eight times the text takes far more than eight times the time."""
    if seconds(call, parts, SHORT) < SLOW:
        return False
    one, eight = (min(seconds(call, parts, n) for _ in range(3)) for n in (SHORT, LONG))
    return eight > 10 * SLOW and eight > 24 * one


def called(pattern: re.Pattern[str], method: str) -> Callable[[str], object]:
    if method == "sub":
        return lambda text: pattern.sub("", text)
    if method == "finditer":
        return lambda text: list(pattern.finditer(text))
    return getattr(pattern, method)


PARTS = 16  # of the patterns: half a second each is too much for all of them in the default run


@pytest.mark.parametrize(
    "part", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, PARTS))]
)
def test_patterns_take_time_in_proportion(part: int) -> None:
    found = patterns()
    assert len(found) > 5 * PARTS
    for place in sorted(found)[part::PARTS]:
        call = called(*found[place])
        for parts in parts_of_texts(found[place][0]):
            assert not is_steep(call, parts), (place, parts)


READERS: dict[str, tuple[Callable[[str], object], str, str, str]] = {
    "options in a line": (options_of, "(A) a", " ", "b"),
    "options parted by marks": (options_of, "(A) a", " ,;", "b"),
    "many options": (options_of, "", "(A)", ""),
    "lines as steps": (lambda text: mark_steps([(0, 1)], [], text), "", "\n", ""),
    "marks within a word": (bare, "a", "_", "b"),
    "marks of several kinds": (bare, "a", "_*", "b"),
    "blanks before a mark of a clip": (
        lambda text: read_cat({"conversations": [{"from": "human", "value": text},
                                                 {"from": "gpt", "value": "a"}]}), "a", " ", "b"),
    "sentences about doing": (
        lambda text: allowed(["reverse"], text, hints=True, uses_audio=False, num_frames=2),
        "", "does ", ""),
}  # fmt: skip


@pytest.mark.parametrize("kind", READERS)
def test_a_reader_takes_time_in_proportion(kind: str) -> None:
    read, *parts = READERS[kind]
    assert not is_steep(read, (parts[0], parts[1], parts[2]))
