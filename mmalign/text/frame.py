"""What a chat template writes around any answer, found by rendering one with marks in it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mmalign.errors import ConfigError, DataError
from mmalign.text import thoughts

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from mmalign.data.example import Template
    from mmalign.text.jinja import JinjaTemplate

ASKED = "mmalign\u2063asked"  # stands for a user's words when a template is probed
MARK = "mmalign\u2063answer"  # stands for the answer; neither is ever tokenised
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
    """What stands around an answer to one user turn."""

    extra: str  # what the generation prompt alone writes before the answer, e.g. <think>
    lead: str  # what the answered conversation alone writes there
    header: str  # the assistant's header, as both write it
    tail: str  # all that follows the last answer
    end: str  # the part of it that is scored; the next turn's opening where that ends answers
    between: str  # the end of an answer that is not the last
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
        ConfigError: The template cannot render a question and its answer.
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
    length = _alike(first, second)
    if length == len(first) or length == len(second):
        return length
    begun = _TAG_BEGUN.search(first[:length])
    return length if begun is None else begun.start()


def _alike(first: str, second: str) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def after_words(text: str, words: str) -> str | None:
    """What follows the last place of some words; None where they are not there."""
    place = text.rfind(words) if words else -1
    return None if place < 0 else text[place + len(words) :]


def _followed(
    template: JinjaTemplate, answered: Sequence[dict[str, Any]], row: Template, said: Any
) -> str:
    """What stands between an answer and the words of the user turn after it."""
    again = "mmalign\u2063again"
    turns = [*answered, {"role": "user", "content": said(again)}]
    try:
        text = template.render(turns, row, "chat template", ask=True)
    except DataError:  # a template of one question and one answer
        return ""
    _, found, rest = text.partition(MARK)
    return rest.partition(again)[0] if found and again in rest else ""


def _end(tail: str, followed: str, start: str, ends: Ends) -> tuple[str, bool, str]:
    """What is scored after the last answer, whether the eos follows, and the end of earlier ones.

    Args:
        tail: What the template writes after the last answer.
        followed: What it writes between an answer and the words of the next user turn.
        start: What it writes before the words of the first.
        ends: Of the tokenizer.
    """
    if (end := ends.cut(tail[: shared(tail, followed)])) is not None:
        return end, False, end
    if (end := ends.cut(tail)) is not None:  # gpt-oss: another token for the last answer
        return end, False, ends.first(followed) or ""
    if (end := ends.cut(_before_opening(followed, start))) is not None:
        return end, False, end
    if (end := ends.stop_in(followed)) is not None:  # GLM: the opening of the next turn
        return end, False, end
    return tail.rstrip(), True, ""


def _before_opening(followed: str, start: str) -> str:
    """What precedes the opening of a user turn, which is what both texts end in, in whole tags."""
    place = len(followed) - _alike(followed[::-1], start[::-1])
    begun = _TAG_BEGUN.search(followed[:place])
    if begun is not None:
        rest = re.compile(r"[^>\]]*[>\]]").match(followed, place)
        place = place if rest is None else rest.end()
    return followed[:place]


def _closing(
    template: JinjaTemplate, asked: Sequence[dict[str, Any]], row: Template, context: str
) -> str | None:
    """How the generation prompt with thoughts switched off closes what `context` opens."""
    opened = thoughts.opener(context)
    if opened is None:
        return None
    for name in thoughts.SWITCHES:
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
