"""`mmalign bench`: numbers on video benchmarks from files of answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from mmalign.cli.parts import (
    Base,
    Checkpoint,
    Config,
    Overrides,
    Written,
    argument,
    group,
    option,
    resumable,
    say,
    setting,
)
from mmalign.errors import ConfigError

app = group("Numbers on video benchmarks, from files of questions and answers.")

Name = Annotated[str, option("--benchmark NAME", "`mmalign bench list` lists them")]
QuestionFiles = Annotated[
    list[Path] | None,
    option(
        "--questions FILE",
        "the benchmark's question file, where files of answers do not hold every question; "
        "repeat it",
    ),
]
Legacy = Annotated[
    bool, option("--legacy", "read answers as the published code does, mistakes included")
]
LegacyOf = Annotated[
    str | None,
    option(
        "--legacy-of NAME",
        "--legacy, and whose code it follows, where there are several: tvbench and mvbench "
        "have rrpo (its copies, as --legacy alone) and original",
    ),
]
AsJson = Annotated[bool, option("--json", "print JSON instead of a table")]
SimilarityName = Annotated[
    str | None,
    option(
        "--similarity MODULE:FUNCTION",
        "of vidhalluc-sth: how alike two texts are; by default cosine of word counts",
    ),
]
Seed = Annotated[int, setting("--seed N", "of the resampling")]


@app.command("list", short_help="List the benchmarks, their files and metrics.")
def bench_list() -> None:
    """List the benchmarks with their files, metrics and ways to read an answer."""
    from mmalign.bench import BENCHMARKS
    from mmalign.bench.score import listing

    say(listing(BENCHMARKS.values()))


@app.command("score", short_help="Score a file of answers.")
def bench_score(
    files: Annotated[
        list[Path], argument("FILE", "answers: common JSONL, or the benchmark's own files")
    ],
    benchmark: Name,
    questions: QuestionFiles = None,
    legacy: Legacy = False,
    legacy_of: LegacyOf = None,
    out: Annotated[
        Path | None, option("--out DIR", "write score.json, and rows.jsonl with every reading")
    ] = None,
    as_json: AsJson = False,
    similarity: SimilarityName = None,
    seed: Seed = 0,
) -> None:
    """Score answers: accuracy or the benchmark's own metric, by category, with 95 % intervals.

    For example: mmalign bench score predictions.jsonl --benchmark tvbench --out scores/tvbench
    """
    from mmalign.bench import find, read_files, score
    from mmalign.bench.score import score_text

    kind = find(benchmark, similarity, legacy_of)
    rows = read_files(kind, files, questions or ())
    found = score(kind, rows, legacy=legacy or legacy_of is not None, seed=seed)
    say(json.dumps(found.summary(), indent=2) if as_json else score_text(found))
    if out is not None:
        summary, readings = found.write(out)
        say(f"summary: {summary}\nrows:    {readings}", err=as_json)


@app.command("compare", short_help="Compare two runs on the same questions.")
def bench_compare(
    a: Annotated[Path, argument("A", "answers of the one run")],
    b: Annotated[Path, argument("B", "answers of the other, to the same questions")],
    benchmark: Name,
    questions: QuestionFiles = None,
    legacy: Legacy = False,
    legacy_of: LegacyOf = None,
    as_json: AsJson = False,
    similarity: SimilarityName = None,
    seed: Seed = 0,
) -> None:
    """Compare two runs by a paired bootstrap: the same pairs or videos are drawn in both.

    For example: mmalign bench compare base.jsonl rrpo.jsonl --benchmark videohallucer
    """
    from mmalign.bench import compare, find, read_files
    from mmalign.bench.score import comparison_text

    kind = find(benchmark, similarity, legacy_of)
    runs = [read_files(kind, [path], questions or ()) for path in (a, b)]
    published = legacy or legacy_of is not None
    found = compare(kind, runs[0], runs[1], legacy=published, seed=seed)
    as_text = comparison_text(found, (str(a), str(b)))
    say(json.dumps(found.summary(), indent=2) if as_json else as_text)


@app.command("convert", short_help="Write a benchmark's own files as common JSONL.")
def bench_convert(
    files: Annotated[list[Path], argument("FILE", "the benchmark's own files with answers")],
    benchmark: Name,
    out: Written,
    questions: QuestionFiles = None,
) -> None:
    """Write answers in a benchmark's own layout as the JSONL that all benchmarks share."""
    from mmalign.bench import find, read_files, write_predictions

    kind = find(benchmark)
    rows = read_files(kind, files, questions or ())
    write_predictions(out, rows)
    missing = sum(row.prediction is None for row in rows)
    say(f"{out}: {len(rows)} questions written, {missing} without an answer")


@app.command("predict", short_help="Answer a benchmark's questions with a model.")
def bench_predict(
    config: Config,
    benchmark: Name,
    questions: Annotated[
        list[Path],
        option("--questions FILE", "the benchmark's question file; repeat it"),
    ],
    media: Annotated[Path, option("--media DIR", "folder that the paths of clips start from")],
    out: Written,
    overrides: Overrides = None,
    checkpoint: Checkpoint = None,
    base: Base = False,
    batch: Annotated[
        int | None,
        option("--batch N", "questions at one time; by default train.eval_batch_size", min=1),
    ] = None,
) -> None:
    """Answer a benchmark's questions with a model, with the settings of CONFIG's `sample`.

    Run it again to go on after an interruption. Clips that cannot be shown are named once, and
    their questions have no answer, which counts as wrong.

    For example: mmalign bench predict configs/rrpo_llavaov.yaml --base --benchmark videohallucer
    --questions obj_rel.json --media clips --out base.jsonl
    """
    from mmalign import config as configs
    from mmalign.bench import find
    from mmalign.bench import questions as questions_of
    from mmalign.pairs.predict import predict

    name = find(benchmark).name
    if base and checkpoint is not None:
        raise ConfigError("predict: --base is the untrained model, so it has no --checkpoint")
    asked = [question for file in questions for question in questions_of(name, file)]
    settings = configs.load(config, overrides or ())
    with resumable("predict", out) as progress:
        found = predict(
            settings,
            name,
            asked,
            media,
            out,
            checkpoint=checkpoint,
            base=base,
            batch=batch,
            progress=progress,
        )
    say(found.text())
