"""`mmalign data`: look at preference data before training on it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmalign import cli_make
from mmalign.cli_compare import (
    BatchSize,
    Device,
    Dtype,
    Scorers,
    load_scorers,
    parse_scorers,
    shown,
)
from mmalign.cli_parts import Config, Overrides, argument, group, option, say
from mmalign.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmalign.data.example import Example
    from mmalign.data.validate_media import Decode

app = group("Look at preference data before training on it, or make some.")
app.add_typer(cli_make.app, name="make")

Layout = Annotated[
    str | None, option("--layout", metavar="NAME", text="found by itself when left out")
]


@app.command("check", short_help="Report every problem of preference files.")
def data_check(
    files: Annotated[
        list[str] | None,
        argument("FILE", "files, saved datasets or hub names; KEY=VALUE overrides of a config"),
    ] = None,
    config: Annotated[
        str | None,
        option(
            "--config",
            metavar="CONFIG",
            text="look at the rows as training with CONFIG would: its files where none are named, "
            "its tokenizer, chat template and limits",
        ),
    ] = None,
    evaluation: Annotated[
        list[str] | None,
        option("--eval", metavar="FILE", text="held-out rows, compared with the others; repeat"),
    ] = None,
    layout: Layout = None,
    show: Annotated[
        int, typer.Option("--show", metavar="N", min=0, help="places named for each problem")
    ] = 20,
    decode: Annotated[
        bool, option("--decode", text="decode clips and sounds too; minutes where there are many")
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
    from mmalign.data.progress import waiting

    with waiting("loading libraries"):
        from mmalign import config as configs
        from mmalign.row_check import check_rows

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
    rows: Annotated[
        int, typer.Option("--rows", metavar="N", min=1, help="how many of the training rows")
    ] = 3,
) -> None:
    """Print rows as the model will see them: context dim, scored tokens coloured."""
    from mmalign import config as configs
    from mmalign.offline import show_rows

    show_rows(configs.load(config, overrides or ()), rows)


@app.command("convert", short_help="Write any known layout as mmalign's own.")
def data_convert(
    source: Annotated[str, argument("FILE", "file, saved dataset or hub name")],
    out: Annotated[Path, option("--out", metavar="FILE", text="the JSONL file to write")],
    layout: Layout = None,
    split: Annotated[
        str | None, option("--split", metavar="NAME", text="only the rows of this split")
    ] = None,
    drop_bad: Annotated[
        bool, option("--drop-bad", text="leave out records with problems instead of stopping")
    ] = False,
) -> None:
    """Write a file in any known layout as JSONL in mmalign's own layout."""
    from mmalign.data.records import convert_file

    written, left_out = convert_file(source, out, layout=layout, split=split, drop_bad=drop_bad)
    say(f"{out}: {written} records written, {left_out} left out")


@app.command("score", short_help="Score the pictures of pairs or lists, and label by the scores.")
def data_score(
    source: Annotated[str, argument("FILE", "file or folder of picture pairs or lists")],
    out: Annotated[Path, option("--out", metavar="FILE", text="the JSONL file to write")],
    scorer: Scorers,
    relabel: Annotated[
        bool, option("--relabel", text="the higher score wins; equal scores are a tie")
    ] = False,
    smooth: Annotated[
        str | None,
        option(
            "--smooth",
            metavar="RANGE",
            text="write SmPO's p_chosen; RANGE is MIN,MAX of the scores, `data` for theirs, or "
            "`published` for SmPO's constants",
        ),
    ] = None,
    layout: Layout = None,
    split: Annotated[
        str | None, option("--split", metavar="NAME", text="only the rows of this split")
    ] = None,
    pictures: Annotated[
        Path | None,
        option("--pictures", metavar="DIR", text="where paths start; by default FILE's folder"),
    ] = None,
    batch_size: BatchSize = 16,
    device: Device = None,
    dtype: Dtype = "float32",
) -> None:
    """Score the pictures of pairs or lists; the first scorer labels. Run it again to go on.

    For example: mmalign data score pairs.jsonl --out scored.jsonl --scorer pickscore --relabel
    """
    from mmalign.diffusion.scorers.files import Source, score_file
    from mmalign.diffusion.scorers.labels import parse_smooth

    weights = dict(parse_scorers(scorer, dtype))
    wanted = None if smooth is None else parse_smooth(smooth, next(iter(weights)))
    rows = Source(source, split, layout, pictures)
    try:
        with shown("score") as progress:
            result = score_file(
                rows,
                out,
                list(weights),
                lambda: load_scorers(scorer, device, dtype),
                relabel=relabel,
                smooth=wanted,
                settings={"weights": weights, "dtype": dtype},
                batch_size=batch_size,
                progress=progress,
            )
    except KeyboardInterrupt:
        say(f"stopped; the scores are in {out}.partial: run it again to go on", err=True)
        raise typer.Exit(130) from None
    say(result.text())


def _faults(rows: Sequence[Example]) -> list[list[str]]:
    """What is wrong with the media of each row, decoded with the default settings."""
    from mmalign.config import VideoConfig
    from mmalign.video.checks import check_media

    report = check_media(rows, VideoConfig(), hears=False)
    return [report.of(row, hears=False) for row in rows]
