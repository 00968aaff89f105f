"""Answers of several turns: what of the rendered conversation the assistant wrote."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmalign.errors import DataError
from mmalign.text import messages, thoughts
from mmalign.text.response import Response

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmalign.data.example import Message, Template
    from mmalign.text.render import ChatTemplate

    Range = tuple[int, int]


class Conversation:
    """A prompt and an answer of several turns, rendered whole.

    A turn's place is found by rendering what comes before it, as inference does. Where the whole
    conversation has that in another way (thoughts of earlier turns are left out), the turn is
    found by its words: what the whole has is what is scored.
    """

    def __init__(
        self,
        chat: ChatTemplate,
        prompt: Sequence[Message],
        answer: Sequence[Message],
        context: str,
        row: Template,
        where: str,
    ) -> None:
        """Render it.

        Args:
            chat: The template.
            prompt: Turns before the answer's.
            answer: The assistant's first turn, and all after it.
            context: Of the answer.
            row: Tools and keywords.
            where: The row, for errors.
        """
        last = max(i for i, turn in enumerate(answer) if turn.role == "assistant")
        self.chat, self.row, self.where = chat, row, where
        self.prompt, self.answer = tuple(prompt), tuple(answer[: last + 1])
        self.frame = chat.frame(row)
        self.full = chat.render([*self.prompt, *self.answer], row, where, ask=False)
        rest = chat.rest(self.full, context, prompt, answer[0], row, where)
        messages.require_told(chat.told(self.answer), rest, where)
        self.start = len(self.full) - len(rest)  # of the answer in the whole
        self.opened = thoughts.opener(context)

    def response(self, *, last: bool) -> Response:
        """What follows the context, of which the assistant's turns are scored, or the last one."""
        ranges = self._marked() if self.chat.template.marks_generation else None
        ranges = ranges or self._grown()
        body, end, with_eos = self.chat.split(
            self.full[self.start :], self.frame, calls="tool_calls" in self.answer[-1].extra
        )
        ranges[-1] = (ranges[-1][0], self.start + len(body) + len(end))
        opened, shift = self.opened, -self.start
        if opened is not None and body.startswith(opened.tag):
            shift -= len(body) - len(thoughts.as_generated(body, opened))
            body = thoughts.as_generated(body, opened)
        elif opened is not None and opened.close not in body[: self._words_at(body)]:
            closing = self.frame.closing or opened.empty
            shift += len(closing)
            body = closing + body
        scored = [(max(a + shift, 0), b + shift) for a, b in ranges]
        scored[0] = (0, scored[0][1])
        shown = scored[-1:] if last else scored
        return Response(self.answer[-1].content, body, end, None, with_eos, tuple(shown))

    def _words_at(self, body: str) -> int:
        words = self._words(self.answer[0])
        return body.find(words) if words in body else len(body)

    def _grown(self) -> list[Range]:
        """The ranges of the assistant's turns in the whole, by rendering what comes before each."""
        found: list[Range] = []
        cursor = self.start
        for index, turn in enumerate(self.answer):
            before = [*self.prompt, *self.answer[:index]]
            if turn.role != "assistant":
                continue
            first = self.start if index == 0 else self._begins(before, turn, cursor)
            cursor = self._ends([*before, turn], turn, first)
            found.append((first, cursor))
        return found

    def _begins(self, before: Sequence[Message], turn: Message, cursor: int) -> int:
        context = self.chat.render(before, self.row, self.where, ask=True)
        for text in (context, context.removesuffix(self.frame.extra)):
            if len(text) >= cursor and self.full.startswith(text):
                return len(text)
        place = self._found(turn, cursor)
        header = self.frame.header
        start = self.full.rfind(header, cursor, place) if header.strip() else -1
        return place if start < 0 else start + len(header)

    def _ends(self, turns: Sequence[Message], turn: Message, first: int) -> int:
        """Where a turn ends, its end token included."""
        own = self.chat.render(turns, self.row, self.where, ask=False)
        body, end, _ = self.chat.split(own, self.frame, calls="tool_calls" in turn.extra)
        stop = len(body)
        if stop < first or not self.full.startswith(body):
            stop = self._found(turn, first) + len(self._words(turn))
        for text in (end, self.frame.between):
            if text and self.full.startswith(text, stop):
                return stop + len(text)
        return stop

    def _found(self, turn: Message, cursor: int) -> int:
        words = self._words(turn)
        place = self.full.find(words, cursor) if words else -1
        if place < 0:
            raise DataError(
                f"{self.where}: the chat template rewrites the assistant's turn "
                f"{turn.content[:60]!r} within the conversation, so its tokens cannot be told from "
                "those of other turns; set text.train_on: last, or change the row"
            )
        return place

    def _words(self, turn: Message) -> str:
        return thoughts.split(turn.content, self.opened)[1].strip()

    def _marked(self) -> list[Range] | None:
        """The ranges that the template's generation tags give; None where they give others."""
        given = [
            messages.as_message(turn, self.chat.template, self.chat.content_of(turn), self.where)
            for turn in (*self.prompt, *self.answer)
        ]
        text, spans = self.chat.template.generated(given, self.row, self.where)
        spans = [(max(first, self.start), stop) for first, stop in spans if stop > self.start]
        turns = [turn for turn in self.answer if turn.role == "assistant"]
        if text != self.full or len(spans) != len(turns):
            return None
        found: list[Range] = []
        for (first, stop), turn in zip(spans, turns, strict=True):
            if self._words(turn) not in self.full[first:stop]:
                return None
            if self.full.startswith(self.frame.header, first):  # written for the model, not by it
                first += len(self.frame.header)
            body, end = self.chat.ends.after(self.full[first:stop])
            stop = first + len(body) + len(end)
            if not end and self.full.startswith(self.frame.between, stop):
                stop += len(self.frame.between)
            found.append((first, stop))
        return found
