"""VidHalluc, temporal sequence: which of two actions happens first."""

from __future__ import annotations

import re
from collections.abc import Iterator

from mmalign.benchmark.base import Benchmark, Verdict
from mmalign.benchmark.records import Prediction, Question
from mmalign.benchmark.sources import Source, entry

_ALONE = re.compile(r"\W*(AB|BA|A|B)\W*", re.IGNORECASE)
_FRONT = re.compile(r"[\s\"'*(\[]*(AB|BA)\b")
_RELATION = re.compile(
    r"action ([ab])\b(?:(?!action [ab]\b)[^.\n])*?\b(before|then|followed by|after)\b"
    r"(?:(?!action [ab]\b)[^.\n])*?action ([ab])\b"
)
_UNTOLD = re.compile(r"\b(before|after|not? clear|unclear)\b")
_MENTION = re.compile(r"action ([ab])\b")
_PUBLISHED_MENTION = r"(action [ab]|[ab][\.\)])"


def order(text: str) -> str | None:
    """AB, BA, or the one action that was seen.

    Read are the letters alone or in front; "Action A happens before Action B" and the like; both
    actions named once each, in that order; one action named alone.
    """
    found = _ALONE.fullmatch(text) or _FRONT.match(text)
    if found:
        return found[1].upper()
    low = text.lower()
    told = _RELATION.search(low)
    if told and told[1] != told[3]:
        first, second = (told[3], told[1]) if told[2] == "after" else (told[1], told[3])
        return (first + second).upper()
    if _UNTOLD.search(low):
        return None
    named = _MENTION.findall(low)
    once = "".join(named).upper()
    return once if once in ("AB", "BA") or (len(set(named)) == 1 and len(once) == 1) else None


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
        told = re.search(
            rf"{_PUBLISHED_MENTION}[^{word}]+{word}[^action]*?{_PUBLISHED_MENTION}", low
        )
        if told:
            first, second = told[1][-1], told[2][-1]
            return (second + first if word == "after" else first + second).upper()
    return "".join(mention[-1] for mention in re.findall(_PUBLISHED_MENTION, low)).upper()


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
