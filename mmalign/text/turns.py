"""Answers of several turns: what of the rendered conversation the assistant wrote."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmalign.errors import DataError
from mmalign.text import messages, thoughts
from mmalign.text.frame import shared
from mmalign.text.response import Response
from mmalign.text.whole import Thought

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmalign.data.example import Message, Template
    from mmalign.text.render import ChatTemplate

    Range = tuple[int, int]


class Conversation:
    """A prompt and an answer of several turns as one text.

    It is what inference sends before the last turn, and that turn as an answer of its own. An
    earlier turn's place is found by rendering what comes before it. Where the whole has that in
    another way (thoughts of earlier turns are left out), the turn is found by its words: what the
    whole has is what is scored.
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
        self.chat, self.row, self.where = chat, row, where
        self.prompt, self.answer = tuple(prompt), tuple(answer)
        self.frame = chat.frame(row)
        before, turn = [*self.prompt, *self.answer[:-1]], self.answer[-1]
        asked = chat.render(before, row, where, ask=True)
        body, end, self.with_eos = chat.answered(before, turn, asked, row, where)
        body = Thought(chat, before, turn, asked, row, where).body(body)
        self.full, self.end = asked + body + end, end
        rest = chat.rest(self.full, context, prompt, answer[0], row, where)
        messages.require_told(chat.told(self.answer), rest, where)
        self.start = len(self.full) - len(rest)  # of the answer in the whole
        self.last = (len(asked), len(self.full))
        self.opened = thoughts.opener(context)
        self._require_thoughts(rest)

    def response(self, *, last: bool) -> Response:
        """What follows the context, of which the assistant's turns are scored, or the last one."""
        body = self.full[self.start : len(self.full) - len(self.end)]
        opened, shift = self.opened, -self.start
        if opened is not None and body.startswith(opened.tag):
            shift -= len(body) - len(thoughts.as_generated(body, opened))
            body = thoughts.as_generated(body, opened)
        elif opened is not None and opened.close not in body[: self._words_at(body)]:
            closing = self.frame.closing or opened.empty
            shift += len(closing)
            body = closing + body
        ranges = [self.last] if last else self._ranges()
        scored = [(max(a + shift, 0), b + shift) for a, b in ranges]
        if not last:  # what closes an opened thought is the first turn's
            scored[0] = (0, scored[0][1])
        return Response(self.answer[-1].content, body, self.end, None, self.with_eos, tuple(scored))

    def _ranges(self) -> list[Range]:
        marked = self._marked() if self.chat.template.marks_generation else None
        return [*(marked or self._grown())[:-1], self.last]

    def _require_thoughts(self, rest: str) -> None:
        """Say it where thoughts of earlier turns are left out, as they are at inference.

        Raises:
            DataError: The template knows no thoughts at all.
        """
        for turn in self.answer[:-1]:
            key = messages.thought_key(turn)
            thought = messages.thought_of(turn) or thoughts.split(turn.content, self.opened)[0]
            if turn.role != "assistant" or not thought or thoughts.holds(rest, thought):
                continue
            if key and not self.chat.template.words.intersection(thoughts.REASONING):
                raise messages.unread(key, self.where)
            self.chat.notes.count(
                "thoughts_left_out", self.where,
                "the chat template leaves thoughts of earlier turns out of an answer of several, "
                "as it does when the model is asked for the next turn; they are not trained. A row "
                "that ends in the turn trains its thought",
            )  # fmt: skip

    def _words_at(self, body: str) -> int:
        return messages.said_at(body, self._words(self.answer[0]), self.answer[0])

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
            own = body[min(first, shared(body, self.full)) :]
            said = own[messages.said_at(own, self._words(turn), turn) :]
            place = self.full.find(said, first) if said else -1
            if place < 0:
                said, place = self._words(turn), self._found(turn, first)
                if not said:
                    raise self._rewritten(turn)
            stop = place + len(said)
        for text in (end, self.frame.between):
            if text and self.full.startswith(text, stop):
                return stop + len(text)
        return stop

    def _found(self, turn: Message, cursor: int) -> int:
        rest = self.full[cursor:]
        place = cursor + messages.said_at(rest, self._words(turn), turn)
        if place == len(self.full):
            raise self._rewritten(turn)
        return place

    def _rewritten(self, turn: Message) -> DataError:
        return DataError(
            f"{self.where}: the chat template rewrites the assistant's turn {turn.content[:60]!r} "
            "within the conversation, so its tokens cannot be told from those of other turns; set "
            "text.train_on: last, or change the row"
        )

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
        if not text.startswith(self.full) or len(spans) != len(turns):
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
