"""VideoHallucer: pairs of a question that is true of a video and one that is made up."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

from mmalign.bench.base import (
    Benchmark,
    Floats,
    Prediction,
    Question,
    Sheet,
    Source,
    Sums,
    Verdict,
    mean,
    share,
)
from mmalign.bench.parsers import yes_no
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
_YES_NO = re.compile(r"\b(yes|no)\b", re.IGNORECASE)
_BIAS = ("yes_diff", "no_diff", "fp_ratio")


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
    plain = frozenset(_BIAS[:2])

    def items(self, source: Source) -> Iterator[tuple[Question, str | None]]:
        """Two questions an entry; pairs are numbered from 0 in their category."""
        counts: dict[str, int] = defaultdict(int)
        folders = {category: folder for folder, category in CATEGORIES.items()}
        for entry in source.entries():
            stem = source.path.stem
            category = entry.maybe("category") or CATEGORIES.get(stem, stem)
            pair = f"{category}/{counts[category]}"
            counts[category] += 1
            for side in SIDES:
                asked = entry.inner(side)
                video = asked.text("video")
                question = Question(
                    id=f"{pair}/{side}",
                    task=category,
                    prompt=asked.text("question") + self.suffix,
                    video=f"{folders[category]}/videos/{video}" if category in folders else video,
                    answer=asked.text("answer").strip().lower(),
                    pair_id=pair,
                    meta={"side": side},
                )
                yield question, asked.said("predict")

    def judge(self, row: Prediction, legacy: bool) -> Verdict:
        """Whether the answer is the right one of yes and no."""
        text = row.prediction or ""
        if legacy:
            first = _YES_NO.search(text)
            return Verdict(first[1].lower() if first else None, says(row.answer, text))
        read = yes_no(text)
        return Verdict(read, read == row.answer)

    def tally(self, rows: Sequence[Prediction], legacy: bool) -> tuple[Sheet, list[Verdict]]:
        """Count pairs; the half of a pair that is not there at all is wrong too."""
        sheet, verdicts = Sheet(), [self.verdict(row, legacy) for row in rows]
        pairs: dict[str, dict[str, tuple[Prediction, Verdict]]] = defaultdict(dict)
        for row, verdict in zip(rows, verdicts, strict=True):
            pairs[self.unit_of(row)][_side(row)] = (row, verdict)
        for pair, halves in pairs.items():
            right = {side: side in halves and halves[side][1].right for side in SIDES}
            right["accuracy"] = all(right.values())
            category = next(iter(halves.values()))[0].task
            sheet.put(pair, {f"pairs/{category}": 1})
            sheet.put(pair, {f"{name}/{category}": hit for name, hit in right.items()})
            sheet.put(pair, _published_bias(halves) if legacy else _bias(halves))
        return sheet, verdicts

    def metrics(self, sums: Sums) -> dict[str, Floats]:
        """Means over categories first, [R] each."""
        categories = [n.removeprefix("pairs/") for n in sums if n.startswith("pairs/")]
        names = ("accuracy", *SIDES)
        by_category = {
            f"{name}/{category}": share(sums[f"{name}/{category}"], sums[f"pairs/{category}"])
            for name in names
            for category in categories
        }
        found = {name: mean([by_category[f"{name}/{c}"] for c in categories]) for name in names}
        bias = {
            "yes_diff": share(sums["said_yes"] - sums["is_yes"], 2 * sums["is_yes"]),
            "no_diff": share(sums["said_no"] - sums["is_no"], 2 * sums["is_no"]),
            "fp_ratio": share(sums["false_yes"], sums["wrong"]),
        }
        return found | bias | by_category

    def sizes(self, sums: Sums) -> dict[str, int]:
        """Pairs, in all and of a category; for the false positive ratio, wrong answers."""
        pairs = {n.removeprefix("pairs/"): int(v[0]) for n, v in sums.items() if "pairs/" in n}
        names = ("accuracy", *SIDES)
        total: dict[str, int] = dict.fromkeys((*names, *_BIAS[:2]), sum(pairs.values()))
        total["fp_ratio"] = int(sums["wrong"][0])
        return total | {f"{name}/{c}": pairs[c] for name in names for c in pairs}


Halves = dict[str, tuple[Prediction, Verdict]]


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
