"""Prompt and response as a chat template writes them: the context is what inference sends."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmalign.data.example import Asked, Message, Template
from mmalign.errors import DataError
from mmalign.text import frame, messages
from mmalign.text import frame as thoughts
from mmalign.text.frame import shared
from mmalign.text.messages import Response, answer_turns

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mmalign.data.example import Candidate, Prompt
    from mmalign.text.frame import Ends, Frame
    from mmalign.text.messages import Notes
    from mmalign.text.tokenizer import JinjaTemplate

    Range = tuple[int, int]
    Messages = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Thought:
    """A response in its context, of which a template may drop or misplace the thought."""

    chat: ChatTemplate
    before: Sequence[Message]
    answer: Message
    context: str
    row: Template
    where: str

    def body(self, rendered: str) -> str:
        """The body as the model would write it.

        Args:
            rendered: As the template writes it after the context.

        Raises:
            DataError: The template knows no thoughts, or drops words.
        """
        opened = thoughts.opener(self.context)
        thought, words = messages.thought_of(self.answer), self.answer.content
        if thought is None:
            thought, words = thoughts.split(words, opened)
        if thought is None and thoughts.is_unfinished(words):
            if opened is None and thoughts.begins_empty(rendered):
                return words
            if opened is not None and not thoughts.other_tag(words, opened):
                return thoughts.as_generated(words, opened)
        if thought is None or not thought.strip():
            body = self._closed(rendered, words, opened)
        else:
            body = self._with(rendered, thought, words, opened)
            if thoughts.is_closed(self.context):
                body = thoughts.without_close(body)
                self._contradicted()
        if not thoughts.holds(body, words):
            raise dropped(self.answer.content, body, self.where)
        return body

    def _closed(self, rendered: str, words: str, opened: thoughts.Opener | None) -> str:
        """A response without a thought, which closes one that the context has opened."""
        if opened is None:
            closed = thoughts.is_closed(self.context)
            return thoughts.without_close(rendered) if closed else rendered
        body = thoughts.as_generated(rendered, opened)
        if opened.close in body[: messages.said_at(body, words.strip(), self.answer)]:
            return body
        closing = self.chat.frame(self.row).closing
        if closing is None:
            self.chat.notes.count(
                "thoughts_closed", self.where,
                f"the generation prompt opens a thought ({opened.tag}), the response has none and "
                f"the template shows no empty one; it is closed at once by {opened.empty!r}",
            )  # fmt: skip
        return (closing or opened.empty) + body

    def _with(self, rendered: str, thought: str, words: str, opened: thoughts.Opener | None) -> str:
        """The body with its thought, where the template dropped or misplaced it."""
        if thoughts.follows(rendered, thought, words, opened):
            return rendered if opened is None else thoughts.as_generated(rendered, opened)
        given = messages.thought_of(self.answer) is not None
        if not given and self.chat.template.words.intersection(thoughts.REASONING):
            further: dict[str, Any] = json.loads(self.answer.extra or "{}")
            further[thoughts.REASONING[0]] = thought.strip("\n")
            apart = Message("assistant", words.lstrip(), json.dumps(further))
            body, _, _ = self.chat.answered(self.before, apart, self.context, self.row, self.where)
            if thoughts.follows(body, thought, words, opened):
                return body if opened is None else thoughts.as_generated(body, opened)
        if opened is not None:
            calls = bool(messages.call_names(self.answer))
            if given or calls or thoughts.other_tag(self.answer.content, opened):
                # A call is written as the template does it, behind what it closes the thought with.
                after = thoughts.split(rendered, opened)[1] if calls else words
                return thoughts.written(thought, after, opened)
            return thoughts.as_generated(self.answer.content, opened)
        if (body := thoughts.filled(rendered, thought)) is not None:
            return body
        if given:
            raise messages.unread(messages.thought_key(self.answer), self.where)
        return self.answer.content

    def _contradicted(self) -> None:
        """A response with a thought, where the prompt says that there is none.

        Raises:
            DataError: Because the config or the row says so.
        """
        keywords = self.chat.template.keywords(self.row, self.where)
        switches = [name for name in thoughts.SWITCHES if keywords.get(name) is False]
        if switches:
            raise DataError(
                f"{self.where}: the response has a thought, but {switches[0]} is false, under "
                "which the prompt closes it; set it to true, or take the thought out"
            )
        self.chat.notes.count(
            "thoughts_after_closed", self.where,
            "the generation prompt closes the thought, but the response has one, which is scored "
            "after it; text.template_kwargs, e.g. {enable_thinking: true}, may leave it open",
        )  # fmt: skip


def dropped(answer: str, body: str, where: str) -> DataError:
    """That a template does not write the whole response."""
    return DataError(
        f"{where}: the chat template drops a part of the response {answer[:60]!r} (it renders "
        f"{body[:60]!r}). Train on the text that the template keeps, or set text.chat_template: "
        "false"
    )


class Conversation:
    """A prompt and a response of several turns as one text.

    It is what inference sends before the last turn, and that turn as a response of its own. An
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
            prompt: Turns before the response's.
            answer: The assistant's first turn, and all after it.
            context: Of the response.
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
        self.start = len(self.full) - len(rest)  # of the response in the whole
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
                "the chat template leaves thoughts of earlier turns out of a response of several, "
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
        self._takes_text = False  # arguments of calls as JSON text

    def context(self, prompt: Prompt | Asked, where: str) -> str:
        """Everything before the first token of the response."""
        turns, row = self._asked(prompt)
        return self._context(turns, row, where)

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
        turns, row = self._asked(prompt)
        context = self._context(turns, row, where)
        found: list[Response] = []
        for candidate in candidates:
            answer = answer_turns(candidate, where)
            while answer[-1].role != "assistant":  # nothing follows that would be trained
                answer = answer[:-1]
            if turns and turns[-1].role == "assistant":
                answer = (_joined(turns[-1], answer[0]), *answer[1:])
            if len(answer) == 1:
                found.append(self._single(turns, answer[0], context, row, where))
            else:
                found.append(self._several(turns, answer, context, row, where, last=last))
        return context, found

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

    def render(self, turns: Sequence[Message], row: Template, where: str, *, ask: bool) -> str:
        """Turns as text, the responses' included."""
        given = [
            messages.as_message(turn, self.template, self.content_of(turn), where) for turn in turns
        ]
        calls = any("tool_calls" in message for message in given)
        if not calls:
            return self.template.render(given, row, where, ask=ask)
        return self._with_calls(given, row, where, ask=ask)

    def _asked(self, prompt: Prompt | Asked) -> tuple[tuple[Message, ...], Template]:
        row = Template()
        if isinstance(prompt, Asked):
            prompt, row = prompt.prompt, prompt.template
        turns = (Message("user", prompt),) if isinstance(prompt, str) else prompt
        if self.system_prompt is not None and turns and turns[0].role != "system":
            turns = (Message("system", self.system_prompt), *turns)
        return turns, row

    def _context(self, turns: Sequence[Message], row: Template, where: str) -> str:
        if turns and turns[-1].role == "assistant":  # the response goes on with that turn
            text = self._begun(turns, row, where)
        else:
            text = self.render(turns, row, where, ask=True)
        messages.require_told(self.told(turns), text, where)
        for tool in messages.tool_names(row):
            if tool not in text:
                raise DataError(
                    f"{where}: the chat template leaves out `tools` (it does not write {tool}); "
                    "remove the column, or use a text.chat_template that writes them"
                )
        return text

    def _begun(self, turns: Sequence[Message], row: Template, where: str) -> str:
        """The context of a response that has begun."""
        marked = _joined(turns[-1], Message("assistant", frame.MARK))
        text = self.render([*turns[:-1], marked], row, where, ask=False)
        before, found, _ = text.partition(frame.MARK)
        if found and thoughts.holds(before, turns[-1].content):
            return before
        start = self.render(turns[:-1], row, where, ask=True)
        opened = thoughts.opener(start)
        begun = turns[-1].content
        return start + (begun if opened is None else thoughts.as_generated(begun, opened))

    def _single(
        self, turns: Sequence[Message], answer: Message, context: str, row: Template, where: str
    ) -> Response:
        """A response of one turn; it holds what of it the prompt begins already."""
        goes_on = bool(turns) and turns[-1].role == "assistant"
        before = turns[:-1] if goes_on else turns
        own = answer.content[len(turns[-1].content) :] if goes_on else answer.content
        body, end, with_eos = self.answered(before, answer, context, row, where)
        if not goes_on:
            body = Thought(self, before, answer, context, row, where).body(body)
        elif not thoughts.holds(body, own):
            raise dropped(own, body, where)
        for name in messages.call_names(answer):
            if name not in body:
                raise messages.unread("tool_calls", where)
        # From the right: what the template adds in front (a thinking block) may hold the same text.
        kept = own if own in body else own.strip()
        offset = body.rfind(kept) - own.find(kept) if kept in body else None
        return Response(own, body, end, offset, with_eos)

    def answered(
        self, before: Sequence[Message], answer: Message, context: str, row: Template, where: str
    ) -> tuple[str, str, bool]:
        """The body of a response of one turn, its end, and whether the eos follows."""
        full = self.render([*before, answer], row, where, ask=False)
        rest = self.rest(full, context, before, answer, row, where)
        return self.split(rest, self.frame(row), calls="tool_calls" in answer.extra)

    def _several(
        self,
        turns: Sequence[Message],
        answer: Sequence[Message],
        context: str,
        row: Template,
        where: str,
        *,
        last: bool,
    ) -> Response:
        if turns and turns[-1].role == "assistant":
            turns = turns[:-1]
        return Conversation(self, turns, answer, context, row, where).response(last=last)

    def split(self, rest: str, found: Frame, *, calls: bool) -> tuple[str, str, bool]:
        """The body of the last response, its end, and whether the eos follows."""
        if rest.endswith(found.tail) and not (calls and not found.tail.strip()):
            return rest[: len(rest) - len(found.tail)], found.end, found.with_eos
        body, end = self.ends.after(rest)  # a tool call may end in another way than words
        if end:
            return body, end, False
        return rest.rstrip() if found.with_eos else rest, found.end, found.with_eos

    def rest(
        self,
        full: str,
        context: str,
        turns: Sequence[Message],
        answer: Message,
        row: Template,
        where: str,
    ) -> str:
        """What follows the context in the answered conversation.

        Where that is written in another way before the response, this is what stands behind the
        assistant's header.
        """
        if full.startswith(context):
            return full[len(context) :]
        extra = self.frame(row).extra
        if extra and context.endswith(extra) and full.startswith(context[: -len(extra)]):
            return full[len(context) - len(extra) :]
        stem = thoughts.stem(context)
        if full.startswith(stem):
            return full[len(stem) :]
        marked = Message("assistant", frame.MARK, answer.extra)
        text = self.render([*turns, marked], row, where, ask=False)
        before = text.partition(frame.MARK)[0]
        words = self.told(turns[-1:])[-1].content.strip() if turns else ""
        given, own = frame.after_words(context, words), frame.after_words(before, words)
        if given is not None and own is not None:
            start = len(before) - len(own) + frame.shared(given, own)
            if full.startswith(before[:start]):
                return full[start:]
        raise DataError(
            f"{where}: the chat template renders the conversation around the response "
            f"{answer.content[:60]!r} in another way than around others, so its tokens cannot be "
            "told from the prompt's. Change the response, or set text.chat_template: false"
        )

    def _with_calls(self, given: Messages, row: Template, where: str, *, ask: bool) -> str:
        """A conversation with calls, whose arguments some templates take as text."""
        ways = (messages.with_text_arguments, list) if self._takes_text else (
            list, messages.with_text_arguments)  # fmt: skip
        error: DataError | None = None
        for number, way in enumerate(ways):
            try:
                text = self.template.render(way(given), row, where, ask=ask)
            except DataError as first:
                error = error or first
                continue
            if number == 0 and messages.writes_repr(given, text):
                continue
            self._takes_text ^= bool(number)
            return text
        raise error or messages.unread("tool_calls", where)

    def content_of(self, turn: Message) -> Callable[[str], Any]:
        """How the words of a turn become its content."""
        return self.said if turn.role == "assistant" else self.content


def _joined(begun: Message, answer: Message) -> Message:
    return Message("assistant", begun.content + answer.content, answer.extra or begun.extra)
