"""Pieces of a report page: tables, figures, notes, and texts side by side with marks in them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from markupsafe import Markup, escape

from mmalign.data.words import opcodes
from mmalign.report.run import is_number

MISSING = "–"


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page. `html` made by the functions of this module; plain text is escaped."""

    title: str
    html: Markup | str


@dataclass(frozen=True, slots=True)
class Answers:
    """The responses to one prompt, in the order in which they stand side by side."""

    prompt: str
    responses: Mapping[str, str]  # column label, e.g. before or after, to text
    marks: Mapping[str, Sequence[str]] = field(
        default_factory=dict
    )  # column label to small remarks


def number(value: object) -> str:
    """A number with four significant digits; anything else as text."""
    if not is_number(value) or not isinstance(value, int | float):
        return MISSING if value is None or isinstance(value, float) else str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{value:,.0f}"
    if not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    decimals = max(0, 3 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def paragraph(text: str | Markup) -> Markup:
    """One paragraph; `words` between backticks are set as code."""
    return Markup("<p>{}</p>").format(_inline(text))


def bullets(texts: Iterable[str]) -> Markup:
    """A list; code in its items as in a paragraph."""
    items = (Markup("<li>{}</li>").format(_inline(text)) for text in texts)
    return Markup("<ul>{}</ul>").format(Markup().join(items))


def note(text: str | Markup, kind: Literal["info", "warning"] = "info") -> Markup:
    """A framed remark."""
    word = "Note" if kind == "info" else "Warning"
    return Markup('<p class="note {}"><strong>{}.</strong> {}</p>').format(
        kind, word, _inline(text)
    )


def figure(svg: Markup, caption: str, remark: str = "") -> Markup:
    """A drawing under its caption."""
    small = Markup('<p class="remark">{}</p>').format(remark) if remark else Markup()
    return Markup("<figure><figcaption>{}</figcaption>{}{}</figure>").format(caption, svg, small)


def figures(items: Sequence[Markup]) -> Markup:
    """Several figures, two in a row where the screen is wide enough."""
    return Markup('<div class="figures">{}</div>').format(Markup().join(items))


def table(header: Sequence[str], rows: Sequence[Sequence[object]], caption: str = "") -> Markup:
    """A table whose first column names the row. Columns with plain text are left-aligned."""
    is_text = [any(_is_text(row[i]) for row in rows) for i in range(len(header))]
    head = Markup().join(
        Markup('<th scope="col"{}>{}</th>').format(_align(text), cell)
        for cell, text in zip(header, is_text, strict=True)
    )
    body = Markup().join(
        Markup('<tr><th scope="row">{}</th>{}</tr>').format(
            _shown(row[0]),
            Markup().join(
                Markup("<td{}>{}</td>").format(_align(text), _shown(cell))
                for cell, text in zip(row[1:], is_text[1:], strict=True)
            ),
        )
        for row in rows
    )
    title = Markup('<p class="remark">{}</p>').format(caption) if caption else Markup()
    return title + Markup(
        '<div class="scroll"><table><thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>'
    ).format(head, body)


def side_by_side(rows: Sequence[Answers]) -> Markup:
    """Responses to the same prompts next to each other, below each other on a narrow screen."""
    return Markup().join(
        article(prompt(row.prompt), columns(row.responses, row.marks)) for row in rows
    )


def columns(texts: Mapping[str, str], remarks: Mapping[str, Sequence[str]] | None = None) -> Markup:
    """Texts next to each other under their labels; `Markup` among them is kept."""
    cells: list[Markup] = []
    for label, text in texts.items():
        plain = text.striptags() if isinstance(text, Markup) else text
        words = len(plain.split())
        small = [f"{words} word{'' if words == 1 else 's'}", *(remarks or {}).get(label, ())]
        shown = escape(text) if text.strip() else Markup("<em>(empty)</em>")
        cells.append(
            Markup('<div class="answer"><h4>{} <small>{}</small></h4><p>{}</p></div>').format(
                label, " · ".join(small), shown
            )
        )
    return Markup('<div class="columns">{}</div>').format(Markup().join(cells))


def glossary(terms: Mapping[str, str]) -> Markup:
    """Terms, each with its text behind it."""
    items = (Markup("<dt>{}</dt><dd>{}</dd>").format(*item) for item in terms.items())
    return Markup('<dl class="terms">{}</dl>').format(Markup().join(items))


def article(*parts: Markup) -> Markup:
    """What belongs to one prompt, in a frame."""
    return Markup('<article class="answers">{}</article>').format(Markup().join(parts))


def prompt(text: object) -> Markup:
    """A prompt, above what belongs to it."""
    return Markup('<p class="prompt">{}</p>').format(text)


def folded(summary: str, content: Markup) -> Markup:
    """Content that opens on a click."""
    return Markup("<details><summary>{}</summary>{}</details>").format(summary, content)


def preformatted(text: str) -> Markup:
    """Text as it is, in a fixed-width font."""
    return Markup("<pre>{}</pre>").format(text)


def _inline(text: str | Markup) -> Markup:
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _is_text(value: object) -> bool:
    if not isinstance(value, str) or isinstance(value, Markup):
        return False
    return value != MISSING and not re.fullmatch(r"[-+−]?[\d.,]+ ?%?", value)


def _align(text: bool) -> Markup:
    return Markup(' class="text"') if text else Markup()


def _shown(value: object) -> object:
    return value if isinstance(value, str) else number(value)


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
