"""The `mmalign` command. Each subcommand parses its arguments and calls one function."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mmalign import __version__
from mmalign.errors import MmalignError

EXIT_STATUS = "Exit status: 0 done, 1 wrong input, 2 wrong usage, 3 loss became non-finite."


class _Commands(TyperGroup):
    """Prints what is wrong with the input as one message instead of a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MmalignError as error:
            typer.echo(f"{type(error).__name__}: {error}", err=True)
            raise typer.Exit(error.exit_code) from error
        except OSError as error:  # a full disk, a folder without permission: the machine's state
            typer.echo(f"{type(error).__name__}: {error}", err=True)
            raise typer.Exit(1) from error


def _group(help_text: str) -> typer.Typer:
    return typer.Typer(
        cls=_Commands,
        help=help_text,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        no_args_is_help=True,
        add_completion=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )


app = _group("Preference alignment for text, image and video models, with one set of losses.")
data_app = _group("Look at preference data before training on it.")
quickstart_app = _group("See an alignment run from start to report, with data that is shipped.")
app.add_typer(data_app, name="data")
app.add_typer(quickstart_app, name="quickstart")

Config = Annotated[
    str,
    typer.Argument(
        metavar="CONFIG", help="YAML file; see configs/ for one per method", show_default=False
    ),
]
Overrides = Annotated[
    list[str],
    typer.Argument(
        metavar="KEY=VALUE",
        help="override one value of CONFIG, e.g. objective.beta=0.05",
        show_default=False,
    ),
]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mmalign {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="print the version"),
    ] = False,
) -> None:
    pass


@app.command(epilog=EXIT_STATUS)
def train(
    config: Config,
    overrides: Overrides = [],  # noqa: B006 - typer copies it
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="continue from the newest complete checkpoint in the output folder"
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="load, run one batch forward and backward, print shapes and memory, stop",
        ),
    ] = False,
) -> None:
    """Train the model described by CONFIG and write everything to its `output` folder."""
    from mmalign import config as configs

    run = configs.load(config, overrides)
    configs.check(run, where=config)

    from mmalign.train.loop import train as run_training

    run_training(run, resume=resume, dry_run=dry_run)


@app.command()
def schema() -> None:
    """Print the JSON schema of a config, for completion and checks in an editor."""
    import json

    from mmalign import config as configs

    typer.echo(json.dumps(configs.schema(), indent=2))


def main() -> None:
    """Entry point of the `mmalign` command."""
    app(prog_name="mmalign")
