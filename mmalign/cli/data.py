"""`mmalign data`.

Check and convert preference data, score it, and make pairs of a model's own responses.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmalign.cli.drawing import data_generate
from mmalign.cli.judging import data_score, data_select
from mmalign.cli.parts import (
    Config,
    DropBad,
    Layout,
    Overrides,
    Shown,
    Split,
    Written,
    argument,
    group,
    option,
    resumable,
    say,
    setting,
)
from mmalign.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmalign.data.example import Example
    from mmalign.data.jobs import Source
    from mmalign.data.validate import Decode
    from mmalign.pairs.answers import Answers
    from mmalign.pairs.make import Recipe


make_app = group("Make preference pairs from a model's own answers about videos.")

AnswerConfig = Annotated[
    str | None, argument("CONFIG", "YAML file of the model; not with --answers, which needs none")
]
AnswerOverrides = Annotated[
    list[str] | None,
    argument("KEY=VALUE", "override one value of CONFIG, e.g. sample.temperature=0.8"),
]
Data = Annotated[str, option("--data FILE", "records with a video, a question and its answer")]
Out = Annotated[
    Path, option("--out FILE", "the JSONL file to write, in or above the videos' folder")
]
Checkpoint = Annotated[
    Path | None,
    option(
        "--checkpoint DIR",
        "trained weights: a checkpoint-N or final folder; by default the model of CONFIG as "
        "it was before training",
    ),
]
Num = Annotated[int | None, option("--num N", "answers sampled a record; by default 4", min=1)]
Keep = Annotated[int, setting("--keep N", "pairs a record, at most", min=1)]
Seed = Annotated[int | None, option("--seed N", "of corrupted videos and answers; by default 0")]
AnswersFile = Annotated[
    Path | None,
    option(
        "--answers FILE",
        "take the answers from here instead of sampling: JSONL of `id` with `pred` or "
        "`answers`; `wrong: true` says that they are",
    ),
]


@make_app.command(
    "hallucinate", short_help="Wrong answers about corrupted videos against the right ones."
)
def make_hallucinate(
    data: Data,
    out: Out,
    config: AnswerConfig = None,
    overrides: AnswerOverrides = None,
    checkpoint: Checkpoint = None,
    num: Num = None,
    keep: Keep = 1,
    change: Annotated[
        list[str] | None,
        option(
            "--change NAME",
            "how the video is corrupted, an operation of video.corruption; repeat it to take "
            "turns; by default mask_frames, 25 to 50 % of the frames",
        ),
    ] = None,
    likeness: Annotated[
        float,
        setting(
            "--likeness X",
            "an open answer that says something else is wrong below this likeness",
            min=0,
            max=1,
        ),
    ] = 0.5,
    seed: Seed = None,
    answers: AnswersFile = None,
    layout: Layout = None,
    drop_bad: DropBad = False,
) -> None:
    """Ask a model about videos with hidden frames, keep its wrong answers, mark what differs.

    The record's answer is `chosen`, the model's is `rejected`, and the phrases in which they differ
    are the spans that RRPO scores. Rules tell what is wrong; what they cannot tell is left out.
    Run it again to go on after an interruption.

    For example: mmalign data make hallucinate configs/rrpo_llavaov.yaml
    --data qa.jsonl --out pairs.jsonl --num 8 sample.temperature=0.8
    """
    from mmalign.data.jobs import Source
    from mmalign.pairs.make import Hallucinate

    if answers is not None and change:
        raise ConfigError("--change corrupts videos before the model sees them; not with --answers")
    changes = tuple(change or ["mask_frames"])
    asked = _answers(config, overrides, checkpoint, answers, num, seed, changes)
    _make(Source(data, layout=layout, drop_bad=drop_bad), out, asked, Hallucinate(keep, likeness))


@make_app.command("ambiguous", short_help="Vague answers against specific ones.")
def make_ambiguous(
    data: Data,
    out: Out,
    config: AnswerConfig = None,
    overrides: AnswerOverrides = None,
    checkpoint: Checkpoint = None,
    num: Num = None,
    keep: Keep = 1,
    judge: Annotated[
        Path | None,
        option(
            "--judge FILE",
            "JSONL of `id` and `score`, or `scores`, one an answer of --answers: 0 exact to 1 "
            "vague, in place of the rules",
        ),
    ] = None,
    threshold: Annotated[
        float, setting("--threshold X", "vague from this score on", min=0, max=1)
    ] = 0.5,
    consistency: Annotated[
        float,
        setting(
            "--consistency X",
            "all answers are vague where their mean likeness is below; 0: never",
            min=0,
            max=1,
        ),
    ] = 0.2,
    own: Annotated[
        bool, option("--own", "the specific answer is the model's too, not the record's")
    ] = False,
    weigh: Annotated[bool, option("--weigh", "the score is the pair's weight")] = False,
    seed: Seed = None,
    answers: AnswersFile = None,
    layout: Layout = None,
    drop_bad: DropBad = False,
) -> None:
    """Ask a model several times, find what it answers vaguely, pair that with a specific answer.

    Hedges, words for anything and answers that name nothing of the video's clues are vague, and so
    are answers that differ each time; or an outside judge says it. To have one, run this once, let
    it score the written NAME.answers.jsonl, and run it again with --answers and --judge.

    For example: mmalign data make ambiguous configs/adpo_qwen25omni.yaml --data qa.jsonl
    --out pairs.jsonl sample.temperature=0.8
    """
    from mmalign.data.jobs import Source
    from mmalign.pairs.judge import Scores
    from mmalign.pairs.make import Ambiguous

    if judge is not None and answers is None:
        raise ConfigError("--judge scores existing answers: give them by --answers")
    if judge is not None and consistency != 0.2:
        raise ConfigError("--consistency is a rule, and --judge takes the place of all rules")
    source = _answers(config, overrides, checkpoint, answers, num, seed, ())
    scores = None if judge is None else Scores(judge)
    recipe = Ambiguous(keep, threshold, consistency, scores, own, weigh)
    _make(Source(data, layout=layout, drop_bad=drop_bad), out, source, recipe)


def _answers(
    config: str | None,
    overrides: list[str] | None,
    checkpoint: Path | None,
    file: Path | None,
    num: int | None,
    seed: int | None,
    changes: tuple[str, ...],
) -> Answers:
    from mmalign import config as configs
    from mmalign.pairs.answers import Filed, Sampled

    if file is not None:
        if any(given is not None for given in (config, checkpoint, num, seed)):
            raise ConfigError(
                "--answers takes the place of a model: leave out CONFIG, --checkpoint, --num and "
                "--seed"
            )
        return Filed(file)
    if config is None:
        raise ConfigError("give the CONFIG of a model to ask, or its answers with --answers FILE")
    settings = configs.load(config, overrides or ())
    return Sampled(settings, checkpoint, num or 4, seed or 0, changes)


def _make(source: Source, out: Path, answers: Answers, recipe: Recipe) -> None:
    from mmalign.pairs.make import make

    with resumable("make", out) as progress:
        result = make(source, out, answers, recipe, progress=progress)
    say(result.text())


app = group("Look at preference data before training on it, or make some.")
app.add_typer(make_app, name="make")


@app.command("check", short_help="Report every problem of preference files.")
def data_check(
    files: Annotated[
        list[str] | None,
        argument("FILE", "files, saved datasets or hub names; KEY=VALUE overrides of a config"),
    ] = None,
    config: Annotated[
        str | None,
        option(
            "--config CONFIG",
            "look at the rows as training with CONFIG would: its files where none are named, "
            "its tokenizer, chat template and limits",
        ),
    ] = None,
    evaluation: Annotated[
        list[str] | None, option("--eval FILE", "held-out rows, compared with the others; repeat")
    ] = None,
    layout: Layout = None,
    show: Annotated[int, setting("--show N", "places named for each problem", min=0)] = 20,
    decode: Annotated[
        bool, option("--decode", "decode video and audio too; minutes where there are many")
    ] = False,
) -> None:
    """Report every problem of preference files in one pass, with lines, and what is in them."""
    faults = _faults if decode else None
    if config is not None:
        text, code = _check_config(config, files or (), evaluation or (), layout, show, faults)
        say(text)
        raise typer.Exit(code)
    if not files:
        raise ConfigError("data check: name files, or a config with --config")
    from mmalign.data.validate import check_files

    found = check_files(files, eval_paths=evaluation or (), layout=layout, decode=faults)
    say(found.text(show))
    raise typer.Exit(found.exit_code)


def _check_config(
    config: str,
    given: Sequence[str],
    evaluation: Sequence[str],
    layout: str | None,
    show: int,
    faults: Decode | None,
) -> tuple[str, int]:
    """The rows of a config, or of the files that are named, as training with it would see them."""
    from mmalign.data.jobs import waiting

    with waiting("loading libraries"):
        from mmalign import config as configs
        from mmalign.preflight.check import check_rows

        overrides = [item for item in given if "=" in item and not Path(item).exists()]
        run = configs.load(config, overrides)
    changes: dict[str, list[configs.DataSource]] = {}
    for name, paths in (("train", given), ("eval", evaluation)):
        files = [path for path in paths if path not in overrides]
        if files:
            changes[name] = [configs.DataSource(path=path, layout=layout) for path in files]
    data = run.data.model_copy(update=changes)
    return check_rows(run.model_copy(update={"data": data}), show=show, decode=faults)


@app.command("show", short_help="Print rows as the model will see them.")
def data_show(
    config: Config,
    overrides: Overrides = None,
    rows: Annotated[int, setting("--rows N", "how many of the training rows", min=1)] = 3,
) -> None:
    """Print rows as the model will see them: context dim, scored tokens coloured."""
    from rich.console import Console

    from mmalign import config as configs
    from mmalign.inference import show_rows

    shown = show_rows(configs.load(config, overrides or ()), rows)
    Console(highlight=False).print(Shown(shown))


@app.command("convert", short_help="Write any known layout as mmalign's own.")
def data_convert(
    source: Annotated[str, argument("FILE", "file, saved dataset or hub name")],
    out: Written,
    layout: Layout = None,
    split: Split = None,
    drop_bad: DropBad = False,
) -> None:
    """Write a file in any known layout as JSONL in mmalign's own layout."""
    from mmalign.data.records import convert_file

    written, left_out = convert_file(source, out, layout=layout, split=split, drop_bad=drop_bad)
    say(f"{out}: {written} records written, {left_out} left out")


app.command("generate", short_help="Draw several responses to each prompt.")(data_generate)
app.command("score", short_help="Judge responses; score the images of pairs or lists.")(data_score)
app.command("select", short_help="Make pairs of judged responses.")(data_select)


def _faults(rows: Sequence[Example]) -> list[list[str]]:
    """Problems of the media of each row, decoded with the default settings."""
    from mmalign.config import VideoConfig
    from mmalign.video.checks import check_media

    report = check_media(rows, VideoConfig(), uses_audio=False)
    return [report.of(row, uses_audio=False) for row in rows]
