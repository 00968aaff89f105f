"""VidHalluc, scene transitions: whether the scene changes, and from where to where."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

from mmalign.benchmark.base import Benchmark, Verdict
from mmalign.benchmark.parsers import yes_no
from mmalign.benchmark.records import Prediction, Question
from mmalign.benchmark.similarity import Similarity, word_cosine
from mmalign.benchmark.sources import Source, entry
from mmalign.benchmark.spoken import final
from mmalign.benchmark.tally import Floats, Sheet, Sums, share

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
            yield question, asked.maybe("prediction", "Model Answer")

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
