"""Prompt and response as a chat template writes them: the context is what inference sends."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from mmalign.data.example import Asked, Candidate, Message, Prompt, Template
from mmalign.errors import DataError
from mmalign.text import frame, messages
from mmalign.text.frame import Ends, Frame
from mmalign.text.messages import Notes, Response, answer_turns
from mmalign.text.tokenizer import JinjaTemplate

Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Thought:
    """A response in its context, of which a template may drop or misplace the thought."""

    row: Row
    before: Sequence[Message]
    answer: Message
    context: str

    def body(self, rendered: str) -> str:
        """The body as the model would write it.

        Args:
            rendered: As the template writes it after the context.

        Raises:
            DataError: The template knows no thoughts, or drops words.
        """
        opened = frame.opener(self.context)
        thought, words = messages.thought_of(self.answer), self.answer.content
        if thought is None:
            thought, words = frame.split(words, opened)
        if thought is None and frame.is_unfinished(words):
            if opened is None and frame.begins_empty(rendered):
                return words
            if opened is not None and not frame.other_tag(words, opened):
                return frame.as_generated(words, opened)
        if thought is None or not thought.strip():
            body = self._closed(rendered, words, opened)
        else:
            body = self._with(rendered, thought, words, opened)
            if frame.is_closed(self.context):
                body = frame.without_close(body)
                self._contradicted()
        if not frame.holds(body, words):
            raise self.row.dropped(self.answer.content, body)
        return body

    def _closed(self, rendered: str, words: str, opened: frame.Opener | None) -> str:
        """A response without a thought, which closes one that the context has opened."""
        if opened is None:
            closed = frame.is_closed(self.context)
            return frame.without_close(rendered) if closed else rendered
        body = frame.as_generated(rendered, opened)
        if opened.close in body[: messages.said_at(body, words.strip(), self.answer)]:
            return body
        closing = self.row.frame.closing
        if closing is None:
            self.row.note(
                "thoughts_closed",
                f"the generation prompt opens a thought ({opened.tag}), the response has none and "
                f"the template shows no empty one; it is closed at once by {opened.empty!r}",
            )
        return (closing or opened.empty) + body

    def _with(self, rendered: str, thought: str, words: str, opened: frame.Opener | None) -> str:
        """The body with its thought, where the template dropped or misplaced it."""
        if frame.follows(rendered, thought, words, opened):
            return rendered if opened is None else frame.as_generated(rendered, opened)
        given = messages.thought_of(self.answer) is not None
        if not given and self.row.chat.template.words.intersection(frame.REASONING):
            further: dict[str, Any] = json.loads(self.answer.extra or "{}")
            further[frame.REASONING[0]] = thought.strip("\n")
            apart = Message("assistant", words.lstrip(), json.dumps(further))
            body, _, _ = self.row.answered(self.before, apart, self.context)
            if frame.follows(body, thought, words, opened):
                return body if opened is None else frame.as_generated(body, opened)
        if opened is not None:
            calls = bool(messages.call_names(self.answer))
            if given or calls or frame.other_tag(self.answer.content, opened):
                # A call is written as the template does it, behind what it closes the thought with.
                after = frame.split(rendered, opened)[1] if calls else words
                return frame.written(thought, after, opened)
            return frame.as_generated(self.answer.content, opened)
        if (body := frame.filled(rendered, thought)) is not None:
            return body
        if given:
            raise messages.unread(messages.thought_key(self.answer), self.row.where)
        return self.answer.content

    def _contradicted(self) -> None:
        """A response with a thought, where the prompt says that there is none.

        Raises:
            DataError: Because the config or the row says so.
        """
        where = self.row.where
        keywords = self.row.chat.template.keywords(self.row.settings, where)
        switches = [name for name in frame.SWITCHES if keywords.get(name) is False]
        if switches:
            raise DataError(
                f"{where}: the response has a thought, but {switches[0]} is false, under "
                "which the prompt closes it; set it to true, or take the thought out"
            )
        self.row.note(
            "thoughts_after_closed",
            "the generation prompt closes the thought, but the response has one, which is scored "
            "after it; text.template_kwargs, e.g. {enable_thinking: true}, may leave it open",
        )


class Conversation:
    """A prompt and a response of several turns as one text.

    It is what inference sends before the last turn, and that turn as a response of its own. An
    earlier turn's place is found by rendering what comes before it. Where the whole has that in
    another way (thoughts of earlier turns are left out), the turn is found by its words: what the
    whole has is what is scored.
    """

    def __init__(self, row: Row, answer: Sequence[Message]) -> None:
        """Render it; `answer` is the assistant's first turn, and all after it."""
        self.row, self.frame, self.answer = row, row.frame, tuple(answer)
        before, turn = [*row.before, *self.answer[:-1]], self.answer[-1]
        asked = row.render(before, ask=True)
        body, end, self.with_eos = row.answered(before, turn, asked)
        body = Thought(row, before, turn, asked).body(body)
        self.full, self.end = asked + body + end, end
        rest = row.rest(self.full, row.context, row.before, answer[0])
        messages.require_told(row.chat.told(self.answer), rest, row.where)
        self.start = len(self.full) - len(rest)  # of the response in the whole
        self.last = (len(asked), len(self.full))
        self.opened = frame.opener(row.context)
        self._require_thoughts(rest)

    def response(self, *, last: bool) -> Response:
        """What follows the context, of which the assistant's turns are scored, or the last one."""
        body = self.full[self.start : len(self.full) - len(self.end)]
        opened, shift = self.opened, -self.start
        if opened is not None and body.startswith(opened.tag):
            shift -= len(body) - len(frame.as_generated(body, opened))
            body = frame.as_generated(body, opened)
        elif opened is not None and opened.close not in body[: self._said_at(body, self.answer[0])]:
            closing = self.frame.closing or opened.empty
            shift += len(closing)
            body = closing + body
        ranges = [self.last] if last else self._ranges()
        scored = [(max(a + shift, 0), b + shift) for a, b in ranges]
        if not last:  # what closes an opened thought is the first turn's
            scored[0] = (0, scored[0][1])
        return Response(self.answer[-1].content, body, self.end, None, self.with_eos, tuple(scored))

    def _ranges(self) -> list[Range]:
        marked = self._marked() if self.row.chat.template.marks_generation else None
        return [*(marked or self._grown())[:-1], self.last]

    def _require_thoughts(self, rest: str) -> None:
        """Say it where thoughts of earlier turns are left out, as they are at inference.

        Raises:
            DataError: The template knows no thoughts at all.
        """
        for turn in self.answer[:-1]:
            key = messages.thought_key(turn)
            thought = messages.thought_of(turn) or frame.split(turn.content, self.opened)[0]
            if turn.role != "assistant" or not thought or frame.holds(rest, thought):
                continue
            if key and not self.row.chat.template.words.intersection(frame.REASONING):
                raise messages.unread(key, self.row.where)
            self.row.note(
                "thoughts_left_out",
                "the chat template leaves thoughts of earlier turns out of a response of several, "
                "as it does when the model is asked for the next turn; they are not trained. A row "
                "that ends in the turn trains its thought",
            )

    def _said_at(self, text: str, turn: Message) -> int:
        return messages.said_at(text, self._words(turn), turn)

    def _grown(self) -> list[Range]:
        """The ranges of the assistant's turns in the whole, by rendering what comes before each."""
        found: list[Range] = []
        cursor = self.start
        for index, turn in enumerate(self.answer):
            before = [*self.row.before, *self.answer[:index]]
            if turn.role != "assistant":
                continue
            first = self.start if index == 0 else self._begins(before, turn, cursor)
            cursor = self._ends([*before, turn], turn, first)
            found.append((first, cursor))
        return found

    def _begins(self, before: Sequence[Message], turn: Message, cursor: int) -> int:
        context = self.row.render(before, ask=True)
        for text in (context, context.removesuffix(self.frame.extra)):
            if len(text) >= cursor and self.full.startswith(text):
                return len(text)
        place = self._found(turn, cursor)
        header = self.frame.header
        start = self.full.rfind(header, cursor, place) if header.strip() else -1
        return place if start < 0 else start + len(header)

    def _ends(self, turns: Sequence[Message], turn: Message, first: int) -> int:
        """Where a turn ends, its end token included."""
        own = self.row.render(turns, ask=False)
        body, end, _ = self.row.split(own, turn)
        stop = len(body)
        if stop < first or not self.full.startswith(body):
            own = body[min(first, frame.shared(body, self.full)) :]
            said = own[self._said_at(own, turn) :]
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
        place = cursor + self._said_at(self.full[cursor:], turn)
        if place == len(self.full):
            raise self._rewritten(turn)
        return place

    def _rewritten(self, turn: Message) -> DataError:
        return DataError(
            f"{self.row.where}: the chat template rewrites the assistant's turn "
            f"{turn.content[:60]!r} within the conversation, so its tokens cannot be told from "
            "those of other turns; set text.train_on: last, or change the row"
        )

    def _words(self, turn: Message) -> str:
        return frame.split(turn.content, self.opened)[1].strip()

    def _marked(self) -> list[Range] | None:
        """The ranges that the template's generation tags give; None where they give others."""
        row = self.row
        given = row.given([*row.before, *self.answer])
        text, spans = row.chat.template.generated(given, row.settings, row.where)
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
            body, end = row.chat.ends.after(self.full[first:stop])
            stop = first + len(body) + len(end)
            if not end and self.full.startswith(self.frame.between, stop):
                stop += len(self.frame.between)
            found.append((first, stop))
        return found


