"""Video-MME: three questions a video, videos of three durations."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from mmalign.benchmark.base import Verdict
from mmalign.benchmark.choice import Choice, right_letter
from mmalign.benchmark.parsers import letter
from mmalign.benchmark.records import Prediction, Question
from mmalign.benchmark.sources import Entry, Source, entry

TABLES = ("duration", "domain", "sub_category", "task_type")
_LETTERED = re.compile(r"^\s*\(?[A-Z][.):]\s*")

MERGED_PREFIXES = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option is" + "The correct option is",  # a comma is missing in the published list
    "Best answer:" + "Best option:",  # and here
    "Answer:",
    "Option:",
    "The correct answer",
    "The correct option",
)
"""What the published scorer takes away before it looks for a letter."""


def published_letter(text: str) -> str | None:
    """The first of A to D that is left; "Best answer: C" is read as B, the first capital of Best.

    Source: pritamqu/RRPO, eval/videomme/calculate.py, after Video-MME's own script.
    """
    for prefix in MERGED_PREFIXES:
        text = text.replace(prefix, "")
    found = re.search("[A-D]", text)
    return found[0] if found else None


class VideoMME(Choice):
    """Accuracy in all, by duration, domain, sub-category and task type."""

    name = "videomme"
    title = "Video-MME, without subtitles"
    layout = (
        "[{video_id, duration, domain, sub_category, questions: [{question_id, task_type, "
        "question, options, answer, response?}]}, ...], or a row a question"
    )
    metric = "accuracy over all questions; by duration, domain, sub-category and task type besides"
    suffix = "a sentence between question and options: respond with only the letter"
    legacy = (
        "strips a list of prefixes, two of which lack a comma, and takes the first capital A to D; "
        "answers without one are left out"
    )
    source = "Fu et al. 2024, arXiv:2405.21075; pritamqu/RRPO, eval/videomme"

    def items(self, source: Source) -> Iterator[tuple[Question, str | None]]:
        """Nested by video, or flat as in the published table."""
        for video in source.entries():
            inner = video.value.get("questions")
            if not isinstance(inner, list):
                yield self._item(video, video)
                continue
            for i, item in enumerate(inner, start=1):
                yield self._item(video, entry(item, f"{video.where} question {i}"))

    def _item(self, video: Entry, asked: Entry) -> tuple[Question, str | None]:
        options = _options(asked)
        meta: dict[str, Any] = {key: video.text(key) for key in TABLES[:3]}
        meta["task_type"] = asked.text("task_type")
        meta["video"] = video.text("video_id")
        prompt = (
            f"{asked.text('question')}\nSelect the best answer to the following multiple-choice "
            "question based on the video. Respond with only the letter (A, B, C, or D) of the "
            "correct option.\n" + "\n".join(options) + "\n"
        )
        texts = tuple(_LETTERED.sub("", option) for option in options)
        question = Question(
            id=asked.text("question_id"),
            task=meta["task_type"],
            prompt=prompt,
            video=f"{video.maybe('videoID') or meta['video']}.mp4",
            options=texts,
            answer=right_letter(asked.text("answer"), texts, asked.where),
            meta=meta,
        )
        return question, asked.maybe("response", "prediction")

    def judge(self, row: Prediction, legacy: bool) -> Verdict:
        """Whether the letter that is read is the right one."""
        text = row.prediction or ""
        if legacy:
            read = published_letter(text)
            return Verdict(read, read == row.answer, counted=read is not None)
        read = letter(text, row.options, 4)
        return Verdict(read, read == row.answer)

    def groups(self, row: Prediction) -> Mapping[str, str]:
        """Four tables; the macro average is over durations."""
        return {key: str(row.meta[key]) for key in TABLES if key in row.meta}


def _options(asked: Entry) -> list[str]:
    """Options as they are written, with their letters; RRPO's files join them with line breaks."""
    value = asked.value.get("options")
    if isinstance(value, str):
        return value.split("\n")
    return asked.texts("options")
