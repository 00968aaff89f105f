"""Thoughts of answers: the tags around them, and where a template opens, closes or drops them."""

from __future__ import annotations

import re
from dataclasses import dataclass

PAIRS = {
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<thought>": "</thought>",
    "<longcat_think>": "</longcat_think>",
    "<|begin_of_thought|>": "<|end_of_thought|>",
    "◁think▷": "◁/think▷",
    "<seed:think>": "</seed:think>",
    "<mm:think>": "</mm:think>",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "<|inner_prefix|>": "<|inner_suffix|>",
    "<|channel>thought": "<channel|>",
    "[THINK]": "[/THINK]",
}
"""Tags that open a thought, and those that close it."""

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys of a message under which records give its thought."""

SWITCHES = ("enable_thinking", "thinking")
"""Keywords with which templates open thoughts or leave them out."""

_OPEN = "|".join(map(re.escape, PAIRS))
_CLOSE = "|".join(map(re.escape, PAIRS.values()))
_OPENED = re.compile(rf"({_OPEN})(\s*)\Z")
_CLOSED = re.compile(rf"(?:{_CLOSE})\s*\Z")
_TAGS = re.compile(rf"(?:(?:{_OPEN})\s*)?(?:(?:{_CLOSE})\s*)?\Z")
_CLOSE_FIRST = re.compile(rf"\s*(?:{_CLOSE})")
_EMPTY = re.compile(rf"({_OPEN})(\s*)({_CLOSE})")


@dataclass(frozen=True, slots=True)
class Opener:
    """The tag with which a context opens a thought."""

    tag: str
    space: str  # what follows it in the context

    @property
    def close(self) -> str:
        """The tag that closes the thought."""
        return PAIRS[self.tag]

    @property
    def empty(self) -> str:
        """What closes the thought at once, as DeepSeek-R1's card writes it: <think>, </think>."""
        return f"\n{self.close}\n\n" if self.space else self.close


def opener(context: str) -> Opener | None:
    """How a context that ends in an opened thought opens it."""
    found = _OPENED.search(context[-64:])
    return Opener(found[1], found[2]) if found else None


def is_closed(context: str) -> bool:
    """Whether a context ends in a thought that is closed already."""
    return _CLOSED.search(context[-64:]) is not None


def stem(context: str) -> str:
    """A context without the tags of a thought that it ends in, opened or closed."""
    found = _TAGS.search(context, max(len(context) - 64, 0))
    return context if found is None else context[: found.start()]


def without_close(body: str) -> str:
    """A body without the tag that it begins with, which closes what the context has closed."""
    found = _CLOSE_FIRST.match(body)
    return body if found is None else body[found.end() :]


def split(text: str, opened: Opener | None) -> tuple[str | None, str]:
    """The thought that an answer's text starts with, None where it has none, and the words after.

    Args:
        text: The content of an answer.
        opened: How its context opens a thought; the text may leave that tag out.
    """
    start = text.lstrip()
    for tag, close in PAIRS.items():
        if start.startswith(tag) and close in start:
            thought, _, words = start[len(tag) :].partition(close)
            return thought, words
    if opened is not None and opened.close in text:
        thought, _, words = text.partition(opened.close)
        return thought, words
    return None, text


def is_unfinished(text: str) -> bool:
    """Whether an answer's text opens a thought and never closes it: it was cut, or ran on."""
    start = text.lstrip()
    return any(start.startswith(tag) and close not in start for tag, close in PAIRS.items())


def begins_empty(body: str) -> bool:
    """Whether a template put an empty thought in front of an answer."""
    return _EMPTY.match(body.lstrip()) is not None


def as_generated(text: str, opened: Opener) -> str:
    """What of an answer's text, thought and all, follows a context that opens the thought."""
    start = text.lstrip()
    if not start.startswith(opened.tag):
        return text
    return start[len(opened.tag) :].removeprefix(opened.space)


def other_tag(text: str, opened: Opener) -> bool:
    """Whether an answer's text opens its thought with another tag than its context."""
    start = text.lstrip()
    return start.startswith(tuple(PAIRS)) and not start.startswith(opened.tag)


def written(thought: str, words: str, opened: Opener) -> str:
    """A thought given beside the answer, as what follows a context that opens it."""
    if "\n" not in opened.space:
        return f"{thought}{opened.close}{words}"
    return f"{thought.strip(chr(10))}\n{opened.close}\n\n{words.lstrip(chr(10))}"


def filled(body: str, thought: str) -> str | None:
    """The body with the thought put between its empty tags; None where it has none."""
    found = _EMPTY.search(body)
    if found is None:
        return None
    inner = f"\n{thought.strip(chr(10))}\n" if "\n" in found[2] else thought
    return body[: found.start()] + found[1] + inner + found[3] + body[found.end() :]


def follows(body: str, thought: str, words: str, opened: Opener | None) -> bool:
    """Whether a body says the thought, at once where the context has opened it, and the words."""
    if opened is not None:
        start = "".join(as_generated(body, opened).split())
        if not start.startswith("".join(thought.split())) or opened.close not in body:
            return False
    return holds(body, thought) and holds(body, words)


def holds(body: str, text: str) -> bool:
    """Whether a text stands in a body, whatever the template does to white space."""
    return text.strip() in body or "".join(text.split()) in "".join(body.split())