class ChatTemplate:
    """A chat template, probed so that its traps cannot move a label.

    The context is the prompt rendered with the generation prompt, as every server sends it. The
    answered conversation gives the response and its end alone: it may lack what the prompt has (a
    system text that moves into the last user turn, a thought that the generation prompt opens).
    """

    is_chat = True

    def __init__(
        self, template: JinjaTemplate, system_prompt: str | None, ends: Ends, notes: Notes
    ) -> None:
        """A system prompt is put before conversations that have none."""
        self.template, self.system_prompt = template, system_prompt
        self.ends, self.notes = ends, notes
        self._frames: dict[tuple[str, bool], Frame] = {}
        self.takes_text = False  # arguments of calls as JSON text

    def context(self, prompt: Prompt | Asked, where: str) -> str:
        """Everything before the first token of the response."""
        return Row(self, prompt, where).context

    def end(self) -> str:
        """What ends a response, as text."""
        return self.frame(Template()).end

    def identity(self) -> dict[str, Any]:
        """Everything in it that decides tokens, ready for JSON."""
        found = self.frame(Template())
        return {
            "sources": self.template.sources,
            "keywords": self.template.options,
            "date": str(self.template.date) if self.template.writes_date else None,
            "system_prompt": self.system_prompt,
            "end": [found.end, found.with_eos],
        }

    def responses(
        self, prompt: Prompt | Asked, candidates: Sequence[Candidate], where: str, *, last: bool
    ) -> tuple[str, list[Response]]:
        """The context, and each response with the end of its turn as the template writes them.

        Args:
            prompt: Plain or conversational, with what its row hands the template.
            candidates: Responses, of one assistant turn or more.
            where: The row, for errors.
            last: Of several assistant turns, score the last alone.
        """
        row = Row(self, prompt, where)
        turns = (answer_turns(candidate, where) for candidate in candidates)
        return row.context, [row.response(answer, last=last) for answer in turns]

    def content(self, text: str) -> Any:
        """What a turn's text is as the `content` of a message."""
        return text

    def said(self, answer: str) -> Any:
        """The same for a response, which is words only."""
        return answer

    def told(self, turns: Sequence[Message]) -> Sequence[Message]:
        """The turns with the words that a rendering shows of them."""
        return turns

    def frame(self, row: Template) -> Frame:
        """What the template writes around responses to rows with these keywords and such tools."""
        key = (row.options, bool(row.tools))
        if key not in self._frames:
            found = self._frames[key] = frame.find(self.template, row, self.ends, self.said)
            if found.with_eos and self.ends.eos:
                self.notes.say(
                    "the chat template writes no end token after a response; the tokenizer's, "
                    f"{self.ends.eos}, is scored there"
                )
            if found.unasked:
                self.notes.say(
                    f"the chat template writes no generation prompt; {found.unasked!r} is scored "
                    "as the beginning of responses, which the model has to write"
                )
        return self._frames[key]

    def content_of(self, turn: Message) -> Callable[[str], Any]:
        """How the words of a turn become its content."""
        return self.said if turn.role == "assistant" else self.content


