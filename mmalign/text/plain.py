"""Prompt and response as text without a chat template: as they are, or as a transcript."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmalign.data.example import Asked, Template
from mmalign.errors import ConfigError, DataError
from mmalign.text.response import Response, answer_turns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmalign.data.example import Candidate, Message, Prompt

_SPEAKERS = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: ", "system": ""}
_SILENT = {"tool_call_id", "name", "id"}  # keys that say nothing which a transcript would lose
_NO_TEMPLATE = "no chat template is in use (the tokenizer has none, or text.chat_template is false)"


class PlainText:
    """No template: a prompt is its own text; a conversation becomes a transcript.

    The end token after a response is the encoder's to add.
    """

    is_chat = False

    def context(self, prompt: Prompt | Asked, where: str) -> str:
        """The prompt's text with nothing added, or the transcript up to the assistant's turn.

        Source of the transcript's form: HH-RLHF, Bai et al. 2022, arXiv:2204.05862.
        """
        if isinstance(prompt, Asked):
            _refuse_template(prompt.template, where)
            prompt = prompt.prompt
        if isinstance(prompt, str):
            return prompt
        text = _transcript(prompt, where)
        goes_on = bool(prompt) and prompt[-1].role == "assistant"
        return text if goes_on else text + "\n\nAssistant:"

    def responses(
        self, prompt: Prompt | Asked, candidates: Sequence[Candidate], where: str, *, last: bool
    ) -> tuple[str, list[Response]]:
        """The context and each response's text; after a transcript's colon comes a space."""
        context = self.context(prompt, where)
        opened = self._opens(prompt, context)
        return context, [
            _response(answer_turns(candidate, where), opened, where, last=last)
            for candidate in candidates
        ]

    def _opens(self, prompt: Prompt | Asked, context: str) -> bool:
        """Whether the context ends in the colon after which a transcript has a space."""
        conversation = prompt.prompt if isinstance(prompt, Asked) else prompt
        return context.endswith(":") and not isinstance(conversation, str)


def _response(turns: Sequence[Message], opened: bool, where: str, *, last: bool) -> Response:
    first = turns[0]
    _transcript(turns, where)  # refuses what it cannot write
    space = " " if opened and not first.content.startswith(" ") else ""
    body = space + first.content
    if len(turns) == 1:
        return Response(first.content, body, "", len(space))
    scored = [(0, len(body))]
    for turn in turns[1:]:
        body += _SPEAKERS[turn.role]
        if turn.role == "assistant":
            scored.append((len(body), len(body) + len(turn.content)))
        body += turn.content
    shown = scored[-1:] if last else scored
    return Response(turns[-1].content, body[: scored[-1][1]], "", None, scored=tuple(shown))


def _transcript(turns: Sequence[Message], where: str) -> str:
    unknown = [turn.role for turn in turns if turn.role not in _SPEAKERS]
    if unknown:
        raise ConfigError(
            f"{where}: the conversation has turns of {unknown}, but {_NO_TEMPLATE}, and a "
            f"transcript knows {sorted(_SPEAKERS)} only. Use a chat model, or give the prompt as "
            "one string"
        )
    for turn in turns:
        lost = [key for key in turn.as_dict() if key not in {"role", "content", *_SILENT}]
        if lost:
            raise DataError(
                f"{where}: a turn of the {turn.role} has {', '.join(lost)}, but {_NO_TEMPLATE} to "
                "write it. Use a chat model, or take the key out"
            )
    return "".join(_SPEAKERS[turn.role] + turn.content for turn in turns)


def _refuse_template(row: Template, where: str) -> None:
    keys = {"tools": row.tools, "chat_template_kwargs": row.options}
    lost = [key for key, value in keys.items() if value]
    if lost:
        raise DataError(
            f"{where}: the row has {' and '.join(lost)}, but {_NO_TEMPLATE} to read it. Use a chat "
            "model, or take the column out"
        )
