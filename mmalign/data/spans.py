"""Spans written as tags around words: `The <MASK> red </MASK> disc.`"""

from __future__ import annotations

import re

OPEN, CLOSE = "<MASK>", "</MASK>"
_TAG = re.compile(r" ?</?MASK> ?")


def untag(tagged: str, plain: str | None = None) -> tuple[str, tuple[tuple[int, int], ...]]:
    """The text without its tags, and the character range of each span in it.

    A tag may stand apart (`a <MASK> b </MASK> c`) or close (`a <MASK>b</MASK> c`). Spaces around a
    tag are the tag's or the text's: given `plain`, as many are kept as it has there; without, one
    where the tag stood between two words.

    Args:
        tagged: The text with tags; a tag that is not closed reaches to the end.
        plain: The same text without, where it is known.

    Returns:
        The text, which equals `plain` where the two agree, and spans [start, end), none empty.

    Source: the tag route of RRPO's data, Sarkar et al. 2025, arXiv:2504.12083, released code.
    Departs: characters in place of token ids, so no second tokenizer is needed and what a token
        merges across a tag cannot lose a span.
    """
    text = ""
    marks: list[tuple[int, bool]] = []  # place in `text`, whether it opens
    last = 0
    for match in _TAG.finditer(tagged):
        text += tagged[last : match.start()]
        tag = match[0]
        opens = not tag.strip().startswith("</")
        before, after = tag.startswith(" "), tag.endswith(" ")
        space = _spaces(text, plain, tagged[match.end() :], before, after)
        if opens:
            text += space
            marks.append((len(text), True))
        else:
            marks.append((len(text), False))
            text += space
        last = match.end()
    text += tagged[last:]
    spans: list[tuple[int, int]] = []
    start: int | None = None
    for place, opens in marks:
        if opens and start is None:
            start = place
        elif not opens and start is not None:
            spans.append((start, place))
            start = None
    if start is not None:
        spans.append((start, len(text)))
    return text, tuple((a, b) for a, b in spans if a < b)


def _spaces(text: str, plain: str | None, rest: str, before: bool, after: bool) -> str:
    """What stays of the spaces around a tag."""
    most = " " * (before + after)
    if plain is not None and plain.startswith(text):
        behind = plain[len(text) :]
        found = len(behind) - len(behind.lstrip(" "))
        return " " * min(found, len(most)) if found <= len(most) else most
    if not most or text.endswith(" "):
        return ""
    joins = bool(text) and bool(_TAG.sub("", rest).strip())
    return " " if joins and _TAG.sub("", rest).lstrip()[:1] not in ".,;:!?" else ""
