"""`mmalign data make`: new preference pairs out of a model's own answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmalign.cli_compare import shown
from mmalign.cli_parts import argument, group, option, say
from mmalign.errors import ConfigError

if TYPE_CHECKING:
    from mmalign.making.answers import Answers
    from mmalign.making.recipes import Recipe
    from mmalign.making.rows import Source

app = group("Make preference pairs out of a model's own answers about clips.")

Config = Annotated[
    str | None, argument("CONFIG", "YAML file of the model; not with --answers, which needs none")
]
Overrides = Annotated[
    list[str] | None,
    argument("KEY=VALUE", "override one value of CONFIG, e.g. sample.temperature=0.8"),
]
Data = Annotated[
    str, option("--data", metavar="FILE", text="records with a clip, a question and its answer")
]
Out = Annotated[
    Path,
    option("--out", metavar="FILE", text="the JSONL file to write, in or above the clips' folder"),
]
Checkpoint = Annotated[
    Path | None,
    option(
        "--checkpoint",
        metavar="DIR",
        text="trained weights: a checkpoint-N or final folder; by default the model of CONFIG as "
        "it was before training",
    ),
]
Num = Annotated[
    int | None,
    typer.Option(
        "--num", metavar="N", min=1, help="answers sampled a record; by default 4",
        show_default=False,
    ),
]  # fmt: skip
Keep = Annotated[int, typer.Option("--keep", metavar="N", min=1, help="pairs a record, at most")]
Seed = Annotated[
    int | None,
    option("--seed", metavar="N", text="of altered clips and answers; by default 0"),
]
AnswersFile = Annotated[
    Path | None,
    option(
        "--answers",
        metavar="FILE",
        text="take the answers from here instead of sampling: JSONL of `id` with `pred` or "
        "`answers`; `wrong: true` says that they are",
    ),
]
Layout = Annotated[
    str | None, option("--layout", metavar="NAME", text="of FILE; found by itself when left out")
]
DropBad = Annotated[
    bool, option("--drop-bad", text="leave out records with problems instead of stopping")
]


@app.command("hallucinate", short_help="Wrong answers to altered clips against the right ones.")
def make_hallucinate(
    data: Data,
    out: Out,
    config: Config = None,
    overrides: Overrides = None,
    checkpoint: Checkpoint = None,
    num: Num = None,
    keep: Keep = 1,
    change: Annotated[
        list[str] | None,
        option(
            "--change",
            metavar="NAME",
            text="how the clip is altered, an operation of video.corruption; repeat it, then they "
            "take turns; by default mask_frames, 25 to 50 % of the frames",
        ),
    ] = None,
    likeness: Annotated[
        float,
        typer.Option(
            "--likeness", metavar="X", min=0, max=1,
            help="an open answer that says something else is wrong below this likeness",
        ),
    ] = 0.5,
    seed: Seed = None,
    answers: AnswersFile = None,
    layout: Layout = None,
    drop_bad: DropBad = False,
) -> None:  # fmt: skip
    """Ask a model about clips with hidden frames, keep what it says wrongly, mark what differs.

    The record's answer is `chosen`, the model's is `rejected`, and the phrases in which they differ
    are the spans that RRPO scores. Rules tell what is wrong; what they cannot tell is left out.
    Run it again to go on after an interruption.

    For example: mmalign data make hallucinate configs/rrpo_llavaov.yaml
    --data qa.jsonl --out pairs.jsonl --num 8 sample.temperature=0.8
    """
    from mmalign.making.recipes import Hallucinate
    from mmalign.making.rows import Source

    if answers is not None and change:
        raise ConfigError("--change alters clips before they are asked about; not with --answers")
    source = _answers(
        config, overrides, checkpoint, answers, num, seed, tuple(change or ["mask_frames"])
    )
    _make(Source(data, layout, drop_bad), out, source, Hallucinate(keep, likeness))


@app.command("ambiguous", short_help="Vague answers against specific ones.")
def make_ambiguous(
    data: Data,
    out: Out,
    config: Config = None,
    overrides: Overrides = None,
    checkpoint: Checkpoint = None,
    num: Num = None,
    keep: Keep = 1,
    judge: Annotated[
        Path | None,
        option(
            "--judge",
            metavar="FILE",
            text="JSONL of `id` and `score`, or `scores`, one an answer of --answers: 0 exact to 1 "
            "vague, in place of the rules",
        ),
    ] = None,
    threshold: Annotated[
        float,
        typer.Option("--threshold", metavar="X", min=0, max=1, help="vague from this score on"),
    ] = 0.5,
    consistency: Annotated[
        float,
        typer.Option(
            "--consistency", metavar="X", min=0, max=1,
            help="all answers are vague where their mean likeness is below; 0: never",
        ),
    ] = 0.2,
    own: Annotated[
        bool,
        option("--own", text="the specific answer is the model's too, not the record's"),
    ] = False,
    weigh: Annotated[bool, option("--weigh", text="the score is the pair's weight")] = False,
    seed: Seed = None,
    answers: AnswersFile = None,
    layout: Layout = None,
    drop_bad: DropBad = False,
) -> None:  # fmt: skip
    """Ask a model several times, find what it answers vaguely, pair that with a specific answer.

    Hedges, words for anything and answers that name nothing of the clip's clues are vague, and so
    are answers that differ each time; or an outside judge says it. To have one, run this once, let
    it score the written NAME.answers.jsonl, and run it again with --answers and --judge.

    For example: mmalign data make ambiguous configs/adpo_qwen25omni.yaml --data qa.jsonl
    --out pairs.jsonl sample.temperature=0.8
    """
    from mmalign.making.recipes import Ambiguous
    from mmalign.making.rows import Source
    from mmalign.making.scores import Scores

    if judge is not None and answers is None:
        raise ConfigError("--judge scores answers that are there already: give them by --answers")
    if judge is not None and consistency != 0.2:
        raise ConfigError("--consistency is a rule, and --judge takes the place of all rules")
    source = _answers(config, overrides, checkpoint, answers, num, seed, ())
    scores = None if judge is None else Scores(judge)
    recipe = Ambiguous(keep, threshold, consistency, scores, own, weigh)
    _make(Source(data, layout, drop_bad), out, source, recipe)


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
    from mmalign.making.answers import Filed, Sampled

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
    from mmalign.making.make import make

    try:
        with shown("make") as progress:
            result = make(source, out, answers, recipe, progress=progress)
    except KeyboardInterrupt:
        say(f"stopped; the answers are in {out}.partial: run it again to go on", err=True)
        raise typer.Exit(130) from None
    say(result.text())
