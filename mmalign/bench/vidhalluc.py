"""VidHalluc: binary questions, options, scene transitions and temporal sequence."""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mmalign.bench.base import (
    Benchmark,
    Floats,
    Prediction,
    Question,
    Sheet,
    Source,
    Sums,
    Verdict,
    entry,
    share,
)
from mmalign.bench.orders import order
from mmalign.bench.parsers import LETTERS, Similarity, letters, word_cosine, yes_no
from mmalign.bench.spoken import final
from mmalign.errors import DataError

# VidHalluc, binary questions on action: one question about several clips of a video.


class VidHallucBQA(Benchmark):
    """A question is right where the answers for all of its clips are."""

    name = "vidhalluc-bqa"
    title = "VidHalluc, action, yes or no"
    layout = '{key: [{q, a: {clip: "Yes" or "No"}}]}; answers in a file of the same shape'
    metric = "share of questions answered rightly for every clip"
    suffix = " Only answer with a single word 'Yes' or 'No'."
    strict = "the yes or no that is meant; contradictions are none"
    legacy = (
        "all text before the first full stop and comma must be yes or no; questions without any "
        "answer are left out"
    )
    source = "Li et al. 2024, arXiv:2412.03735; Vid-Halluc/VidHalluc, eval/evaluation/eval_bqa.py"
    skips_missing = True

    def items(self, source: Source) -> Iterator[tuple[Question, str | None]]:
        """A question and a clip each; the file holds right answers."""
        for key, number, text, clips in _asked(source):
            for clip, answer in clips.items():
                question = Question(
                    id=f"{key}/{number}/{clip}",
                    task="bqa",
                    prompt=text + self.suffix,
                    video=f"{clip}.mp4",
                    answer=str(answer).strip().lower(),
                    pair_id=f"{key}/{number}",
                    meta={"video": key},
                )
                yield question, None

    def answers(self, source: Source) -> dict[str, str | None]:
        """The same shape, with what the model said in the place of what is right."""
        return {
            f"{key}/{number}/{clip}": None if said is None else str(said)
            for key, number, _, clips in _asked(source)
            for clip, said in clips.items()
        }

    def judge(self, row: Prediction, legacy: bool) -> Verdict:
        """Whether one clip's answer is right."""
        text = row.prediction or ""
        read = text.strip().split(".")[0].split(",")[0].strip().lower() if legacy else yes_no(text)
        return Verdict(read, read == row.answer.lower())

    def verdict(self, row: Prediction, legacy: bool) -> Verdict:
        """A missing clip is wrong; whether its question is left out is told by the other clips."""
        return Verdict(None, False) if row.prediction is None else self.judge(row, legacy)

    def tally(self, rows: Sequence[Prediction], legacy: bool) -> tuple[Sheet, list[Verdict]]:
        """Count questions; the published code leaves out those that no clip has an answer for."""
        sheet, verdicts = Sheet(), [self.verdict(row, legacy) for row in rows]
        questions: dict[str, list[int]] = defaultdict(list)
        for i, row in enumerate(rows):
            questions[row.pair_id or row.id].append(i)
        for places in questions.values():
            unit = self.unit_of(rows[places[0]])
            sheet.add(unit)
            if legacy and all(rows[i].prediction is None for i in places):
                for i in places:
                    verdicts[i] = Verdict(None, False, counted=False)
                continue
            sheet.add(unit, right=all(verdicts[i].right for i in places), seen=1)
        return sheet, verdicts


def _asked(source: Source) -> Iterator[tuple[str, int, str, dict[str, Any]]]:
    """Key, number in the key, question and clips."""
    for key, questions in source.keyed():
        if not isinstance(questions, list):
            raise DataError(f"{source.path} {key!r}: must be a list of questions")
        for number, item in enumerate(questions):
            asked = entry(item, f"{source.path} {key!r} question {number + 1}")
            yield key, number, asked.text("q"), asked.inner("a").value


# VidHalluc, options on action: one or several of four are right.


def published_letters(text: str, options: tuple[str, ...]) -> frozenset[str]:
    """Every A to D that stands as a word, "A man" too but not "AC"; else the first option said.

    Source: Vid-Halluc/VidHalluc, eval/evaluation/eval_mcq.py.
    """
    given = frozenset(re.findall(r"\b[A-D]\b", text))
    if given:
        return given
    said = (LETTERS[i] for i, option in enumerate(options) if option.lower() in text.lower())
    return frozenset([first]) if (first := next(said, None)) else frozenset()


