"""An answer of one turn made whole: its thought and its words, as the model would write them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmalign.data.example import Message
from mmalign.errors import DataError
from mmalign.text import messages, thoughts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmalign.data.example import Template
    from mmalign.text.render import ChatTemplate


@dataclass(frozen=True, slots=True)
class Thought:
    """An answer in its context, of which a template may drop or misplace the thought."""

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
        """An answer without a thought, which closes one that the context has opened."""
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
                f"the generation prompt opens a thought ({opened.tag}), the answer has none and "
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
        """An answer with a thought, where the prompt says that there is none.

        Raises:
            DataError: Because the config or the row says so.
        """
        keywords = self.chat.template.keywords(self.row, self.where)
        switches = [name for name in thoughts.SWITCHES if keywords.get(name) is False]
        if switches:
            raise DataError(
                f"{self.where}: the answer has a thought, but {switches[0]} is false, under which "
                "the prompt closes it; set it to true, or take the thought out"
            )
        self.chat.notes.count(
            "thoughts_after_closed", self.where,
            "the generation prompt closes the thought, but the answer has one, which is scored "
            "after it; text.template_kwargs, e.g. {enable_thinking: true}, may leave it open",
        )  # fmt: skip


def dropped(answer: str, body: str, where: str) -> DataError:
    """That a template does not write the whole answer."""
    return DataError(
        f"{where}: the chat template drops a part of the answer {answer[:60]!r} (it renders "
        f"{body[:60]!r}). Train on the text that the template keeps, or set text.chat_template: "
        "false"
    )
