"""LongVideoBench: questions on videos of up to an hour."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mmalign.benchmark.choice import Choice, listed, right_letter
from mmalign.benchmark.parsers import LETTERS
from mmalign.benchmark.records import Prediction, Question
from mmalign.benchmark.sources import Source
from mmalign.errors import DataError


class LongVideoBench(Choice):
    """Accuracy, in all and by duration and category."""

    name = "longvideobench"
    title = "LongVideoBench, validation"
    layout = "[{id, video_path, question, candidates, correct_choice: int, prediction?}, ...]"
    metric = "accuracy over all questions; by duration group and category besides"
    suffix = "\nAnswer with the option's letter from the given choices directly."
    source = "Wu et al. 2024, arXiv:2407.15754; pritamqu/RRPO, eval/longvideobench"

    def items(self, source: Source) -> Iterator[tuple[Question, str | None]]:
        """Question files, and `{id, pred, gt}` as RRPO writes answers."""
        for entry in source.entries():
            name = entry.text("id")
            drawn = entry.maybe("video_id") or name.rpartition("_")[0] or name
            if "candidates" not in entry.value:
                answer = right_letter(entry.text("gt"), (), entry.where)
                question = Question(name, "", "", "", answer, meta={"video": drawn})
                yield question, entry.maybe("pred", "prediction")
                continue
            options = entry.texts("candidates")
            index = entry.value.get("correct_choice")
            if not isinstance(index, int) or not 0 <= index < len(options):
                most = len(options) - 1
                raise DataError(
                    f"{entry.where}: `correct_choice` must be 0 to {most}; found {index!r}"
                )
            named = {
                "duration": entry.maybe("duration_group"),
                "category": entry.maybe("question_category"),
            }
            question = Question(
                id=name,
                task=named["category"] or "",
                prompt=listed(entry.text("question"), options, "{}. {}") + self.suffix,
                video=entry.text("video_path"),
                options=tuple(options),
                answer=LETTERS[index],
                meta={"video": drawn, **{key: value for key, value in named.items() if value}},
            )
            yield question, entry.maybe("prediction", "pred", "response")

    def groups(self, row: Prediction) -> Mapping[str, str]:
        """By duration and category where they are known."""
        return {key: str(row.meta[key]) for key in ("duration", "category") if key in row.meta}