class VidHallucMCQ(Benchmark):
    """The set of letters must be exactly the right one."""

    name = "vidhalluc-mcq"
    title = "VidHalluc, action, options"
    layout = '{key: {clip: {Question, Choices: {A: ...}, "Correct Answer", "Model Answer"?}}}'
    metric = "share of questions with exactly the right set of letters"
    suffix = (
        " Please select the correct answer (one or more options), only return your answer(s). "
        "(e.g., ABCD), then the options"
    )
    strict = "letters that stand as an answer, or the options that are said"
    legacy = (
        "every A to D that stands as a word, `A man` too but not `AC`; else the first option said"
    )
    source = "Li et al. 2024, arXiv:2412.03735; Vid-Halluc/VidHalluc, eval/evaluation/eval_mcq.py"
    skips_missing = True

    def items(self, source: Source) -> Iterator[tuple[Question, str | None]]:
        """A clip each."""
        for key, clips in source.keyed():
            for clip, item in entry(clips, f"{source.path} {key!r}").value.items():
                asked = entry(item, f"{source.path} {key!r} {clip!r}")
                choices = asked.inner("Choices").value
                if list(choices) != list(LETTERS[: len(choices)]):
                    raise DataError(f"{asked.where}: the keys of `Choices` must be A, B, ...")
                right = re.findall("[A-D]", asked.text("Correct Answer").upper())
                lines = [f"{key}. {value}\n" for key, value in choices.items()]
                question = Question(
                    id=f"{key}/{clip}",
                    task="mcq",
                    prompt=asked.text("Question")
                    + self.suffix.removesuffix(", then the options")
                    + "\nChoices:\n"
                    + "".join(lines),
                    video=f"{clip}.mp4",
                    options=tuple(map(str, choices.values())),
                    answer="".join(sorted(set(right))),
                    meta={"video": key},
                )
                yield question, asked.said("Model Answer")

    def judge(self, row: Prediction, legacy: bool) -> Verdict:
        """Compare sets of letters."""
        text = row.prediction or ""
        options = row.options or ("",) * 4
        given = published_letters(text, row.options) if legacy else letters(text, options)
        return Verdict("".join(sorted(given)) or None, given == frozenset(row.answer))

    def groups(self, row: Prediction) -> Mapping[str, str]:
        """By how many letters are right."""
        return {"right options": "one" if len(row.answer) == 1 else "several"}


# VidHalluc, scene transitions: whether the scene changes, and from where to where.

LOW = 0.3
"""Similarity that counts nothing, by default of the published function."""

LOW_OF_SCRIPT = 0.5
"""The same as the published script calls it."""

_CHANGE = re.compile(r"\bscene change ?: ?([^,;\n]*)", re.IGNORECASE)
_FROM = re.compile(r"\bfrom (?=.)", re.IGNORECASE)
_PUBLISHED_ROUTE = re.compile(r"from (?>(.+?) to )(.+?)\.", re.IGNORECASE)
_CELLS = ("tp", "fn", "fp", "tn")


def scaled(similarity: float, low: float) -> float:
    """(sigmoid(s) - sigmoid(low)) / (sigmoid(1) - sigmoid(low)); 0 up to `low`."""
    if similarity <= low:
        return 0.0

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    return (sigmoid(similarity) - sigmoid(low)) / (sigmoid(1) - sigmoid(low))


def route(text: str) -> tuple[str, ...]:
    """The places of "from ... to ...", the first in a line that has both; () where there is none.

    Args:
        text: Without layout.
    """
    for line in text.split("\n"):
        start = _FROM.search(line)
        first, _, rest = line[start.end() :].partition(" to ") if start else ("", "", "")
        second = rest.partition(".")[0].strip()
        if first.strip() and second:
            return first.strip(), second
    return ()


