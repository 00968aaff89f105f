"""VidHalluc, temporal sequence: which of two actions happens first."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence

from mmalign.benchmark.base import Benchmark, Verdict
from mmalign.benchmark.orders import order
from mmalign.benchmark.records import Prediction, Question
from mmalign.benchmark.sources import Source, entry

__all__ = ["VidHallucTSH", "order", "published_order"]

_PUBLISHED_MENTION = r"(action [ab]|[ab][\.\)])"


def published_order(text: str) -> str | None:
    """As the published script reads it.

    Its patterns hold sets of characters where words are meant (`[^before]+`), so that most
    sentences fall through to the order of all mentions: actions named twice give ABAB.

    Source: Vid-Halluc/VidHalluc, eval/evaluation/eval_tsh.py.
    """
    low = text.lower()
    if low in ("ab", "ba", "a", "b"):
        return low.upper()
    if "not clear" in low or "no clear" in low:
        return None
    named = [action for action in ("a", "b") if f"action {action}" in low]
    if len(named) < 2:
        return named[0].upper() if named else None
    word = next((word for word in ("before", "then", "after") if word in low), None)
    if word:
        told = _published_search(low, word)
        if told:
            first, second = told
            return (second + first if word == "after" else first + second).upper()
    return "".join(mention[-1] for mention in re.findall(_PUBLISHED_MENTION, low)).upper()


def _published_search(low: str, word: str) -> tuple[str, str] | None:
    """Last characters of the two mentions that the published pattern finds, in linear time.

    The pattern is MENTION[^word]+word[^action]*?MENTION, searched from the left.
    """
    mentions = list(re.finditer(rf"(?={_PUBLISHED_MENTION})", low))
    starts = [mention.start() for mention in mentions]
    stops = [match.start() for match in re.finditer(f"[{word}]", low)]
    barred = [match.start() for match in re.finditer("[action]", low)]
    for mention in mentions:
        end = mention.end(1)
        stop = _next(stops, end)
        if stop is None or stop == end or not low.startswith(word, stop):
            continue
        after = stop + len(word)
        place = bisect_left(starts, after)
        last = _next(barred, after)
        if place < len(starts) and (last is None or starts[place] <= last):
            return mention[1][-1], mentions[place][1][-1]
    return None


def _next(places: Sequence[int], start: int) -> int | None:
    at = bisect_left(places, start)
    return places[at] if at < len(places) else None


class VidHallucTSH(Benchmark):
    """Accuracy of the order of two actions."""

    name = "vidhalluc-tsh"
    title = "VidHalluc, temporal sequence"
    layout = '{key: {video, Question, "Correct Answer": "AB" or "BA", "Model Answer"?}}'
    metric = "accuracy of the order"
    suffix = (
        "Sort these two actions in the order they occur in the video, and return the order you "
        "detect (i.e., AB or BA). If you only detect one action of these two in the video, return "
        "that action."
    )
    strict = "AB, BA, A or B alone or in front, or a sentence that orders Action A and Action B"
    legacy = "patterns with sets of characters for words: `A ..., B ..., A first` is read as ABA"
    source = "Li et al. 2024, arXiv:2412.03735; Vid-Halluc/VidHalluc, eval/evaluation/eval_tsh.py"
    skips_missing = True

    def items(self, source: Source) -> Iterator[tuple[Question, str | None]]:
        """An entry each."""
        for key, item in source.keyed():
            asked = entry(item, f"{source.path} {key!r}")
            video = asked.text("video")
            question = Question(
                id=key,
                task="tsh",
                prompt=asked.text("Question") + self.suffix,
                video=f"{video}.mp4",
                answer=asked.text("Correct Answer").strip().upper(),
                meta={"video": video},
            )
            yield question, asked.maybe("Model Answer", "prediction")

    def judge(self, row: Prediction, legacy: bool) -> Verdict:
        """Whether the order is right."""
        read = (published_order if legacy else order)(row.prediction or "")
        return Verdict(read, read == row.answer)
