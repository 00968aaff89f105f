"""Prompt and response as text: plain concatenation, or the tokenizer's chat template."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmalign.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from mmalign.data.example import Candidate, Message, Prompt

log = logging.getLogger(__name__)

MARK = "mmalign\u2063answer"  # stands for the answer when a template is probed; never tokenised


@dataclass(frozen=True, slots=True)
class Response:
    """What follows the context: the answer as the model sees it, then the end of its turn."""

    answer: str  # the record's own words; spans and steps count its characters
    body: str  # what the model sees of them
    end: str
    offset: int | None  # where the record's answer starts in body; None: the template rewrote it


class PlainText:
    """No template: a prompt is its own text; a conversation becomes a transcript.

    The end token after a response is the encoder's to add.
    """

    is_chat = False

    def context(self, prompt: Prompt, where: str) -> str:
        """The prompt's text with nothing added, or the transcript up to the assistant's turn.

        Source of the transcript's form: HH-RLHF, Bai et al. 2022, arXiv:2204.05862.
        """
        if isinstance(prompt, str):
            return prompt
        speakers = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: ", "system": ""}
        unknown = [turn.role for turn in prompt if turn.role not in speakers]
        if unknown:
            raise ConfigError(
                f"{where}: the conversation has turns of {unknown}, but no chat template is in use "
                "(the tokenizer has none, or text.chat_template is false), and a transcript knows "
                f"{sorted(speakers)} only. Use a chat model, or give the prompt as one string"
            )
        text = "".join(speakers[turn.role] + turn.content for turn in prompt)
        goes_on = bool(prompt) and prompt[-1].role == "assistant"
        return text if goes_on else text + "\n\nAssistant:"

    def end(self) -> str:
        """Nothing: the end token is not written as text."""
        return ""

    def responses(
        self, prompt: Prompt, candidates: Sequence[Candidate], where: str
    ) -> tuple[str, list[Response]]:
        """The context and each response's text; after a transcript's colon comes a space."""
        context = self.context(prompt, where)
        opened = context.endswith(":") and not isinstance(prompt, str)
        found: list[Response] = []
        for candidate in candidates:
            text = answer_text(candidate, where)
            space = " " if opened and not text.startswith(" ") else ""
            found.append(Response(text, space + text, "", len(space)))
        return context, found


class ChatTemplate:
    """The tokenizer's chat template, probed so that its traps cannot move a label.

    The context is the rendered prompt with the generation prompt. It is compared with the same
    conversation answered: where a template ignores the generation prompt, or puts into the prompt
    rendered alone what the answered conversation lacks (a thinking block, a default system
    message), the text before the answer in the answered conversation is the context instead, for
    training and for sampling alike.
    """

    is_chat = True

    def __init__(self, tokenizer: PreTrainedTokenizerBase, system_prompt: str | None) -> None:
        """A system prompt is put before conversations that have none."""
        self.tokenizer = tokenizer
        self.system_prompt = system_prompt
        self._warned = False

    def context(self, prompt: Prompt, where: str) -> str:
        """Everything before the first token of the answer."""
        return self._frame(self._messages(prompt), where)[0]

    def end(self) -> str:
        """What the template writes after an answer."""
        return self._frame(self._messages("Hello"), "chat template")[1]

    def responses(
        self, prompt: Prompt, candidates: Sequence[Candidate], where: str
    ) -> tuple[str, list[Response]]:
        """The context, and each answer with the end of its turn as the template writes them."""
        messages = self._messages(prompt)
        context, end = self._frame(messages, where)
        return context, [
            self._response(messages, context, end, answer_text(candidate, where), where)
            for candidate in candidates
        ]

    def content(self, text: str) -> Any:
        """What a turn's text is as the `content` of a message."""
        return text

    def said(self, answer: str) -> Any:
        """The same for an answer, which is words only."""
        return answer

    def _response(
        self, messages: list[dict[str, Any]], context: str, end: str, answer: str, where: str
    ) -> Response:
        full = self._render(self._answered(messages, answer), where)
        if not (full.startswith(context) and full[len(context) :].endswith(end)):
            raise DataError(
                f"{where}: the chat template renders the conversation around the answer "
                f"{answer[:60]!r} in another way than around others, so its tokens cannot be told "
                "from the prompt's. Change the answer, or set text.chat_template: false"
            )
        body = full[len(context) : len(full) - len(end)]
        if "".join(answer.split()) not in "".join(body.split()):
            raise DataError(
                f"{where}: the chat template drops a part of the answer {answer[:60]!r} (it "
                f"renders {body[:60]!r}). Thinking templates drop text before </think>; train on "
                "the text that the template keeps, or set text.chat_template: false"
            )
        # From the right: what the template adds in front (a thinking block) may hold the same text.
        kept = answer if answer in body else answer.strip()
        offset = body.rfind(kept) - answer.find(kept) if kept in body else None
        return Response(answer, body, end, offset)

    def _messages(self, prompt: Prompt) -> list[dict[str, Any]]:
        turns = (
            [("user", prompt)] if isinstance(prompt, str) else [(t.role, t.content) for t in prompt]
        )
        if self.system_prompt is not None and turns and turns[0][0] != "system":
            turns.insert(0, ("system", self.system_prompt))
        return [{"role": role, "content": self.content(text)} for role, text in turns]

    def _answered(self, messages: list[dict[str, Any]], answer: str) -> list[dict[str, Any]]:
        content = self.said(answer)
        if messages and messages[-1]["role"] == "assistant":
            begun = messages[-1]["content"]
            return [*messages[:-1], {"role": "assistant", "content": begun + content}]
        return [*messages, {"role": "assistant", "content": content}]

    def _frame(self, messages: list[dict[str, Any]], where: str) -> tuple[str, str]:
        """The text before and after any answer to `messages`."""
        probe = self._render(self._answered(messages, MARK), where)
        before, found, after = probe.partition(MARK)
        if not found:
            raise ConfigError(f"{where}: the tokenizer's chat template drops the assistant's text")
        if messages and messages[-1]["role"] == "assistant":  # the answer goes on with that turn
            return before, after
        start = self._render(messages, where, add_generation_prompt=True)
        if before.startswith(start):
            header = before[len(start) :]
            bare = self._render(messages, where)
            # An ignored generation prompt leaves the assistant's header to the answer; a heeded one
            # with more text before the answer (an empty thinking block) leaves that to the model.
            if not header.strip() or start != bare:
                return start, after
        self._warn(start, before)
        return before, after

    def _render(
        self, messages: list[dict[str, Any]], where: str, *, add_generation_prompt: bool = False
    ) -> str:
        from jinja2.exceptions import TemplateError

        options: dict[str, Any] = {
            "tokenize": False,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return str(self.tokenizer.apply_chat_template(messages, **options))
        except TemplateError as error:
            roles = [message["role"] for message in messages]
            raise DataError(
                f"{where}: the chat template refuses the conversation with roles {roles}: {error}"
            ) from error

    def _warn(self, start: str, before: str) -> None:
        if not self._warned:
            log.warning(
                "the chat template's prompt rendered alone ends in %r, but before an answer stands "
                "%r; the second is used as the context, for training and sampling",
                start[-60:],
                before[-60:],
            )
            self._warned = True


def answer_text(candidate: Candidate, where: str) -> str:
    """The candidate's own words: its text, or the content of its one assistant message."""
    response = candidate.response
    if isinstance(response, str):
        return response
    if isinstance(response, tuple):
        turns: tuple[Message, ...] = response
        if len(turns) == 1 and turns[0].role == "assistant":
            return turns[0].content
        raise DataError(
            f"{where}: the response has turns {[turn.role for turn in turns]}; it must be one "
            "assistant message. Put earlier turns into the prompt"
        )
    raise DataError(
        f"{where}: the response is the file {response}; text needs a string. A model of pictures "
        "is trained with modality: diffusion"
    )
