"""What follows a context, as text: the answer, the end of its turn, and what of it is scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmalign.data.example import Message
from mmalign.errors import DataError

if TYPE_CHECKING:
    from mmalign.data.example import Candidate


@dataclass(frozen=True, slots=True)
class Response:
    """What follows the context: the answer as the model sees it, then the end of its turn."""

    answer: str  # the record's own words; spans and steps count its characters
    body: str  # what the model sees of them
    end: str  # the end as text
    offset: int | None  # where the record's answer starts in body; None: the template rewrote it
    with_eos: bool = True  # whether the eos follows the end, which a template may not write
    # Of several turns: the characters of body and end that the assistant wrote; None: all.
    scored: tuple[tuple[int, int], ...] | None = None


def answer_turns(candidate: Candidate, where: str) -> tuple[Message, ...]:
    """The turns of a response, of which the first is the assistant's.

    Raises:
        DataError: It is a file, or it does not begin with an assistant turn.
    """
    response = candidate.response
    if isinstance(response, str):
        return (Message("assistant", response),)
    if not isinstance(response, tuple):
        raise DataError(
            f"{where}: the response is the file {response}; text needs a string. A model of "
            "pictures is trained with modality: diffusion"
        )
    if not response or response[0].role != "assistant":
        raise DataError(
            f"{where}: the response has turns {[turn.role for turn in response]}; its first must "
            "be the assistant's. Put earlier turns into the prompt"
        )
    return response
