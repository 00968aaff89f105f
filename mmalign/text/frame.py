"""What a chat template writes around any response, and around its thoughts."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mmalign.data.example import Template
from mmalign.errors import ConfigError, DataError
from mmalign.text.tokenizer import JinjaTemplate

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
    """The thought that a response's text starts with, None where it has none, and the words after.

    Args:
        text: The content of a response.
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
    """Whether a response's text opens a thought and never closes it: it was cut, or ran on."""
    start = text.lstrip()
    return any(start.startswith(tag) and close not in start for tag, close in PAIRS.items())


def begins_empty(body: str) -> bool:
    """Whether a template put an empty thought in front of a response."""
    return _EMPTY.match(body.lstrip()) is not None


def as_generated(text: str, opened: Opener) -> str:
    """What of a response's text, thought and all, follows a context that opens the thought."""
    start = text.lstrip()
    if not start.startswith(opened.tag):
        return text
    return start[len(opened.tag) :].removeprefix(opened.space)


def other_tag(text: str, opened: Opener) -> bool:
    """Whether a response's text opens its thought with another tag than its context."""
    start = text.lstrip()
    return start.startswith(tuple(PAIRS)) and not start.startswith(opened.tag)


def written(thought: str, words: str, opened: Opener) -> str:
    """A thought given beside the response, as what follows a context that opens it."""
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


ASKED = "mmalign\u2063asked"  # stands for a user's words when a template is probed
MARK = "mmalign\u2063answer"  # stands for the response; neither is ever tokenized
_TAG_BEGUN = re.compile(r"(?:<[^<>\s]*|\[[A-Z_/]*)\Z")


class Ends:
    """The tokens of a tokenizer that can end a turn.

    Attributes:
        eos: The tokenizer's end token; None where it has none.
    """

    def __init__(self, tokenizer: Any, stops: Callable[[], Collection[int]]) -> None:
        """Special tokens and eos; `stops` reads the model's own settings when they are needed."""
        added: Any = tokenizer.added_tokens_decoder.values()
        texts: set[str] = {token.content for token in added if token.special}
        self.eos: str | None = tokenizer.eos_token
        if self.eos:
            texts.add(self.eos)
        self._read_stops = stops
        self._id = tokenizer.convert_tokens_to_ids
        special = "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True))
        self._special = re.compile(special or "(?!)")

    @cached_property
    def stops(self) -> frozenset[int]:
        """Ids at which the model's own settings say that generation stops."""
        return frozenset(self._read_stops())

    def cut(self, text: str) -> str | None:
        """The text up to its eos, else up to its last special token; None where it has none."""
        if self.eos and self.eos in text:
            return text[: text.index(self.eos) + len(self.eos)]
        ends = [found.end() for found in self._special.finditer(text)]
        return text[: ends[-1]] if ends else None

    def first(self, text: str) -> str | None:
        """The text up to its first special token; None where it has none."""
        found = self._special.search(text)
        return None if found is None else text[: found.end()]

    def stop_in(self, text: str) -> str | None:
        """The same, where the model's settings say that generation stops there."""
        first = self._special.search(text)
        if first is None or self._id(first[0]) not in self.stops:
            return None
        return text[: first.end()]

    def after(self, text: str) -> tuple[str, str]:
        """What stands before the special tokens at the end of a text, and those up to the eos."""
        start, end = len(text), 0
        for found in self._special.finditer(text):
            if not end or text[end : found.start()].strip():
                start = found.start()
            end = found.end()
        if text[end:].strip():
            return text, ""
        return text[:start], self.cut(text[start:]) or ""


@dataclass(frozen=True, slots=True)
class Frame:
    """What stands around a response to one user turn."""

    extra: str  # what the generation prompt alone writes before the response, e.g. <think>
    lead: str  # what the answered conversation alone writes there
    header: str  # the assistant's header, as both write it
    tail: str  # all that follows the last response
    end: str  # the part of it that is scored; the next turn's opening where that ends responses
    between: str  # the end of a response that is not the last
    with_eos: bool  # whether the eos follows, which the template does not write
    unasked: str  # the assistant's header, where the generation prompt lacks it
    closing: str | None  # how the template closes an opened thought at once; None: it shows not


