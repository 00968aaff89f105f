"""Video benchmarks: their question files, their metrics, and how sure the numbers are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

from mmalign.bench.avqa import MusicAVQA
from mmalign.bench.base import (
    Benchmark,
    Prediction,
    Question,
    Source,
    common,
    distinct,
    is_common,
    load,
    named,
    write_predictions,
)
from mmalign.bench.choice import AVQA, MLVU, LongVideoBench, MVBench, TVBench, VideoMME
from mmalign.bench.hallucination import (
    VideoHallucer,
    VidHallucBQA,
    VidHallucMCQ,
    VidHallucSTH,
    VidHallucTSH,
)
from mmalign.bench.parsers import named_similarity
from mmalign.bench.score import Comparison, Score, compare, score
from mmalign.bench.tempcompass import Captioning, CaptionMatching, MultiChoice, YesNo
from mmalign.errors import ConfigError, DataError

__all__ = [
    "BENCHMARKS",
    "Comparison",
    "Prediction",
    "Question",
    "Score",
    "compare",
    "find",
    "questions",
    "read_files",
    "score",
    "write_predictions",
]

BENCHMARKS: dict[str, type[Benchmark]] = {
    kind.name: kind
    for kind in (
        VideoHallucer, VidHallucBQA, VidHallucMCQ, VidHallucSTH, VidHallucTSH, MultiChoice, YesNo,
        CaptionMatching, Captioning, TVBench, MVBench, VideoMME, MLVU, LongVideoBench, MusicAVQA,
        AVQA,
    )
}  # fmt: skip


def find(name: str, similarity: str | None = None, code: str | None = None) -> Benchmark:
    """A benchmark by name.

    Args:
        name: A key of `BENCHMARKS`.
        similarity: Of `vidhalluc-sth` alone: `my_package.module:function` of two texts.
        code: Whose code the legacy reading follows, one of the benchmark's `codes`.

    Raises:
        ConfigError: There is none of that name, it compares no texts, or has no such code.
    """
    if name not in BENCHMARKS:
        near = get_close_matches(name, BENCHMARKS, 1)
        meant = f"Did you mean {near[0]!r}?" if near else "`mmalign bench list` lists them"
        raise ConfigError(f"--benchmark {name}: there is no such benchmark. {meant}")
    kind = BENCHMARKS[name]
    if code is not None and code not in kind.codes:
        known = f"must be one of {', '.join(kind.codes)}" if kind.codes else "it has one code alone"
        raise ConfigError(f"--legacy-of {code}: {known} for {name}")
    if similarity is not None and name != VidHallucSTH.name:
        raise ConfigError(f"--similarity: only {VidHallucSTH.name} compares descriptions")
    found = kind() if similarity is None else VidHallucSTH(named_similarity(similarity), similarity)
    found.code = code or ""
    return found


def questions(benchmark: str, file: str | Path) -> list[Question]:
    """The questions of a published file, as they are asked.

    Raises:
        ConfigError: No such benchmark.
        DataError: The file is not in its layout.
    """
    return _items(find(benchmark), load(Path(file)))


def read_files(
    benchmark: Benchmark, files: Sequence[Path], question_files: Sequence[Path] = ()
) -> list[Prediction]:
    """Questions with a model's answers.

    Args:
        benchmark: Whose files they are.
        files: Answers: common JSONL, or the benchmark's own files with answers inside.
        question_files: The benchmark's question files, where `files` may not hold every question.
            What has no answer then is missing.

    Raises:
        DataError: A file that cannot be read; answers to questions that are not there.
    """
    where = ", ".join(map(str, files))
    asked = [
        question.answered(benchmark.name, None)
        for path in question_files
        for question in _items(benchmark, load(path))
    ]
    rows: list[Prediction] = []
    for path in files:
        source = load(path)
        if is_common(source):
            rows += common(source, benchmark.name)
        elif asked:
            with _explained(benchmark):
                known = benchmark.answers(source)
            rows += [Prediction(key, "", "", text, "") for key, text in known.items()]
        else:
            items = _items(benchmark, source)
            rows += [question.answered(benchmark.name, question.said) for question in items]
    found = distinct(rows, where)
    if asked:
        rows = _joined(distinct(asked, ", ".join(map(str, question_files))), found, where)
    if all(row.prediction is None for row in rows):
        raise DataError(
            f"{where}: holds no answers of a model; give the file with the answers as FILE, and "
            "question files with --questions"
        )
    return rows


def _joined(
    asked: dict[str, Prediction], found: dict[str, Prediction], where: str
) -> list[Prediction]:
    unknown = found.keys() - asked.keys()
    if unknown:
        raise DataError(
            f"{where}: {len(unknown)} answers are to none of the questions: {named(unknown)}"
        )
    other = [key for key, row in found.items() if row.answer and row.answer != asked[key].answer]
    if other:
        raise DataError(f"{where}: other answers are right than in --questions: {named(other)}")
    for key, row in found.items():
        rating = {name: value for name, value in row.meta.items() if name == "rating"}
        question = asked[key]
        meta = {**question.meta, **rating}
        asked[key] = replace(question, prediction=row.prediction, meta=meta)
    return list(asked.values())


def _items(benchmark: Benchmark, source: Source) -> list[Question]:
    with _explained(benchmark):
        found = list(benchmark.items(source))
    if not found:
        raise DataError(f"{source.path}: holds no questions")
    return found


@contextmanager
def _explained(benchmark: Benchmark) -> Iterator[None]:
    """Says behind an error what files of the benchmark hold."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{error}. {benchmark.name} reads {benchmark.layout}") from error
