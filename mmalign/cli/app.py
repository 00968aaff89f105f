"""The `mmalign` command. Each subcommand parses its arguments and calls one function."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Literal

import typer

from mmalign import __version__
from mmalign.cli import bench, pictures, rounds
from mmalign.cli import data as cli_data
from mmalign.cli.parts import (
    Base,
    Checkpoint,
    Config,
    Message,
    Overrides,
    argument,
    group,
    option,
    say,
    setting,
    warning_text,
)
from mmalign.errors import ConfigError

EXIT_STATUS = (
    "Exit status: 0 done, 1 wrong input, 2 wrong usage, 3 loss became non-finite, "
    "130 stopped by Ctrl-C or train.max_time."
)

app = group("Preference alignment for text, image and video models, with one set of losses.")
quickstart_app = group("See an alignment run from start to report, on shipped data.")
app.add_typer(bench.app, name="bench")
app.add_typer(cli_data.app, name="data")
app.add_typer(quickstart_app, name="quickstart")


def _version(wanted: bool) -> None:
    if wanted:
        say(f"mmalign {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    # Libraries' notes to developers do not help a user, nor do their progress bars in a log file.
    warnings.filterwarnings("ignore", category=FutureWarning)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    logging.setLogRecordFactory(Message)
    warnings.formatwarning = warning_text


@app.command(epilog=EXIT_STATUS, short_help="Train the model described by CONFIG.")
def train(
    config: Config,
    overrides: Overrides = None,
    resume: Annotated[
        bool, option("--resume", "continue from the newest complete checkpoint in `output`")
    ] = False,
    dry_run: Annotated[
        bool,
        option(
            "--dry-run", "load, run one batch forward and backward, print shapes and memory, stop"
        ),
    ] = False,
) -> None:
    """Train the model described by CONFIG and write everything to its `output` folder."""
    from mmalign.data.cache import no_collection
    from mmalign.data.jobs import is_main_process, waiting

    with waiting("loading libraries"), no_collection():
        from mmalign import config as configs
        from mmalign.data.files import require_there
        from mmalign.preflight.check import check_config

        run = configs.load(config, overrides or ())
        require_there(*run.data.paths)  # which takes a moment; the checks load libraries
        check_config(run, where=config)

        from mmalign.train.loop import train as train_run

    result = train_run(run, resume=resume, dry_run=dry_run)
    if result.stopped:
        raise typer.Exit(130)
    if result.final_dir is not None and is_main_process():
        from mmalign.report import write_report

        page = write_report([result.run_dir], result.run_dir / "report.html")
        say(f"weights: {result.final_dir}\nreport:  {page}")


app.command(epilog=EXIT_STATUS, short_help="Draw, judge, pair, train, repeat.")(rounds.rounds)


@app.command("eval", short_help="Score held-out rows under trained weights.")
def evaluate(
    config: Config,
    overrides: Overrides = None,
    checkpoint: Checkpoint = None,
    data: Annotated[
        str | None, option("--data FILE", "rows to score instead of those of CONFIG")
    ] = None,
    out: Annotated[Path | None, option("--out FILE", "also write the numbers as JSON")] = None,
    own_loss: Annotated[
        bool,
        option(
            "--own-loss", "CONFIG is that of a run folder with a loss of its own: import that code"
        ),
    ] = False,
) -> None:
    """Score held-out rows: loss, ranking and reward accuracy, log-ratios, KL, with intervals."""
    from mmalign import config as configs
    from mmalign.inference import evaluate_checkpoint, table

    run = configs.load(config, overrides or ())
    result = evaluate_checkpoint(run, checkpoint, data=data, out=out, own_loss=own_loss)
    say(table(result))


@app.command(short_help="Complete prompts, or generate images, with a trained model.")
def sample(
    config: Annotated[
        str | None, argument("CONFIG", "YAML file; or give a run folder with --run")
    ] = None,
    overrides: Overrides = None,
    prompts: Annotated[
        Path | None,
        option(
            "--prompts FILE",
            "JSONL with a `prompt` in each record, a text or a conversation, which may have "
            "tools, video, image, audio; or a text file with one prompt a line",
        ),
    ] = None,
    run: Annotated[Path | None, option("--run DIR", "run folder whose config is used")] = None,
    checkpoint: Checkpoint = None,
    base: Base = False,
    out: Annotated[
        Path | None,
        option(
            "--out PATH", "text: write JSONL here instead of printing; images: folder to write to"
        ),
    ] = None,
    seeds: Annotated[
        str | None, option("--seeds N,N", "images: one of each prompt for each seed")
    ] = None,
    grid: Annotated[int | None, option("--grid N", "images: columns of grid.png")] = None,
) -> None:
    """Complete prompts with a trained model, with the settings of CONFIG's `sample`.

    An image model generates images, with the settings of its `diffusion.sampling`.

    For example: mmalign sample --run runs/dpo --prompts questions.txt sample.temperature=0.7
    """
    from mmalign import config as configs
    from mmalign.data.records import read_prompts
    from mmalign.inference import last_asked, sample_checkpoint
    from mmalign.models.adapter import tools_of

    overrides = list(overrides or ())
    if run is not None and config is not None:  # the first KEY=VALUE lands in CONFIG's place
        overrides.insert(0, config)
    elif run is None and config is None:
        raise ConfigError("sample: give CONFIG, or a run folder with --run DIR")
    if prompts is None:
        raise ConfigError("sample: give the prompts with --prompts FILE")
    path = run / "config.yaml" if run is not None else Path(str(config))
    settings = configs.load(path, overrides)
    asked = read_prompts(prompts)
    tools = tools_of(settings.modality)
    if tools.samples_images:
        from mmalign.cli.pictures import sample_pictures

        texts = [tools.to_prompt(row) for row in asked]
        records = sample_pictures(
            settings, texts, checkpoint, out, base=base, seeds=seeds, columns=grid
        )
        say(f"{len(records)} images: {out}")
        return
    if seeds is not None or grid is not None:
        raise ConfigError(
            f"sample: --seeds and --grid are for images, but modality is {settings.modality}"
        )
    texts = sample_checkpoint(settings, asked, checkpoint, base=base, out=out)
    if out is None:
        for row, text in zip(asked, texts, strict=True):
            question = last_asked(row.prompt)
            files = ", ".join(Path(str(file)).name for file in row.media.files())
            say(f"> {question}{f'  [{files}]' if files else ''}\n{text}\n")


@app.command(short_help="Write to disk what training would compute again in every epoch.")
def cache(
    config: Config,
    overrides: Overrides = None,
    plan: Annotated[
        bool, option("--plan", "only say what would be written, how large it is, how long")
    ] = False,
) -> None:
    """Write to disk what training would compute again in every epoch; what is there stays.

    Text: the reference's log-probabilities (its last hidden states where the objective needs a KL),
    for runs with `reference.kind: cached`. Diffusion: latents, prompt embeddings, and with
    `reference.kind: cached` the reference's errors.
    """
    from mmalign import config as configs
    from mmalign.data.jobs import is_main_process
    from mmalign.inference import plan_cache, write_cache

    run = configs.load(config, overrides or ())
    summary = plan_cache(run) if plan else write_cache(run)
    if is_main_process():
        say(summary)


@app.command(short_help="List every objective, or explain one.")
def objectives(
    name: Annotated[str | None, argument("NAME", "a preset, or my_package.module:function")] = None,
) -> None:
    """List every objective; with NAME, its formula, keywords, needs, paper and configs."""
    from mmalign.cli import objectives as objectives_page

    say(objectives_page.listing() if name is None else objectives_page.page(name))


app.command(short_help="Win rate of two folders of same-seed images.")(pictures.compare)


@app.command(short_help="Merge checkpoints by weight arithmetic.")
def merge(
    base: Annotated[str, argument("BASE", "full checkpoint: folder or hub name")],
    out: Annotated[Path, option("--out DIR", "folder to make")],
    add: Annotated[
        list[str] | None,
        option(
            "--add DIR[=COEF]",
            "add COEF times what DIR changes, of a run what its final/ does; by default 1 "
            "time; repeat it",
        ),
    ] = None,
    text_encoders: Annotated[
        str,
        setting(
            "--text-encoders NAME",
            "LoRA files of image models that change text encoders too: stop, apply or ignore",
        ),
    ] = "stop",
) -> None:
    """Merge checkpoints or adapters by weight arithmetic: BASE + sum of COEF * (DIR - BASE).

    For example: mmalign merge some/model --add runs/dpo/final=1.0 --out merged
    """
    from mmalign.models.merge import merge_checkpoints

    added = [_weighted(item) for item in add or ()]
    say(merge_checkpoints(base, added, out, text_encoders=text_encoders))


@app.command(short_help="Write one HTML page about runs.")
def report(
    runs: Annotated[list[Path], argument("RUN_DIR", "folders that `train` or `rounds` wrote")],
    out: Annotated[
        Path | None,
        option(
            "--out FILE",
            "the page; by default report.html in the run, of several a new file beside them",
        ),
    ] = None,
) -> None:
    """Write one HTML page about a run, or about several side by side; it needs no network."""
    from mmalign.report import place_of, write_report

    say(write_report(runs, out or place_of(runs)))


@app.command(short_help="Print the JSON schema of a config.")
def schema() -> None:
    """Print the JSON schema of a config, for completion and checks in an editor."""
    import json

    from mmalign import config as configs

    say(json.dumps(configs.schema(), indent=2))


@quickstart_app.callback()
def _quickstart() -> None:
    pass


Output = Annotated[
    Path | None, option("--output DIR", "run folder; by default runs/quickstart-NAME")
]
Seed = Annotated[int, setting("--seed N", "of all that is drawn at random")]
Fast = Annotated[bool, option("--fast", "a smoke run of seconds, whose numbers mean nothing")]


@quickstart_app.command("text", short_help="A story model whose endings become happier.")
def quickstart_text(
    output: Output = None,
    seed: Seed = 0,
    fast: Fast = False,
    model: Annotated[
        Literal["stories", "smollm2"],
        setting(
            "--model",
            "stories: of 260 thousand parameters, in the package; smollm2: a chat model of 135 "
            "million, downloaded once, that learns to answer in one sentence",
        ),
    ] = "stories",
) -> None:
    """Train a small language model on preferences and on the chosen answers alone, and compare."""
    if model == "smollm2":
        from mmalign.quickstart import chat as demonstration
    else:
        from mmalign.quickstart import text as demonstration

    demonstration.run(output, seed, fast)


@quickstart_app.command("diffusion", short_help="Inkier digits, with nothing to imitate.")
def quickstart_diffusion(output: Output = None, seed: Seed = 0, fast: Fast = False) -> None:
    """Teach a small diffusion model more ink, from pairs of thin digits, and report on it."""
    from mmalign.quickstart import diffusion

    diffusion.run(output, seed, fast)


@quickstart_app.command("video", short_help="A video model learns yes and no, not an error.")
def quickstart_video(output: Output = None, seed: Seed = 0, fast: Fast = False) -> None:
    """Teach a small video model yes and no from pairs that misname colours, and report on it."""
    from mmalign.quickstart import video

    video.run(output, seed, fast)


def _weighted(item: str) -> tuple[str, float]:
    if Path(item).exists():
        return item, 1.0
    folder, _, coefficient = item.rpartition("=")
    try:
        if not folder:
            raise ValueError
        return folder, float(coefficient)
    except ValueError:
        message = f"--add {item}: write it as DIR=COEF, e.g. runs/dpo/final=1.0"
        raise ConfigError(message) from None


def main() -> None:
    """Entry point of the `mmalign` command."""
    app(prog_name="mmalign")