def find(template: JinjaTemplate, row: Template, ends: Ends, said: Callable[[str], Any]) -> Frame:
    """Probe a template under the keywords and tools of a row.

    Args:
        template: To render with.
        row: Its tools and keywords.
        ends: Of the tokenizer.
        said: A text as the content of a message.

    Raises:
        ConfigError: The template cannot render a question and its response.
    """
    asked = [{"role": "user", "content": said(ASKED)}]
    answered = [*asked, {"role": "assistant", "content": said(MARK)}]
    where = "chat template"
    try:
        context = template.render(asked, row, where, ask=True)
        full = template.render(answered, row, where)
        bare = template.render(asked, row, where)
    except DataError as error:
        raise ConfigError(str(error)) from error
    before, found, tail = full.partition(MARK)
    if not found:
        raise ConfigError("the chat template drops the assistant's text")
    given, own = after_words(context, ASKED), after_words(before, ASKED)
    if given is None or own is None:
        raise ConfigError("the chat template drops the user's text")
    length = shared(given, own)
    extra, lead = given[length:], own[length:]
    prompt = context[len(bare) :] if context.startswith(bare) else given
    followed = _followed(template, answered, row, said)
    end, with_eos, between = _end(tail, followed, bare.partition(ASKED)[0], ends)
    return Frame(
        extra=extra,
        lead=lead,
        header=prompt[: len(prompt) - len(extra)] if extra else prompt,
        tail=tail,
        end=end,
        between=between,
        with_eos=with_eos,
        unasked=lead if context == bare and lead.strip() else "",
        closing=_closing(template, asked, row, context),
    )


def shared(first: str, second: str) -> int:
    """The length of what two texts start with alike, where no tag is cut in two."""
    length = alike(first, second)
    if length == len(first) or length == len(second):
        return length
    begun = _TAG_BEGUN.search(first[:length])
    return length if begun is None else begun.start()


def alike(first: Sequence[object], second: Sequence[object]) -> int:
    """The length of what two sequences start with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def after_words(text: str, words: str) -> str | None:
    """What follows the last place of some words; None where they are not there."""
    place = text.rfind(words) if words else -1
    return None if place < 0 else text[place + len(words) :]


def _followed(
    template: JinjaTemplate, answered: Sequence[dict[str, Any]], row: Template, said: Any
) -> str:
    """What stands between a response and the words of the user turn after it."""
    again = "mmalign\u2063again"
    turns = [*answered, {"role": "user", "content": said(again)}]
    try:
        text = template.render(turns, row, "chat template", ask=True)
    except DataError:  # a template of one question and one response
        return ""
    _, found, rest = text.partition(MARK)
    return rest.partition(again)[0] if found and again in rest else ""


def _end(tail: str, followed: str, start: str, ends: Ends) -> tuple[str, bool, str]:
    """What is scored after the last response, whether the eos follows, and the end of earlier ones.

    `followed` stands between a response and the words of the user turn after it, `start` before
    the words of the first one.
    """
    if (end := ends.cut(tail[: shared(tail, followed)])) is not None:
        return end, False, end
    if (end := ends.cut(tail)) is not None:  # gpt-oss: another token for the last response
        return end, False, ends.first(followed) or ""
    if (end := ends.cut(_before_opening(followed, start))) is not None:
        return end, False, end
    if (end := ends.stop_in(followed)) is not None:  # GLM: the opening of the next turn
        return end, False, end
    return tail.rstrip(), True, ""


def _before_opening(followed: str, start: str) -> str:
    """What precedes the opening of a user turn, which is what both texts end in, in whole tags."""
    place = len(followed) - alike(followed[::-1], start[::-1])
    begun = _TAG_BEGUN.search(followed[:place])
    if begun is not None:
        rest = re.compile(r"[^>\]]*[>\]]").match(followed, place)
        place = place if rest is None else rest.end()
    return followed[:place]


def _closing(
    template: JinjaTemplate, asked: Sequence[dict[str, Any]], row: Template, context: str
) -> str | None:
    """How the generation prompt with thoughts switched off closes what `context` opens."""
    opened = opener(context)
    if opened is None:
        return None
    for name in SWITCHES:
        if name not in template.reads or name in template.keywords(row, "chat template"):
            continue
        try:
            off = template.without(name).render(asked, row, "chat template", ask=True)
        except DataError:
            continue
        for start in (context, context.removesuffix(opened.space)):
            if off.startswith(start) and opened.close in off[len(start) :]:
                return off[len(start) :]
        before = context[: len(context) - len(opened.tag + opened.space)]
        if off.startswith(before + opened.close):
            return off[len(before) :]
    return None
