"""Prompt and answer as a chat template writes them: the context is what inference sends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmalign.data.example import Asked, Message, Template
from mmalign.errors import DataError
from mmalign.text import frame, messages, thoughts
from mmalign.text.response import Response, answer_turns
from mmalign.text.turns import Conversation
from mmalign.text.whole import Thought, dropped

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mmalign.data.example import Candidate, Prompt
    from mmalign.text.frame import Ends, Frame
    from mmalign.text.jinja import JinjaTemplate
    from mmalign.text.notes import Notes

    Messages = list[dict[str, Any]]

__all__ = ["ChatTemplate", "Response"]


class ChatTemplate:
    """A chat template, probed so that its traps cannot move a label.

    The context is the prompt rendered with the generation prompt, as every server sends it. The
    answered conversation gives the answer and its end alone: it may lack what the prompt has (a
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
        """Everything before the first token of the answer."""
        turns, row = self._asked(prompt)
        return self._context(turns, row, where)

    def end(self) -> str:
        """What ends an answer, as text."""
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
        """The context, and each answer with the end of its turn as the template writes them.

        Args:
            prompt: Plain or conversational, with what its row hands the template.
            candidates: Answers, of one assistant turn or more.
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
        """The same for an answer, which is words only."""
        return answer

    def told(self, turns: Sequence[Message]) -> Sequence[Message]:
        """The turns with the words that a rendering shows of them."""
        return turns

    def frame(self, row: Template) -> Frame:
        """What the template writes around answers to rows with these keywords and such tools."""
        key = (row.options, bool(row.tools))
        if key not in self._frames:
            found = self._frames[key] = frame.find(self.template, row, self.ends, self.said)
            if found.with_eos and self.ends.eos:
                self.notes.say(
                    "the chat template writes no end token after an answer; the tokenizer's, "
                    f"{self.ends.eos}, is scored there"
                )
            if found.unasked:
                self.notes.say(
                    f"the chat template writes no generation prompt; {found.unasked!r} is scored "
                    "as the beginning of answers, which the model has to write"
                )
        return self._frames[key]

    def render(self, turns: Sequence[Message], row: Template, where: str, *, ask: bool) -> str:
        """Turns as text, the answers' included."""
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
        if turns and turns[-1].role == "assistant":  # the answer goes on with that turn
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
        """The context of an answer that has begun."""
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
        """An answer of one turn; it holds what of it the prompt begins already."""
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
        """The body of an answer of one turn, its end, and whether the eos follows."""
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
        """The body of the last answer, its end, and whether the eos follows."""
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

        Where that is written in another way before the answer, this is what stands behind the
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
            f"{where}: the chat template renders the conversation around the answer "
            f"{answer.content[:60]!r} in another way than around others, so its tokens cannot be "
            "told from the prompt's. Change the answer, or set text.chat_template: false"
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
