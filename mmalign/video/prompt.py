"""Prompts that show and play: where their media stand, and how they become text."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mmalign.data.example import Asked, Message
from mmalign.errors import ConfigError, DataError
from mmalign.text.messages import PlainText
from mmalign.text.render import ChatTemplate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmalign.data.example import Media, Prompt

KINDS = ("video", "image", "audio")
MARK = re.compile(r"<(video|image|audio)>")
"""What stands in a prompt's text for a clip, a picture or a sound."""


def place(prompt: Prompt, media: Media, where: str) -> tuple[Message, ...]:
    """The conversation with a mark for every medium.

    A kind that the prompt does not name stands before the text of the first user turn.

    Raises:
        DataError: The prompt names more or fewer than there are.
    """
    turns = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    counts = {"video": media.videos, "image": media.images, "audio": media.sounds}
    named = Counter(mark for turn in turns for mark in MARK.findall(turn.content))
    front = ""
    for kind, items in counts.items():
        if named[kind] not in (0, len(items)):
            raise DataError(
                f"{where}: the prompt names <{kind}> {named[kind]} times, but the row has "
                f"{len(items)}; name each once, or none"
            )
        front += f"<{kind}>" * (len(items) - named[kind])
    if not front:
        return turns
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None:
        raise DataError(f"{where}: no user turn in the prompt that could show the media")
    shown = replace(turns[first], content=front + turns[first].content)
    return (*turns[:first], shown, *turns[first + 1 :])


def parts(content: str) -> list[dict[str, str]]:
    """A turn's text as the parts that chat templates of processors read."""
    found: list[dict[str, str]] = []
    for index, piece in enumerate(MARK.split(content)):
        if index % 2:
            found.append({"type": piece})
        elif piece.strip():
            # A line break between a mark and the words belongs to the template, not to the words.
            found.append({"type": "text", "text": piece.lstrip("\n") if index else piece})
    return found


class MediaTemplate(ChatTemplate):
    """The processor's chat template; turns are lists of parts."""

    def content(self, text: str) -> Any:
        """A turn's text as parts."""
        return parts(text)

    def said(self, answer: str) -> Any:
        """An answer as a part, whatever marks it holds."""
        return [{"type": "text", "text": answer}]

    def told(self, turns: Sequence[Message]) -> Sequence[Message]:
        """The turns without the marks, which become tokens of media."""
        return [replace(turn, content=MARK.sub(" ", turn.content)) for turn in turns]


class MarkedText(PlainText):
    """No template: marks become the tokens that the processor replaces."""

    def __init__(self, tokens: dict[str, str]) -> None:
        """`tokens` holds the processor's own token of each kind."""
        self.tokens = tokens

    def context(self, prompt: Prompt | Asked, where: str) -> str:
        """The prompt's text, or the transcript, with the processor's tokens."""
        turns = prompt.prompt if isinstance(prompt, Asked) else prompt
        if isinstance(turns, tuple) and len(turns) == 1 and turns[0].role == "user":
            text = turns[0].content
            prompt = Asked(text, prompt.template) if isinstance(prompt, Asked) else text
        return MARK.sub(lambda mark: self._token(mark[1], where), super().context(prompt, where))

    def _opens(self, prompt: Prompt | Asked, context: str) -> bool:
        return False  # the words of an answer stand as the record has them

    def _token(self, kind: str, where: str) -> str:
        if kind not in self.tokens:
            raise ConfigError(
                f"{where}: the prompt has <{kind}>, which the model's processor does not know; it "
                f"takes {', '.join(self.tokens) or 'text only'}"
            )
        return self.tokens[kind]
