"""AVQA: questions about what is seen and heard, four options each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mmalign.benchmark.base import Verdict
from mmalign.benchmark.choice import Choice, listed
from mmalign.benchmark.parsers import LETTERS, letter
from mmalign.benchmark.records import Prediction, Question
from mmalign.benchmark.sources import Source
from mmalign.errors import DataError


class AVQA(Choice):
    """Accuracy, in all and by type of question."""

    name = "avqa"
    title = "AVQA"
    layout = "[{id, video_name, question_text, multi_choice: [4], answer: int, prediction?}, ...]"
    metric = "accuracy over all questions; by question type and relation besides"
    suffix = "\nAnswer with the option's letter from the given choices directly. (ours)"
    legacy = "the same: the published code classifies and reads no text"
    skips_missing = False
    source = "Yang et al. 2022, AVQA (ACM Multimedia)"

    def items(self, source: Source) -> Iterator[tuple[Question, str | None]]:
        """Answers are counted from 0."""
        for entry in source.entries():
            options = entry.texts("multi_choice")
            index = entry.value.get("answer")
            if not isinstance(index, int) or not 0 <= index < len(options):
                raise DataError(
                    f"{entry.where}: `answer` must be 0 to {len(options) - 1}; found {index!r}"
                )
            prompt = listed(entry.text("question_text"), options)
            named = {"type": "question_type", "relation": "question_relation"}
            meta = {key: entry.maybe(name) for key, name in named.items()}
            question = Question(
                id=entry.text("id"),
                task=meta["type"] or "",
                prompt=prompt + self.suffix.removesuffix(" (ours)"),
                video=f"{entry.text('video_name')}.mp4",
                options=tuple(options),
                answer=LETTERS[index],
                meta={key: value for key, value in meta.items() if value},
            )
            yield question, entry.maybe("prediction", "pred", "response")

    def judge(self, row: Prediction, legacy: bool) -> Verdict:
        """One way to read, legacy or not."""
        read = letter(row.prediction or "", row.options)
        return Verdict(read, read == row.answer)

    def groups(self, row: Prediction) -> Mapping[str, str]:
        """By type and relation where they are known."""
        return {key: str(row.meta[key]) for key in ("type", "relation") if key in row.meta}
