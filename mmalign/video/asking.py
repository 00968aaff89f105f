"""Questions to a model one batch after another, where some of the clips may be broken."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmalign.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmalign.video.adapter import VideoAdapter
    from mmalign.video.generate import Question


def ask(
    adapter: VideoAdapter, questions: Sequence[Question], seeds: Sequence[int], **options: Any
) -> list[str | DataError]:
    """An answer to each question, or why there is none.

    Where a batch cannot be answered, its questions are asked one by one, so that a broken clip
    costs no answer but its own.

    Args:
        adapter: In evaluation mode.
        questions: One batch.
        seeds: One an answer, of what is drawn for it.
        options: Of `generate`.
    """
    try:
        return list(adapter.sample(questions, seeds=seeds, **options))
    except DataError as error:
        if len(questions) == 1:
            return [error]
    return [
        answer
        for question, seed in zip(questions, seeds, strict=True)
        for answer in ask(adapter, [question], [seed], **options)
    ]
