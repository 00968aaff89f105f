"""Marks within texts: spans, and the words in which two texts differ."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from mmalign.data.words import opcodes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_ALIKE = 0.25
"""Share of equal words below which marks would cover almost everything."""


def marked(text: str, spans: Iterable[Sequence[Any]]) -> Markup:
    """The text with its character ranges [start, end) marked; overlapping ones become one."""
    pieces: list[Markup] = []
    done = 0
    for start, end in sorted((int(span[0]), int(span[1])) for span in spans):
        start, end = max(start, done), min(end, len(text))
        if start < end:
            pieces += [escape(text[done:start]), _mark(text[start:end])]
            done = end
    return Markup().join([*pieces, escape(text[done:])])


def changed(before: str, after: str) -> tuple[Markup, Markup, str]:
    """Both texts with the words marked that the other has not, and a remark on the two."""
    if before == after:
        return escape(before), escape(after), "unchanged"
    old, new = (re.findall(r"\s*\S+|\s+$", text) for text in (before, after))
    told = list(opcodes([word.strip() for word in old], [word.strip() for word in new]))
    equal = sum(k - i for what, i, k, _, _ in told if what == "equal")
    if 2 * equal < _ALIKE * (len(old) + len(new)):
        return escape(before), escape(after), "other words throughout"
    sides: tuple[list[Markup], list[Markup]] = [], []
    for kind, i, j, k, m in told:
        for side, words in zip(sides, ("".join(old[i:j]), "".join(new[k:m])), strict=True):
            side.append(escape(words) if kind == "equal" or not words.strip() else _mark(words))
    return Markup().join(sides[0]), Markup().join(sides[1]), ""


def _mark(text: str) -> Markup:
    """Space at either end stays outside of the mark."""
    bare = text.strip()
    front, back = text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]
    return Markup("{}<mark>{}</mark>{}").format(front, bare, back)
