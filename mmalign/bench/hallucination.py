"""Benchmarks of what a model makes up: VideoHallucer and the four parts of VidHalluc."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mmalign.bench.base import (
    Benchmark,
    Metric,
    Prediction,
    Question,
    Sheet,
    Source,
    Sums,
    Verdict,
    entry,
    mean,
    ratio,
    share,
)
from mmalign.bench.orders import order, published_order
from mmalign.bench.parsers import LETTERS, Similarity, letters, word_cosine, yes_no
from mmalign.bench.spoken import final
from mmalign.errors import DataError

CATEGORIES = {
    "object_relation": "obj_rel",
    "temporal": "temporal",
    "semantic_detail": "semantic",
    "external_factual": "fact",
    "external_nonfactual": "nonfact",
    "fact_detect": "factdet",
}
"""Question files, whose clips lie in a folder of that name, and the categories they are."""

SIDES = ("basic", "hallucination")
Halves = dict[str, tuple[Prediction, Verdict]]
_YES_NO = re.compile(r"\b(yes|no)\b", re.IGNORECASE)


def says(word: str, text: str) -> bool:
    """Whether the published scorer finds a word: anywhere, whatever else is said.

    Source: patrick-tssn/VideoHallucer; pritamqu/RRPO, eval/videohallucer/evaluation_utils.py.
    """
    return re.search(rf"\b({re.escape(word)})\b", text, re.IGNORECASE) is not None


class VideoHallucer(Benchmark):
    """A pair is right where both answers are; the average is over categories."""

    name = "videohallucer"
    title = "VideoHallucer"
    layout = (
        "[{category, basic: {video, question, answer: yes, predict?}, hallucination: {video, "
        "question, answer: no, predict?}}, ...]"
    )
    metric = "share of pairs with both answers right, mean over categories; bias towards yes and no"
    suffix = "\nAnswer the question using 'yes' or 'no'."
    strict = "the yes or no that is meant; contradictions are none"
    legacy = "the right word anywhere, so that an answer with both words is right on either side"
    source = "Wang et al. 2024, arXiv:2406.16338; pritamqu/RRPO, eval/videohallucer"
    unit = "pair"
    plain = frozenset(("yes_diff", "no_diff"))

    def items(self, source: Source) -> Iterator[Question]:
        """Two questions an entry; pairs are numbered from 0 in their category."""
        counts: dict[str, int] = defaultdict(int)
        folders = {category: folder for folder, category in CATEGORIES.items()}
        stem = source.path.stem
        for both in source.entries():
            category = both.maybe("category") or CATEGORIES.get(stem, stem)
            pair = f"{category}/{counts[category]}"
            counts[category] += 1
            for side in SIDES:
                asked = both.inner(side)
                video = asked.text("video")
                yield Question(
                    id=f"{pair}/{side}",
                    task=category,
                    prompt=asked.text("question") + self.suffix,
                    video=f"{folders[category]}/videos/{video}" if category in folders else video,
                    answer=asked.text("answer").strip().lower(),
                    pair_id=pair,
                    meta={"side": side},
                    said=asked.said("predict"),
                )

    def judge(self, text: str, row: Prediction, legacy: bool) -> Verdict:
        """Whether the answer is the right one of yes and no."""
        if legacy:
            first = _YES_NO.search(text)
            return Verdict(first[1].lower() if first else None, says(row.answer, text))
        read = yes_no(text)
        return Verdict(read, read == row.answer)

    def tally(self, rows: Sequence[Prediction], legacy: bool) -> tuple[Sheet, list[Verdict]]:
        """Count pairs; the half of a pair that is not there at all is wrong too."""
        sheet, verdicts = Sheet(), [self.verdict(row, legacy) for row in rows]
        pairs: dict[str, Halves] = defaultdict(dict)
        for row, verdict in zip(rows, verdicts, strict=True):
            pairs[self.unit_of(row)][_side(row)] = (row, verdict)
        for pair, halves in pairs.items():
            right = {side: side in halves and halves[side][1].right for side in SIDES}
            right["accuracy"] = all(right.values())
            category = next(iter(halves.values()))[0].task
            sheet.add(pair, {f"pairs/{category}": 1})
            sheet.add(pair, {f"{name}/{category}": hit for name, hit in right.items()})
            sheet.add(pair, _published_bias(halves) if legacy else _bias(halves))
        return sheet, verdicts

    def metrics(self, sums: Sums) -> dict[str, Metric]:
        """Means over categories first."""
        pairs = {n.removeprefix("pairs/"): v for n, v in sums.items() if n.startswith("pairs/")}
        by_category = {
            f"{name}/{category}": ratio(sums[f"{name}/{category}"], of_category)
            for name in ("accuracy", *SIDES)
            for category, of_category in pairs.items()
        }
        found = {
            name: mean([by_category[f"{name}/{category}"].value for category in pairs])
            for name in ("accuracy", *SIDES)
        }
        for word in ("yes", "no"):
            said, right = sums[f"said_{word}"], sums[f"is_{word}"]
            found[f"{word}_diff"] = share(said - right, 2 * right)
        total = np.sum(list(pairs.values()), axis=0)
        over_pairs = {name: Metric(value, total) for name, value in found.items()}
        return over_pairs | {"fp_ratio": ratio(sums["false_yes"], sums["wrong"])} | by_category


def _side(row: Prediction) -> str:
    side = row.meta.get("side") or {"yes": "basic", "no": "hallucination"}.get(row.answer)
    if side not in SIDES:
        raise DataError(f"{row.id}: the answer must be yes or no, or meta.side one of {SIDES}")
    return str(side)


def _bias(halves: Halves) -> dict[str, float]:
    """What is said to both questions against what is right.

    Source: Guan et al. 2023, HallusionBench, arXiv:2310.14566: (said - right) / questions, and the
    share of wrong answers that say yes.
    """
    both = list(halves.values())
    return {
        "said_yes": sum(v.read == "yes" for _, v in both),
        "said_no": sum(v.read == "no" for _, v in both),
        "is_yes": sum(row.answer == "yes" for row, _ in both),
        "is_no": sum(row.answer == "no" for row, _ in both),
        "wrong": sum(not v.right for _, v in both),
        "false_yes": sum(row.answer == "no" and v.read == "yes" for row, v in both),
    }


def _published_bias(halves: Halves) -> dict[str, float]:
    """As the published script counts: a wrong answer counts the other half's answer once more.

    A basic question whose answer is not yes adds the no of the other half a second time, and a
    made-up one whose answer is not no adds the basic yes a second time, which is a false positive.

    Source: pritamqu/RRPO, eval/videohallucer/evaluation_bias.py.
    """
    text = {side: row.prediction or "" for side, (row, _) in halves.items()}
    yes, no = says("yes", text.get("basic", "")), says("no", text.get("hallucination", ""))
    return {
        "said_yes": yes + (yes and not no),
        "said_no": no + (no and not yes),
        "is_yes": 1,
        "is_no": 1,
        "wrong": (not yes) + (not no),
        "false_yes": yes and not no,
    }


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

    def items(self, source: Source) -> Iterator[Question]:
        """A question and a clip each; the file holds right answers."""
        for key, number, text, clips in _asked(source):
            for clip, answer in clips.items():
                yield Question(
                    id=f"{key}/{number}/{clip}",
                    task="bqa",
                    prompt=text + self.suffix,
                    video=f"{clip}.mp4",
                    answer=str(answer).strip().lower(),
                    pair_id=f"{key}/{number}",
                    meta={"video": key},
                )

    def answers(self, source: Source) -> dict[str, str | None]:
        """The same shape, with what the model said in the place of what is right."""
        return {
            f"{key}/{number}/{clip}": None if said is None else str(said)
            for key, number, _, clips in _asked(source)
            for clip, said in clips.items()
        }

    def judge(self, text: str, row: Prediction, legacy: bool) -> Verdict:
        """Whether one clip's answer is right."""
        read = text.strip().split(".")[0].split(",")[0].strip().lower() if legacy else yes_no(text)
        return Verdict(read, read == row.answer.lower())

    def verdict(self, row: Prediction, legacy: bool) -> Verdict:
        """A missing clip is wrong; whether its question is left out is told by the other clips."""
        missing = row.prediction is None
        return Verdict(None, False) if missing else super().verdict(row, legacy)

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

    def items(self, source: Source) -> Iterator[Question]:
        """A clip each."""
        for key, clips in source.keyed():
            for clip, item in entry(clips, f"{source.path} {key!r}").value.items():
                asked = entry(item, f"{source.path} {key!r} {clip!r}")
                choices = asked.inner("Choices").value
                if list(choices) != list(LETTERS[: len(choices)]):
                    raise DataError(f"{asked.where}: the keys of `Choices` must be A, B, ...")
                right = re.findall("[A-D]", asked.text("Correct Answer").upper())
                lines = [f"{key}. {value}\n" for key, value in choices.items()]
                yield Question(
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
                    said=asked.said("Model Answer"),
                )

    def judge(self, text: str, row: Prediction, legacy: bool) -> Verdict:
        """Compare sets of letters."""
        options = row.options or ("",) * 4
        given = published_letters(text, row.options) if legacy else letters(text, options)
        return Verdict("".join(sorted(given)) or None, given == frozenset(row.answer))

    def groups(self, row: Prediction) -> Mapping[str, str]:
        """By how many letters are right."""
        return {"right options": "one" if len(row.answer) == 1 else "several"}


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

    def items(self, source: Source) -> Iterator[Question]:
        """A video each; `meta.locations` are the right places."""
        for video, item in source.keyed():
            asked = entry(item, f"{source.path} {video!r}")
            yield Question(
                id=video,
                task="sth",
                prompt=self.PROMPT,
                video=f"{video}.mp4",
                answer=asked.text("Scene change").strip().lower(),
                meta={"video": video, "locations": asked.maybe("Locations") or ""},
                said=asked.said("prediction", "Model Answer"),
            )

    def answers(self, source: Source) -> dict[str, str | None]:
        """`{video: text}`, or the layout of questions with answers inside."""
        if all(isinstance(value, str) for _, value in source.keyed()):
            return dict(source.keyed())
        return super().answers(source)

    def judge(self, text: str, row: Prediction, legacy: bool) -> Verdict:
        """Whether a change is seen where there is one."""
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
            sheet.add(unit, dict.fromkeys((*_CELLS, "alike"), 0.0))
            if not verdict.counted:
                continue
            says_yes = verdict.right == (row.answer == "yes")
            sheet.add(unit, {f"{'t' if verdict.right else 'f'}{'p' if says_yes else 'n'}": 1})
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

    def metrics(self, sums: Sums) -> dict[str, Metric]:
        """The score and its parts; a correlation that is not defined counts 0."""
        tp, fn, fp, tn = (sums[name] for name in _CELLS)
        norm = np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
        mcc = np.nan_to_num(share(tp * tn - fp * fn, norm))
        classification = ((mcc + 1) / 2) ** 2
        description = np.nan_to_num(share(sums["alike"], 2 * tp))
        seen = tp + fn + fp + tn
        return {
            "score": Metric(0.6 * classification + 0.4 * description, seen),
            "mcc": Metric(mcc, seen),
            "classification": Metric(classification, seen),
            "description": Metric(description, tp),
            "accuracy": ratio(tp + tn, seen),
            "recall": ratio(tp, tp + fn),
            "specificity": ratio(tn, tn + fp),
        }

    def notes(self) -> list[str]:
        """What the similarity is."""
        counted = "cosine of word counts, not the SimCSE embeddings of published numbers"
        named = f"similarity by {self.label or self.similarity}"
        return [f"description: {counted if self.similarity is word_cosine else named}"]


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

    def items(self, source: Source) -> Iterator[Question]:
        """An entry each."""
        for key, item in source.keyed():
            asked = entry(item, f"{source.path} {key!r}")
            video = asked.text("video")
            yield Question(
                id=key,
                task="tsh",
                prompt=asked.text("Question") + self.suffix,
                video=f"{video}.mp4",
                answer=asked.text("Correct Answer").strip().upper(),
                meta={"video": video},
                said=asked.said("Model Answer"),
            )

    def judge(self, text: str, row: Prediction, legacy: bool) -> Verdict:
        """Whether the order is right."""
        read = (published_order if legacy else order)(text)
        return Verdict(read, read == row.answer)