class Row:
    """A prompt under a chat template, and the responses to it.

    Attributes:
        settings: Tools and keywords that the record hands the template.
        before: The turns before the response.
        begun: The assistant's turn that the prompt ends in, with which a response goes on.
        context: Everything before the first token of a response.
    """

    def __init__(self, chat: ChatTemplate, prompt: Prompt | Asked, where: str) -> None:
        """Render the context; `where` names the row in errors."""
        self.chat, self.where, self.settings = chat, where, Template()
        if isinstance(prompt, Asked):
            prompt, self.settings = prompt.prompt, prompt.template
        turns = (Message("user", prompt),) if isinstance(prompt, str) else prompt
        if chat.system_prompt is not None and turns and turns[0].role != "system":
            turns = (Message("system", chat.system_prompt), *turns)
        self.begun = turns[-1] if turns and turns[-1].role == "assistant" else None
        self.before = turns if self.begun is None else turns[:-1]
        self.context = self._context()
        messages.require_told(chat.told(turns), self.context, where)
        for tool in messages.tool_names(self.settings):
            if tool not in self.context:
                raise DataError(
                    f"{where}: the chat template leaves out `tools` (it does not write {tool}); "
                    "remove the column, or use a text.chat_template that writes them"
                )

    def _context(self) -> str:
        if self.begun is None:
            return self.render(self.before, ask=True)
        marked = _joined(self.begun, Message("assistant", frame.MARK))
        before, found, _ = self.render([*self.before, marked], ask=False).partition(frame.MARK)
        begun = self.begun.content
        if found and frame.holds(before, begun):
            return before
        start = self.render(self.before, ask=True)
        opened = frame.opener(start)
        return start + (begun if opened is None else frame.as_generated(begun, opened))

    @property
    def frame(self) -> Frame:
        """What the template writes around responses."""
        return self.chat.frame(self.settings)

    def note(self, name: str, sentence: str) -> None:
        """Count the row among those that something was done to."""
        self.chat.notes.count(name, self.where, sentence)

    def dropped(self, answer: str, body: str) -> DataError:
        """That the template does not write the whole response."""
        return DataError(
            f"{self.where}: the chat template drops a part of the response {answer[:60]!r} (it "
            f"renders {body[:60]!r}). Train on the text that the template keeps, or set "
            "text.chat_template: false"
        )

    def response(self, answer: Sequence[Message], *, last: bool) -> Response:
        """A response of one assistant turn or more; with `last`, the last one alone is scored."""
        while answer[-1].role != "assistant":  # nothing follows that would be trained
            answer = answer[:-1]
        if self.begun is not None:
            answer = (_joined(self.begun, answer[0]), *answer[1:])
        if len(answer) > 1:
            return Conversation(self, answer).response(last=last)
        return self._single(answer[0])

    def _single(self, answer: Message) -> Response:
        """A response of one turn; it holds what of it the prompt begins already."""
        own = answer.content[len(self.begun.content) :] if self.begun else answer.content
        body, end, with_eos = self.answered(self.before, answer, self.context)
        if self.begun is None:
            body = Thought(self, self.before, answer, self.context).body(body)
        elif not frame.holds(body, own):
            raise self.dropped(own, body)
        for name in messages.call_names(answer):
            if name not in body:
                raise messages.unread("tool_calls", self.where)
        # From the right: what the template adds in front (a thinking block) may hold the same text.
        kept = own if own in body else own.strip()
        offset = body.rfind(kept) - own.find(kept) if kept in body else None
        return Response(own, body, end, offset, with_eos)

    def given(self, turns: Sequence[Message]) -> list[dict[str, Any]]:
        """Turns as the template takes them."""
        chat, where = self.chat, self.where
        return [
            messages.as_message(turn, chat.template, chat.content_of(turn), where) for turn in turns
        ]

    def render(self, turns: Sequence[Message], *, ask: bool) -> str:
        """Turns as text, the responses' included."""
        given, chat = self.given(turns), self.chat
        render = partial(chat.template.render, row=self.settings, where=self.where, ask=ask)
        if not any("tool_calls" in message for message in given):
            return render(given)
        ways = [given, messages.with_text_arguments(given)]  # some templates take arguments as text
        error: DataError | None = None
        for number, way in enumerate(reversed(ways) if chat.takes_text else ways):
            try:
                text = render(way)
            except DataError as first:
                error = error or first
                continue
            if number == 0 and messages.writes_repr(given, text):
                continue
            chat.takes_text ^= bool(number)
            return text
        raise error or messages.unread("tool_calls", self.where)

    def answered(
        self, before: Sequence[Message], answer: Message, context: str
    ) -> tuple[str, str, bool]:
        """The body of a response of one turn, its end, and whether the eos follows."""
        full = self.render([*before, answer], ask=False)
        return self.split(self.rest(full, context, before, answer), answer)

    def split(self, rest: str, answer: Message) -> tuple[str, str, bool]:
        """The body of the last response, its end, and whether the eos follows."""
        found, calls = self.frame, "tool_calls" in answer.extra
        if rest.endswith(found.tail) and not (calls and not found.tail.strip()):
            return rest[: len(rest) - len(found.tail)], found.end, found.with_eos
        body, end = self.chat.ends.after(rest)  # a tool call may end in another way than words
        if end:
            return body, end, False
        return rest.rstrip() if found.with_eos else rest, found.end, found.with_eos

    def rest(self, full: str, context: str, turns: Sequence[Message], answer: Message) -> str:
        """What follows the context in the answered conversation.

        Where that is written in another way before the response, this is what stands behind the
        assistant's header.
        """
        for start in (context, context.removesuffix(self.frame.extra), frame.stem(context)):
            if full.startswith(start):
                return full[len(start) :]
        marked = Message("assistant", frame.MARK, answer.extra)
        before = self.render([*turns, marked], ask=False).partition(frame.MARK)[0]
        words = self.chat.told(turns[-1:])[-1].content.strip() if turns else ""
        given, own = frame.after_words(context, words), frame.after_words(before, words)
        if given is not None and own is not None:
            start = before[: len(before) - len(own) + frame.shared(given, own)]
            if full.startswith(start):
                return full[len(start) :]
        raise DataError(
            f"{self.where}: the chat template renders the conversation around the response "
            f"{answer.content[:60]!r} in another way than around others, so its tokens cannot be "
            "told from the prompt's. Change the response, or set text.chat_template: false"
        )


def _joined(begun: Message, answer: Message) -> Message:
    return Message("assistant", begun.content + answer.content, answer.extra or begun.extra)