class VidHallucSTH(Benchmark):
    """0.6 ((MCC + 1) / 2)^2 + 0.4 description, over videos with and without a change of scene."""

    name = "vidhalluc-sth"
    title = "VidHalluc, scene transition"
    layout = '{video: {"Scene change": "Yes" or "No", Locations: "from ... to ...", prediction?}}'
    metric = "0.6 ((MCC + 1)/2)^2 + 0.4 similarity of the places where a change is seen rightly"
    suffix = "the prompt is the same for every video"
    strict = (
        f"`Scene change: yes|no`, else the yes or no that is meant; similarity up to {LOW} counts "
        "nothing"
    )
    legacy = (
        f"similarity up to {LOW_OF_SCRIPT} counts nothing; places must end in a full stop; what is "
        "not exactly `Yes` is no; videos without an answer are left out"
    )
    source = "Li et al. 2024, arXiv:2412.03735; Vid-Halluc/VidHalluc, eval/evaluation/eval_sth.py"
    headline = "score"
    skips_missing = True
    plain = frozenset(("score", "mcc", "classification", "description"))

    PROMPT = (
        "Watch the given video and determine if a scene change occurs. If no change occurs, "
        "respond: 'Scene change: No, Locations: None'. If there is a scene change, respond in the "
        "format: 'Scene change: Yes, Locations: from [location1] to [location2].'"
    )

    def __init__(self, similarity: Similarity = word_cosine, label: str = "") -> None:
        """Published numbers use the cosine of SimCSE embeddings (sup-simcse-roberta-large)."""
        self.similarity = similarity
        self.label = label

    def items(self, source: Source) -> Iterator[tuple[Question, str | None]]:
        """A video each; `meta.locations` are the right places."""
        for video, item in source.keyed():
            asked = entry(item, f"{source.path} {video!r}")
            question = Question(
                id=video,
                task="sth",
                prompt=self.PROMPT,
                video=f"{video}.mp4",
                answer=asked.text("Scene change").strip().lower(),
                meta={"video": video, "locations": asked.maybe("Locations") or ""},
            )
            yield question, asked.said("prediction", "Model Answer")

    def answers(self, source: Source) -> dict[str, str | None]:
        """`{video: text}`, or the layout of questions with answers inside."""
        if all(isinstance(value, str) for _, value in source.keyed()):
            return dict(source.keyed())
        return super().answers(source)

    def judge(self, row: Prediction, legacy: bool) -> Verdict:
        """Whether a change is seen where there is one."""
        text = row.prediction or ""
        if legacy:
            said = text.split(", Locations: ", 1)[0].split(": ", 1)[-1].split(",")[0].strip()
            read = "yes" if said.lower() == "yes" else "no"
        else:
            said = final(text)
            found = _CHANGE.search(said)
            read = yes_no(found[1] if found else said)
        return Verdict(read, read == row.answer)

    def tally(self, rows: Sequence[Prediction], legacy: bool) -> tuple[Sheet, list[Verdict]]:
        """Count the four cases, and sum how alike the places are."""
        sheet, verdicts = Sheet(), [self.verdict(row, legacy) for row in rows]
        for row, verdict in zip(rows, verdicts, strict=True):
            unit = self.unit_of(row)
            sheet.put(unit, dict.fromkeys((*_CELLS, "alike"), 0.0))
            if not verdict.counted:
                continue
            cell = ("tp" if verdict.right else "fn", "tn" if verdict.right else "fp")
            sheet.put(unit, {cell[0 if row.answer == "yes" else 1]: 1})
            if verdict.right and row.answer == "yes":
                sheet.add(unit, alike=self._alike(row, legacy))
        return sheet, verdicts

    def _alike(self, row: Prediction, legacy: bool) -> float:
        """0 to 2: the place before and the place after."""
        said, right = row.prediction or "", str(row.meta.get("locations") or "")
        if legacy:
            places = said.partition(", Locations: ")[2].strip()
            found = [_PUBLISHED_ROUTE.match(places), _PUBLISHED_ROUTE.match(right)]
            a, b = (match.groups() if match else () for match in found)
        else:
            a, b = route(final(said)), route(final(right))
        if not a or not b:
            return 0.0
        low = LOW_OF_SCRIPT if legacy else LOW
        return sum(
            scaled(self.similarity(x.strip(), y.strip()), low) for x, y in zip(a, b, strict=True)
        )

    def metrics(self, sums: Sums) -> dict[str, Floats]:
        """The score and its parts, [R] each; a correlation that is not defined counts 0."""
        tp, fn, fp, tn = (sums[name] for name in _CELLS)
        norm = np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
        mcc = np.nan_to_num(share(tp * tn - fp * fn, norm))
        classification = ((mcc + 1) / 2) ** 2
        description = np.nan_to_num(share(sums["alike"], 2 * tp))
        return {
            "score": 0.6 * classification + 0.4 * description,
            "mcc": mcc,
            "classification": classification,
            "description": description,
            "accuracy": share(tp + tn, tp + fn + fp + tn),
            "recall": share(tp, tp + fn),
            "specificity": share(tn, tn + fp),
        }

    def sizes(self, sums: Sums) -> dict[str, int]:
        """Videos; with a change seen rightly, with a change, and without one."""
        tp, fn, fp, tn = (int(sums[name][0]) for name in _CELLS)
        seen = dict.fromkeys(("score", "mcc", "classification", "accuracy"), tp + fn + fp + tn)
        return seen | {"description": tp, "recall": tp + fn, "specificity": tn + fp}

    def notes(self) -> list[str]:
        """What the similarity is."""
        if self.similarity is word_cosine:
            return [
                "description: cosine of word counts, not the SimCSE embeddings of published numbers"
            ]
        return [f"description: similarity by {self.label or self.similarity}"]


# VidHalluc, temporal sequence: which of two actions happens first.

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
            yield question, asked.said("Model Answer")

    def judge(self, row: Prediction, legacy: bool) -> Verdict:
        """Whether the order is right."""
        read = (published_order if legacy else order)(row.prediction or "")
        return Verdict(read, read == row.answer)
